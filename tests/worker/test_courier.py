"""The courier's loop on real stores, its engine replaced by a script of frames."""

import time
from collections import deque

import numpy as np
import pytest

from headrace.contract import redis_client
from headrace.contract.errors import QueueUnavailable
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import FinishReason, JobStatus
from headrace.tests.worker.conftest import END, MODEL
from headrace.worker import courier as courier_module
from headrace.worker.courier import Courier
from headrace.worker.emit import Emitter
from headrace.worker.frames import (
    ENTRY,
    Admit,
    Cancel,
    Failure,
    Ready,
    Reason,
    StartStage,
    StepFrame,
    StepStats,
)


class ScriptedLink:
    """What EngineLink is to the loop: frames that a test wrote, commands that it can read."""

    def __init__(self) -> None:
        self.notices: deque = deque()
        self.sent: list = []

    def fileno(self) -> int:
        return -1

    def send(self, command) -> bool:
        self.sent.append(command)
        return True

    def receive(self):
        notices, self.notices = list(self.notices), deque()
        return notices, True

    def step(self, *entries: tuple[int, int, int, Reason]) -> None:
        """Write a frame of (seq_id, token, index, reason) entries."""
        rows = np.zeros(len(entries), ENTRY)
        for row, (seq_id, token, index, reason) in zip(rows, entries, strict=True):
            row["seq_id"], row["token"], row["index"] = seq_id, token, index
            row["reason"], row["num_logprobs"] = reason, -1
        self.notices.append(StepFrame(StepStats(room_tokens=10_000), rows, []))


class Loop:
    """A courier over the bench's stores, turned by hand."""

    def __init__(self, bench) -> None:
        self.bench, self.link, self.rings = bench, ScriptedLink(), 0
        self.courier = Courier(
            model=MODEL,
            worker=bench.name,
            flush_ms=0,
            link=self.link,  # type: ignore[arg-type]
            streams=bench.streams,
            tokens=bench.tokens,
            endings=bench.endings,
            held=bench.held,
            room=bench.room,
            metrics=bench.metrics,
            latencies=bench.latencies,
            ring=self.ring,
        )

    def ring(self) -> None:
        self.rings += 1

    def admit(self, **sampling) -> tuple[str, int]:
        """Accept, claim and admit one job; return its id and the engine's name for it."""
        job_id = self.bench.accept(**sampling)
        (job,) = self.bench.claim()
        self.courier.deliver(job)
        self.turn()
        return job_id, job.seq_id

    def turn(self, *, times: int = 1) -> None:
        for _ in range(times):
            self.courier.wake()
            self.courier.turn()

    def say(self, seq_id: int, text: str, first: int = 0) -> None:
        """Let the engine make the bytes of a text, one a step."""
        ids = self.bench.prompts.encode(text, add_special_tokens=False)
        for index, token in enumerate(ids, first):
            self.link.step((seq_id, token, index, Reason.GOING_ON))

    def text_of_log(self, job_id: str) -> str:
        return "".join(chunk.text for chunk in self.bench.tokens.read(MODEL, job_id).chunks)

    def commands(self, kind) -> list:
        return [command for command in self.link.sent if isinstance(command, kind)]


@pytest.fixture
def loop(bench) -> Loop:
    return Loop(bench)


def test_tokens_are_logged_and_the_end_is_passed_on(loop):
    job_id, seq_id = loop.admit()
    assert [a.seq_id for a in loop.commands(Admit)] == [seq_id]
    loop.say(seq_id, "hi")
    loop.link.step((seq_id, END, 2, Reason.STOP_TOKEN))
    loop.turn(times=2)
    assert loop.text_of_log(job_id) == "hi"
    assert loop.courier.num_jobs == 0
    loop.bench.settle()
    row = loop.bench.row(job_id)
    assert (row["output_text"], row["finish_reason"]) == ("hi", FinishReason.STOP)


def test_a_ready_engine_opens_the_room_and_its_start_is_told(loop, caplog):
    stages = [StartStage("process and imports", 3.5, 0), StartStage("KV pool", 0.25, 1 << 30)]
    loop.bench.room.closed()
    with caplog.at_level("INFO", "headrace"):
        loop.link.notices.append(Ready(10, 16, 128, 300, "bfloat16", 0.5, "cuda", 32, stages))
        loop.turn()
    assert loop.bench.room.left() == (160, 32)
    assert loop.rings == 1
    (line,) = [line for line in caplog.messages if line.startswith("engine.opened")]
    assert "device=cuda process_and_imports_s=3.5 process_and_imports_bytes=0" in line
    assert "kv_pool_s=0.25 kv_pool_bytes=1073741824" in line
    found = loop.bench.metrics.registry.get_sample_value
    pool = {"stage": "KV pool"}
    assert found("headrace_engine_start_seconds", pool) == 0.25
    assert found("headrace_engine_start_bytes", pool) == 1 << 30
    loop.bench.metrics.started(stages[:1])
    assert found("headrace_engine_start_seconds", pool) is None


def test_a_stop_string_ends_the_job_and_cancels_the_sequence(loop):
    job_id, seq_id = loop.admit(stop=("lo",))
    loop.say(seq_id, "hello you")
    loop.turn(times=2)
    assert [c.seq_id for c in loop.commands(Cancel)] == [seq_id]
    loop.bench.settle()
    row = loop.bench.row(job_id)
    assert (row["output_text"], len(row["output_token_ids"])) == ("hel", 5)
    assert loop.text_of_log(job_id) == "hel"


def test_a_cancellation_keeps_what_was_made_and_ignores_what_comes_after(loop):
    job_id, seq_id = loop.admit()
    loop.say(seq_id, "abc")
    loop.turn()
    loop.courier.cancel(job_id)
    loop.turn(times=2)
    loop.say(seq_id, "def", first=3)
    loop.turn()
    loop.bench.settle()
    row = loop.bench.row(job_id)
    assert (row["status"], row["output_text"]) == (JobStatus.CANCELED, "abc")


def test_a_cancellation_that_comes_between_fence_and_admission_is_not_missed(loop):
    """It need not wait for the next renewal, a third of a lease later."""
    job_id = loop.bench.accept()
    (job,) = loop.bench.claim()
    loop.courier.cancel(job_id)
    loop.turn()
    loop.courier.deliver(job)
    loop.turn(times=2)
    assert loop.commands(Admit) == []
    assert loop.courier.num_jobs == 0
    loop.bench.settle()
    assert loop.bench.row(job_id)["status"] == JobStatus.CANCELED


def test_an_engines_refusal_fails_the_job_with_its_reason(loop):
    job_id, seq_id = loop.admit()
    loop.link.notices.append(Failure(seq_id, "never_fits", "the pool is too small"))
    loop.link.step((seq_id, -1, 0, Reason.FAILED))
    loop.turn(times=2)
    loop.bench.settle()
    row = loop.bench.row(job_id)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "never_fits")


def test_a_gap_in_the_engines_tokens_stops_the_worker_rather_than_lie(loop):
    _, seq_id = loop.admit()
    loop.link.step((seq_id, 1, 5, Reason.GOING_ON))
    with pytest.raises(RuntimeError, match="expected 0"):
        loop.turn()


def test_invariant_3_a_stale_attempt_is_dropped_at_its_next_write(loop):
    job_id, seq_id = loop.admit()
    loop.say(seq_id, "a")
    loop.turn(times=2)
    loop.bench.tokens.fence(MODEL, job_id, 2, "w2")
    loop.say(seq_id, "b", first=1)
    loop.turn(times=2)
    assert loop.courier.num_jobs == 0
    assert loop.bench.held.pairs() == []
    assert loop.text_of_log(job_id) == "a"
    assert [c.seq_id for c in loop.commands(Cancel)] == [seq_id]
    stale = loop.bench.metrics.registry.get_sample_value(
        "headrace_worker_stale_writes_total", {"at": "log"}
    )
    assert stale == 1


def test_what_redis_lost_is_restored_from_memory_and_goes_on(loop):
    job_id, seq_id = loop.admit()
    loop.say(seq_id, "abc")
    loop.turn(times=2)
    loop.bench.client.flushall()
    loop.say(seq_id, "de", first=3)
    deadline = time.monotonic() + 10
    while loop.text_of_log(job_id) != "abcde":
        assert time.monotonic() < deadline
        loop.turn()
    assert loop.bench.tokens.read(MODEL, job_id).chunks[0].gen == 0
    assert loop.bench.streams.renew(MODEL, "w1", [(job_id, 1)]) == ["held"]


def test_a_flush_whose_reply_was_lost_loses_and_repeats_nothing(loop, monkeypatch):
    """Redis appended; the courier was told that it is away, and made more tokens meanwhile."""
    job_id, seq_id = loop.admit()
    log = loop.bench.tokens
    append = log.append
    monkeypatch.setattr(courier_module, "RETRY_S", 0)

    def append_and_fail(*args):
        append(*args)
        raise QueueUnavailable("the reply was lost")

    monkeypatch.setattr(log, "append", append_and_fail)
    loop.say(seq_id, "abc")
    loop.turn(times=2)
    monkeypatch.setattr(log, "append", append)
    loop.say(seq_id, "de", first=3)
    deadline = time.monotonic() + 10
    while loop.text_of_log(job_id) != "abcde":
        assert time.monotonic() < deadline
        loop.turn()
    assert [chunk.first for chunk in log.read(MODEL, job_id).chunks] == [0, 3]
    assert loop.courier._by_id[job_id].num_logged == 5


def test_with_redis_away_tokens_wait_and_results_wait_no_longer_than_patience(loop, monkeypatch):
    job_id, seq_id = loop.admit()
    nowhere = redis_client.connect("redis://127.0.0.1:1/0")
    loop.courier._emitter = Emitter(
        model=MODEL, worker="w1", tokens=TokenLog(nowhere), metrics=loop.bench.metrics
    )
    loop.say(seq_id, "hi")
    loop.link.step((seq_id, END, 2, Reason.STOP_TOKEN))
    loop.turn(times=2)
    assert loop.courier.num_jobs == 1, "its tokens are not logged yet"
    monkeypatch.setattr("headrace.worker.emit.PATIENCE_S", 0)
    monkeypatch.setattr(courier_module, "RETRY_S", 0)
    loop.courier.flush()
    assert loop.courier.num_jobs == 0
    loop.bench.settle()
    row = loop.bench.row(job_id)
    assert (row["status"], row["output_text"]) == (JobStatus.SUCCEEDED, "hi")


def test_a_job_claimed_again_replaces_its_older_attempt(loop):
    job_id, first = loop.admit()
    loop.bench.streams.hand_back(MODEL, job_id, 1)
    (job,) = loop.bench.claim()
    loop.courier.deliver(job)
    loop.turn()
    assert loop.courier.num_jobs == 1
    assert [c.seq_id for c in loop.commands(Cancel)] == [first]
    assert loop.bench.held.pairs() == [(job_id, 2)]


def test_take_all_logs_what_was_made_and_returns_what_is_to_be_handed_back(loop):
    job_id, seq_id = loop.admit()
    done_id, done = loop.admit(max_tokens=1)
    loop.say(seq_id, "ab")
    loop.say(done, "x")
    loop.courier._receive()
    left = loop.courier.take_all()
    assert [job.job for job in left] == [job_id]
    assert loop.text_of_log(job_id) == "ab"
    loop.bench.settle()
    assert loop.bench.row(done_id)["status"] == JobStatus.SUCCEEDED


def test_room_coming_free_rings_intake(loop):
    _, seq_id = loop.admit(max_tokens=1)
    before = loop.rings
    loop.say(seq_id, "x")
    loop.turn(times=2)
    assert loop.rings > before


def test_what_the_engine_has_is_known_until_it_tells_each_end(loop):
    (one, _), (_, second), (three, _) = (loop.admit() for _ in range(3))
    loop.courier.cancel(one)
    loop.turn()
    loop.link.step((second, END, 0, Reason.STOP_TOKEN))
    loop.turn()
    assert loop.courier.num_jobs == 1
    assert not loop.bench.room.is_idle
    assert loop.courier.lose_engine() == {one, three}, "what was canceled is in it still"
    assert loop.courier.lose_engine() == frozenset()


def test_a_worker_is_idle_when_the_engine_has_told_the_last_end(loop):
    job_id, seq_id = loop.admit()
    loop.courier.cancel(job_id)
    loop.turn()
    assert (loop.courier.num_jobs, loop.bench.room.is_idle) == (0, False)
    before = loop.rings
    loop.link.step((seq_id, -1, 0, Reason.CANCELED))
    loop.turn()
    assert loop.bench.room.is_idle
    assert loop.rings > before, "suspects may be claimed now"
    assert loop.courier.lose_engine() == frozenset()


def test_a_job_that_could_not_be_sent_was_never_in_the_engine(loop, monkeypatch):
    monkeypatch.setattr(loop.link, "send", lambda command: False)
    job_id, _ = loop.admit()
    assert loop.courier.lose_engine() == frozenset()
    assert [job.job for job in loop.courier.take_all()] == [job_id]
    assert loop.bench.room.is_idle


def test_a_suspect_is_restored_as_one(loop, monkeypatch):
    job_id = loop.bench.accept()
    (job,) = loop.bench.claim()
    loop.bench.room.release(job_id)
    loop.bench.ledger.hand_back(job_id, 1)
    loop.bench.streams.hand_back(MODEL, job_id, 1, suspect=2)
    (job,) = loop.bench.claim()
    loop.courier.deliver(job)
    loop.turn()
    loop.bench.client.flushall()
    loop.courier.tell("gone", job_id, job.attempt)
    loop.turn()
    (depth,) = loop.bench.streams.depths(MODEL)
    assert (depth.num_held, depth.is_of_suspects) == (1, True)
