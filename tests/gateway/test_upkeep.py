"""Relay, deadlines, sweeper and retention on real stores; and once as Celery runs them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest
from sqlalchemy import select, text, update

from headrace.contract import database, keys, redis_client, wire
from headrace.contract.accounts import Accounts
from headrace.contract.crashes import Crashes, InHand
from headrace.contract.ids import new_id
from headrace.contract.ledger import Cancel, Ending, Ledger
from headrace.contract.live import Live
from headrace.contract.operators import Operators
from headrace.contract.pauses import Pauses
from headrace.contract.records import jobs, sessions
from headrace.contract.roles import Role
from headrace.contract.specs import spec_of
from headrace.contract.streams import JobStreams, Workers
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import FinishReason, JobStatus
from headrace.gateway.upkeep import Upkeep
from headrace.tests.gateway.courier import MODEL, PROMPT_TOKENS, Courier, Held

LEASE_S = 0.05


@dataclass
class Parts:
    upkeep: Upkeep
    ledger: Ledger
    streams: JobStreams
    tokens: TokenLog
    workers: Workers
    courier: Courier
    tenant: str
    key: str
    engine: object
    client: object
    pauses: Pauses

    def register_model(self) -> None:
        """Let the model be one that was served."""
        card = wire.ModelCard(
            name=MODEL,
            folder="/nowhere",
            max_seq_tokens=8,
            vocab_size=8,
            dtype="float32",
            has_chat_template=False,
        )
        Accounts(self.engine).register_model(card)

    def accept(self, **changes) -> str:
        """Accept a job as the gateway does, up to the commit."""
        job_id = new_id("job")
        row = {
            "id": job_id,
            "tenant_id": self.tenant,
            "key_id": self.key,
            "model": MODEL,
            "job_class": "interactive",
            "priority": "normal",
            "input": {"prompt": "p"},
            "sampling": msgspec.to_builtins(wire.Sampling(), str_keys=True),
            "meta": {},
            "cost_tokens": 10,
        }
        self.ledger.accept_job(row | changes, idempotency_key=None, request_sha256=b"")
        return job_id

    def enqueue(self, job_id: str) -> None:
        """Enqueue a job as the gateway does, and confirm it."""
        self.streams.enqueue(spec_of(self.row(job_id)), 10)
        self.ledger.outbox_done([job_id])

    def row(self, job_id: str):
        row = self.ledger.job(job_id)
        assert row is not None
        return row

    def set(self, job_id: str, **values) -> None:
        with self.engine.begin() as db:
            db.execute(update(jobs).where(jobs.c.id == job_id).values(**values))

    def claimable(self) -> list[str]:
        claimed = self.streams.claim(
            MODEL, "w9", lease_ms=60_000, room_tokens=1 << 20, max_jobs=50, is_idle=True
        )
        return [claim.job for claim in claimed.claims]


@pytest.fixture
def parts(redis_url, database_url) -> Iterator[Parts]:
    engine, client = database.connect(database_url), redis_client.connect(redis_url)
    client.flushall()
    with engine.begin() as db:
        db.execute(text("truncate jobs cascade"))
    ledger, streams, tokens, workers = (
        Ledger(engine),
        JobStreams(client),
        TokenLog(client),
        Workers(client),
    )
    key = Accounts(engine).create_key(tenant="t", name="n")
    pauses = Pauses(engine, Live(client))
    pauses.resume(model="*", job_class="*", tenant_id="*")
    upkeep = Upkeep(
        ledger=ledger,
        operators=Operators(engine),
        streams=streams,
        tokens=tokens,
        workers=workers,
        pauses=pauses,
        lease_s=LEASE_S,
        retention_days=1,
    )
    yield Parts(
        upkeep=upkeep,
        ledger=ledger,
        streams=streams,
        tokens=tokens,
        workers=workers,
        courier=Courier(ledger, streams, tokens),
        tenant=key.tenant_id,
        key=key.id,
        engine=engine,
        client=client,
        pauses=pauses,
    )
    engine.dispose()
    client.close()


def sweep_a_lease_later(parts: Parts) -> int:
    """Sweep, which notices what is missing, and again when it has been for longer than a lease."""
    assert parts.upkeep.sweep() == 0
    noticed = time.monotonic()
    while time.monotonic() - noticed <= LEASE_S:
        pass
    return parts.upkeep.sweep()


def beat(parts: Parts, worker: str) -> None:
    parts.workers.beat(
        wire.WorkerBeat(
            worker=worker,
            model=MODEL,
            host="h",
            pid=1,
            state="ready",
            started_ms=0,
            step=0,
            step_age_ms=0,
            num_running=0,
            num_waiting=0,
            free_blocks=0,
            total_blocks=0,
        ),
        lifetime_ms=60_000,
    )


def test_relay_enqueues_what_nobody_confirmed_and_only_once(parts):
    job = parts.accept()
    assert parts.upkeep.relay(older_than_s=60) == 0, "the gateway has the first word"
    assert parts.upkeep.relay(older_than_s=0) == 1
    assert parts.upkeep.relay(older_than_s=0) == 0
    assert parts.claimable() == [job]


def test_relay_does_not_enqueue_a_job_that_has_ended(parts):
    job = parts.accept()
    parts.ledger.request_cancel(job, tenant_id=parts.tenant)
    assert parts.upkeep.relay(older_than_s=0) == 1
    assert parts.claimable() == []


def test_relay_of_an_enqueued_job_changes_nothing(parts):
    job = parts.accept()
    parts.enqueue(job)
    parts.upkeep.relay(older_than_s=0)
    assert parts.claimable() == [job]


def test_an_overdue_queued_job_expires_and_its_subscribers_are_told(parts):
    job, other = parts.accept(), parts.accept()
    for each in (job, other):
        parts.enqueue(each)
    parts.set(job, deadline_at=text("now() - interval '1 second'"))
    assert parts.upkeep.expire() == 1
    assert parts.row(job)["status"] == JobStatus.EXPIRED
    end = parts.tokens.read(MODEL, job).end
    assert end is not None
    assert end.status is JobStatus.EXPIRED
    assert parts.claimable() == [other]


def test_invariant_2_a_queued_job_that_redis_lost_is_put_back(parts):
    job = parts.accept()
    parts.enqueue(job)
    parts.client.flushall()
    assert parts.upkeep.sweep() == 1
    assert parts.upkeep.sweep() == 0
    assert parts.claimable() == [job]


def test_invariant_2_a_job_that_is_being_enqueued_is_left_to_the_relay(parts):
    """Each sweep under load met some, touched them, and warned of it."""
    job = parts.accept()
    assert parts.upkeep.sweep() == 0
    assert parts.claimable() == []
    parts.upkeep.relay(older_than_s=0)
    parts.client.flushall()
    assert parts.upkeep.sweep() == 1, "the relay has done its part: now it is the sweeper's"
    assert parts.claimable() == [job]


@pytest.mark.parametrize(
    "written",
    [
        {"sampling": {"temperature": "hot"}},
        {"sampling": []},
        {"input": ["p"]},
        {"input": {"prompt_token_ids": 7}},
    ],
)
def test_invariant_6_a_row_that_cannot_be_read_fails_and_keeps_no_other_waiting(parts, written):
    bad = parts.accept()
    parts.set(bad, **written)
    sound = parts.accept()
    assert parts.upkeep.relay(older_than_s=0) == 2
    assert parts.upkeep.sweep() == 0
    row = parts.row(bad)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "job_unreadable")
    assert parts.tokens.read(MODEL, bad).end is not None
    assert parts.claimable() == [sound]


def test_invariant_6_one_that_ran_and_cannot_be_read_any_more_fails_with_its_tokens(parts):
    job, held = hand_back(parts)
    parts.set(job, sampling={"temperature": "hot"})
    parts.client.delete(keys.job_hash(MODEL, job))
    assert parts.upkeep.sweep() == 0
    row = parts.row(job)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "job_unreadable")
    assert row["output_token_ids"] == held.ids


def test_invariant_2_a_suspect_that_redis_lost_is_put_back_as_one(parts):
    job, held = hand_back(parts)
    parts.ledger.pick_up([job], "w1")
    in_hand = InHand(job, held.attempt + 1, 0, Ending(JobStatus.FAILED, FinishReason.ERROR))
    Crashes(parts.engine).record([in_hand], "w1", "s", "d", is_certain=True, was_alone=True)
    parts.client.flushall()
    assert parts.upkeep.sweep() == 1
    (depth,) = parts.streams.depths(MODEL)
    assert (depth.num_queued, depth.is_of_suspects) == (1, True)


def test_a_running_job_that_redis_lost_is_left_to_its_worker_for_a_lease(parts):
    parts.enqueue(parts.accept())
    held = parts.courier.take()
    parts.client.flushall()
    assert parts.upkeep.sweep() == 0, "its worker may restore it"
    assert parts.row(held.claim.job)["status"] == JobStatus.RUNNING
    parts.courier.restore(held)
    assert sweep_a_lease_later(parts) == 0


def test_a_running_job_that_redis_lost_and_whose_worker_is_dead_is_put_back(parts):
    job = parts.accept()
    parts.enqueue(job)
    parts.courier.take()
    parts.client.flushall()
    assert sweep_a_lease_later(parts) == 1
    assert parts.claimable() == [job]


def test_a_running_job_that_redis_lost_is_put_back_though_its_worker_came_back(parts):
    """A worker that died with Redis and was started again beats under its name."""
    job = parts.accept()
    parts.enqueue(job)
    parts.courier.take()
    parts.client.flushall()
    beat(parts, parts.courier.name)
    assert sweep_a_lease_later(parts) == 1
    assert parts.claimable() == [job]


def test_a_job_that_redis_lost_twice_is_left_to_its_worker_each_time(parts):
    parts.enqueue(parts.accept())
    held = parts.courier.take()
    for _ in range(2):
        parts.client.flushall()
        assert parts.upkeep.sweep() == 0
        parts.courier.restore(held)
        assert sweep_a_lease_later(parts) == 0


def test_a_dead_workers_canceled_job_ends_with_the_tokens_of_its_log(parts):
    job = parts.accept()
    parts.enqueue(job)
    held = parts.courier.take()
    parts.courier.say(held, 3)
    parts.courier.say(held, 2)
    parts.set(job, cancel_requested_at=text("now() - interval '1 minute'"))
    assert parts.upkeep.sweep() == 1
    row = parts.row(job)
    assert (row["status"], row["output_text"]) == (JobStatus.CANCELED, held.text)
    assert row["output_token_ids"] == held.ids
    assert row["prompt_tokens"] == PROMPT_TOKENS
    view = parts.tokens.read(MODEL, job)
    assert view.end is not None
    assert (view.end.next, view.end.prompt_tokens) == (5, PROMPT_TOKENS)


def hand_back(parts: Parts) -> tuple[str, Held]:
    """Let a courier make five tokens of a new job and drain."""
    job = parts.accept()
    parts.enqueue(job)
    held = parts.courier.take()
    parts.courier.say(held, 5)
    assert parts.ledger.hand_back(job, held.attempt)
    assert parts.streams.hand_back(MODEL, job, held.attempt)
    return job, held


def test_invariant_6_a_job_handed_back_expires_with_the_tokens_of_its_log(parts):
    job, held = hand_back(parts)
    parts.set(job, deadline_at=text("now() - interval '1 second'"))
    assert parts.upkeep.expire() == 1
    assert parts.upkeep.expire() == 0
    row = parts.row(job)
    assert (row["status"], row["output_text"]) == (JobStatus.EXPIRED, held.text)
    view = parts.tokens.read(MODEL, job)
    assert view.end is not None
    assert view.end.next == 5
    assert parts.claimable() == []


def test_invariant_6_a_job_handed_back_is_canceled_with_the_tokens_of_its_log(parts):
    job, held = hand_back(parts)
    assert parts.ledger.request_cancel(job, tenant_id=parts.tenant) is Cancel.REQUESTED
    assert parts.upkeep.sweep() == 1
    assert parts.upkeep.sweep() == 0
    row = parts.row(job)
    assert (row["status"], row["output_text"]) == (JobStatus.CANCELED, held.text)
    assert row["output_token_ids"] == held.ids
    assert parts.claimable() == []


def test_an_end_that_redis_never_heard_of_is_told_later(parts):
    job = parts.accept()
    parts.enqueue(job)
    parts.ledger.request_cancel(job, tenant_id=parts.tenant)  # and the gateway died here
    parts.set(job, finished_at=text("now() - interval '1 minute'"))
    assert parts.tokens.read(MODEL, job).end is None
    assert parts.upkeep.sweep() == 1
    assert parts.upkeep.sweep() == 0
    end = parts.tokens.read(MODEL, job).end
    assert end is not None
    assert end.status is JobStatus.CANCELED
    assert parts.claimable() == []


def test_runs_that_overlap_do_everything_once(parts):
    queued = [parts.accept() for _ in range(20)]
    parts.ledger.outbox_done(queued)  # and Redis lost them
    late = [parts.accept() for _ in range(5)]
    for job in late:
        parts.set(job, deadline_at=text("now() - interval '1 second'"))
    counts, barrier = [], threading.Barrier(3)

    def run() -> None:
        barrier.wait(10)
        counts.append((parts.upkeep.expire(), parts.upkeep.sweep()))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(counts) == 3
    assert sum(expired for expired, _ in counts) == len(late)
    assert sorted(parts.claimable()) == sorted(queued)


def test_a_dead_workers_overdue_job_expires_but_a_living_ones_is_its_own(parts):
    job = parts.accept()
    parts.enqueue(job)
    parts.courier.take()
    parts.set(job, deadline_at=text("now() - interval '1 minute'"))
    beat(parts, parts.courier.name)
    assert parts.upkeep.sweep() == 0
    parts.workers.leave(parts.courier.name)
    assert parts.upkeep.sweep() == 1
    assert parts.row(job)["error_code"] == "deadline_exceeded"


def test_a_cancellation_whose_message_was_lost_is_sent_again(parts):
    job = parts.accept()
    parts.enqueue(job)
    held = parts.courier.take()
    parts.set(job, cancel_requested_at=text("now()"))
    beat(parts, parts.courier.name)
    parts.upkeep.sweep()
    assert parts.streams.renew(MODEL, parts.courier.name, [(job, held.attempt)]) == ["cancel"]


def test_retention_deletes_what_ended_long_ago_and_nothing_else(parts):
    old, new, running = parts.accept(), parts.accept(), parts.accept()
    for job in (old, new):
        parts.ledger.request_cancel(job, tenant_id=parts.tenant)
    parts.set(old, finished_at=text("now() - interval '2 days'"))
    assert parts.upkeep.retain() == 1
    assert parts.ledger.job(old) is None
    assert parts.row(new)["status"] == JobStatus.CANCELED
    assert parts.row(running)["status"] == JobStatus.QUEUED


def test_sessions_that_are_over_are_deleted(parts):
    people = Operators(parts.engine)
    people.create(name="ada", password="correct horse battery", role=Role.VIEWER)
    over, live = (people.login("ada", "correct horse battery", str(n)).token for n in range(2))
    with parts.engine.begin() as db:
        ended = update(sessions).where(sessions.c.address == "0")
        db.execute(ended.values(expires_at=text("now() - interval '1 second'")))
    parts.upkeep.retain()
    with parts.engine.connect() as db:
        assert [row.address for row in db.execute(select(sessions))] == ["1"]
    assert people.session(over) is None
    assert people.session(live) is not None


def test_celery_runs_the_upkeep(parts, redis_url, database_url, tmp_path):
    job = parts.accept()
    command = [sys.executable, "-m", "celery", "-A", "headrace.gateway.tasks", "worker", "-B"]
    command += ["--pool", "solo", "--concurrency", "1", "-s", str(tmp_path / "schedule")]
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HEADRACE_REDIS_URL": redis_url,
        "HEADRACE_DATABASE_URL": database_url,
        "HEADRACE_RELAY_EVERY_S": "0.2",
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not (found := parts.claimable()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert found == [job]


# -- pauses, and a long backlog --------------------------------------------------------------


def test_invariant_5_a_lost_pause_is_back_before_the_jobs_it_holds(parts):
    parts.register_model()
    job = parts.accept()
    parts.enqueue(job)
    parts.pauses.pause(model=MODEL, job_class="*", tenant_id="*", by="ada")
    parts.client.flushall()
    assert parts.upkeep.sweep() == 1
    assert parts.claimable() == [], "the job is back, and paused"
    parts.pauses.resume(model=MODEL, job_class="*", tenant_id="*")
    parts.upkeep.sweep()
    assert parts.claimable() == [job]


def test_a_long_backlog_gives_others_their_turn_after_each_page(parts, monkeypatch):
    monkeypatch.setattr("headrace.gateway.upkeep.PAGE", 2)
    for _ in range(5):
        parts.accept()
    turns = []
    parts.upkeep.relay(older_than_s=0, meanwhile=lambda: turns.append("relay"))
    parts.upkeep.sweep(meanwhile=lambda: turns.append("sweep"))
    assert turns == ["relay"] * 3 + ["sweep"] * 3
