"""Intake on real stores: what becomes of an entry between claim and engine."""

import time

import pytest

from headrace.contract import keys, wire
from headrace.contract.ledger import Ending
from headrace.contract.wire import FinishReason, JobStatus
from headrace.tests.worker.conftest import END, MODEL


def test_invariant_5_it_begins_paused_and_rests_when_no_claim_is_in_hand(bench):
    bench.accept()
    intake = bench.intake
    assert not intake._claim_unless_paused()
    assert (bench.delivered, intake.is_resting) == ([], True)
    intake.resume()
    assert intake.bell.is_set(), "what waits is claimed at once"
    assert intake._claim_unless_paused()
    assert len(bench.delivered) == 1
    assert not intake.is_resting, "the next claim may come at any time"


def test_invariant_5_a_pause_in_the_middle_of_a_claim_rests_after_it(bench):
    bench.accept()
    resting = []

    def deliver(job):
        bench.intake.pause()
        resting.append(bench.intake.is_resting)

    bench.intake._deliver = deliver
    bench.intake.resume()
    bench.intake._claim_unless_paused()
    assert resting == [False]
    assert bench.intake.is_resting


def test_a_claimed_job_is_running_held_fenced_and_tokenised(bench):
    job_id = bench.accept()
    (job,) = bench.claim()
    assert (job.attempt, job.gen, job.prompt_ids) == (
        1,
        0,
        bench.prompts.encode("abc", add_special_tokens=False),
    )
    assert job.stop_token_ids == (END,)
    assert bench.row(job_id)["status"] == JobStatus.RUNNING
    assert bench.held.pairs() == [(job_id, 1)]
    assert bench.room.left() == (10_000 - 13, 7)


def test_invariant_1_nothing_is_claimed_beyond_the_room(bench):
    for _ in range(3):
        bench.accept()
    bench.room.reported(room_tokens=27, num_admits=0)
    assert len(bench.claim()) == 2
    assert bench.claim() == []
    assert bench.num_entries() == 3, "the third waits in its lane"


def test_without_an_engine_nothing_is_claimed(bench):
    bench.accept()
    bench.room.closed()
    assert bench.claim() == []


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"prompt": "x" * 91}, "prompt_too_long"),
        ({"prompt": ""}, "engine_refused"),
        ({"messages": [{"role": "system", "content": "x"}]}, "chat_template_refused"),
    ],
)
def test_what_cannot_be_tokenised_fails_without_the_engine(bench, given, code):
    job_id = bench.accept(given=given)
    (job,) = bench.claim()
    assert job.ending is not None
    bench.settle(job)
    row = bench.row(job_id)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, code)
    end = bench.tokens.read(MODEL, job_id).end
    assert end is not None
    assert (end.status, end.error_code) == (JobStatus.FAILED, code)
    assert bench.num_entries() == 0
    assert bench.held.pairs() == []


def test_an_entry_that_cannot_be_read_fails_its_job(bench):
    job_id = bench.accept()
    (claim,) = bench.streams.claim(
        MODEL, "w0", lease_ms=1, room_tokens=100, max_jobs=1, is_idle=True
    ).claims
    stream = keys.lane_stream(MODEL, claim.lane)
    bench.client.delete(stream)
    bench.client.xgroup_create(stream, keys.GROUP, "0", mkstream=True)
    entry = bench.client.xadd(stream, {"job": job_id, "spec": b"\xc1 garbage", "cost": 13})
    bench.client.hset(keys.job_hash(MODEL, job_id), "entry", entry)
    bench.client.sadd(keys.prefix(MODEL) + "lanes", claim.lane)
    (job,) = bench.claim()
    bench.settle(job)
    assert bench.row(job_id)["error_code"] == "wire"


def test_a_takeover_resumes_after_the_logged_tokens(bench):
    job_id = bench.accept()
    (first,) = bench.claim()
    bench.tokens.append(MODEL, [("t", bench.chunk(job_id, 1, 0, "hel"))])
    bench.streams.hand_back(MODEL, job_id, first.attempt)
    (second,) = bench.claim()
    assert (second.attempt, second.num_logged, "".join(second.pieces)) == (2, 3, "hel")
    assert second.ending is None


def test_a_takeover_of_a_complete_output_ends_it_without_the_engine(bench):
    job_id = bench.accept(max_tokens=3)
    (first,) = bench.claim()
    bench.tokens.append(MODEL, [("t", bench.chunk(job_id, 1, 0, "hel"))])
    bench.streams.hand_back(MODEL, job_id, first.attempt)
    (second,) = bench.claim()
    assert second.ending is not None
    bench.settle(second)
    row = bench.row(job_id)
    assert (row["status"], row["finish_reason"]) == (JobStatus.SUCCEEDED, FinishReason.LENGTH)
    assert row["output_text"] == "hel"


def test_a_job_that_ended_before_its_worker_could_say_so_is_told_and_dropped(bench):
    job_id = bench.accept()
    (job,) = bench.claim()
    ending = Ending(
        status=JobStatus.SUCCEEDED,
        finish_reason=FinishReason.STOP,
        text="x",
        token_ids=(1,),
        ends=(1,),
    )
    bench.ledger.finish(job_id, job.attempt, ending)
    bench.streams.hand_back(MODEL, job_id, job.attempt)
    assert bench.claim() == []
    end = bench.tokens.read(MODEL, job_id).end
    assert isinstance(end, wire.JobEnd)
    assert (end.status, end.next) == (JobStatus.SUCCEEDED, 1)
    assert bench.num_entries() == 0


def test_a_cancellation_asked_before_the_pickup_ends_the_job(bench):
    job_id = bench.accept()
    bench.streams.cancel(MODEL, job_id)
    (job,) = bench.claim()
    assert job.ending is not None
    assert job.ending.status is JobStatus.CANCELED


def test_a_started_job_says_how_long_it_had_waited_by_postgres_clock(bench):
    before = time.monotonic()
    job_id = bench.accept()
    row = bench.row(job_id)
    (job,) = bench.claim()
    assert before <= job.stamps.claimed_at <= job.stamps.picked_up_at <= time.monotonic()
    waited_s = (bench.row(job_id)["started_at"] - row["created_at"]).total_seconds()
    assert job.stamps.waited_s == pytest.approx(waited_s, abs=1e-5)
    assert not job.stamps.was_lost


def test_a_takeover_counts_the_time_of_the_dead_attempt_and_a_hand_back_does_not(bench):
    lost, handed_back = bench.accept(), bench.accept()
    bench.ledger.pick_up([lost, handed_back], "w0")
    assert bench.ledger.hand_back(handed_back, 1)
    by_id = {job.job: job.stamps for job in bench.claim()}
    assert by_id[lost].was_lost
    assert not by_id[handed_back].was_lost
    assert 0 < by_id[handed_back].waited_s < by_id[lost].waited_s < 60


def refused(bench, at: str) -> float:
    series = "headrace_worker_stale_writes_total"
    return bench.metrics.registry.get_sample_value(series, {"at": at}) or 0.0


def test_a_fence_that_a_newer_attempt_refuses_is_counted(bench, monkeypatch):
    job_id = bench.accept()
    pick_up = bench.ledger.pick_up

    def overtaken(jobs, worker):
        found = pick_up(jobs, worker)
        bench.tokens.fence(MODEL, job_id, 2, "w2")
        return found

    monkeypatch.setattr(bench.ledger, "pick_up", overtaken)
    assert bench.claim() == []
    assert refused(bench, "fence") == 1


def test_a_start_that_a_newer_attempt_makes_stale_is_not_published_and_counted(bench, monkeypatch):
    job_id = bench.accept()
    fence = bench.tokens.fence

    def overtaken(*asked):
        found = fence(*asked)
        fence(MODEL, job_id, 2, "w2")
        return found

    monkeypatch.setattr(bench.tokens, "fence", overtaken)
    assert len(bench.claim()) == 1
    assert refused(bench, "publish") == 1


def test_invariant_4_after_an_outage_only_what_was_handed_back_is_taken_over(bench):
    lapsed, back = bench.accept(), bench.accept()
    bench.streams.claim(MODEL, "w0", lease_ms=60_000, room_tokens=99, max_jobs=2, is_idle=True)
    for job in (lapsed, back):
        bench.tokens.fence(MODEL, job, bench.ledger.pick_up([job], "w0")[job].attempt, "w0")
    bench.intake._lease_ms = 300
    bench.intake.redis_was_away()
    assert bench.ledger.hand_back(back, 1)
    assert bench.streams.hand_back(MODEL, back, 1)
    while time.monotonic() < bench.intake._may_take_over_at - 0.05:
        assert {job.job for job in bench.claim()} <= {back}
    deadline = time.monotonic() + 30
    while lapsed not in {job.job for job in bench.claim()}:
        assert time.monotonic() < deadline, "taken over once a lease has passed"
