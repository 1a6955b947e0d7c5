"""The transactions on jobs, on a real Postgres: every transition, and every forbidden one."""

from __future__ import annotations

import threading
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from headrace.contract.database import connect
from headrace.contract.errors import DatabaseUnavailable, IdempotencyMismatch
from headrace.contract.ledger import Cancel, Ending, Finish, Ledger
from headrace.contract.records import attempts, idempotency_keys, jobs, outbox
from headrace.contract.timings import Timings
from headrace.contract.wire import FinishReason, JobStatus

DONE = Ending(
    status=JobStatus.SUCCEEDED,
    finish_reason=FinishReason.STOP,
    prompt_tokens=3,
    cached_tokens=1,
    gen=0,
    text="Hé",
    token_ids=(7, 8),
    ends=(1, 2),
    logprobs=[[-0.5, []], [-1.0, []]],
)
TERMINAL = [s for s in JobStatus if s.is_terminal]


@pytest.fixture
def in_state(ledger, accept):
    """Return a function that brings a fresh job into a state; running means attempt 1 of w1."""

    def make(status):
        job = accept(deadline_at=datetime.now(UTC) - timedelta(seconds=1))
        tenant = ledger.job(job)["tenant_id"]
        if status == JobStatus.CANCELED:
            assert ledger.request_cancel(job, tenant_id=tenant) == Cancel.CANCELED
        elif status == JobStatus.EXPIRED:
            assert job in [row["id"] for row in ledger.expire_queued(limit=1000)]
        elif status != JobStatus.QUEUED:
            assert ledger.pick_up([job], "w1")[job].attempt == 1
            if status != JobStatus.RUNNING:
                assert ledger.finish(job, 1, Ending(status, FinishReason.STOP)) == Finish.DONE
        return job

    return make


def status_of(ledger, job):
    return ledger.job(job)["status"]


# -- accept ----------------------------------------------------------------------------------


def test_invariant_1_accepted_means_durable(ledger, new_row, engine):
    row = new_row()
    accepted = ledger.accept_job(row, idempotency_key=None, request_sha256=b"")
    assert not accepted.is_replay
    with engine.connect() as db:
        assert db.execute(select(outbox.c.job_id).where(outbox.c.job_id == row["id"])).all()
    kept = ledger.job(row["id"])
    assert {key: kept[key] for key in row} == row
    assert (kept["status"], kept["attempt"]) == ("queued", 0)
    assert dict(accepted.job) == dict(kept)


def test_the_same_request_under_the_same_key_is_the_same_job(ledger, new_row):
    first, second = new_row(), new_row()
    one = ledger.accept_job(first, idempotency_key="k", request_sha256=b"x")
    two = ledger.accept_job(second, idempotency_key="k", request_sha256=b"x")
    assert (two.job["id"], two.is_replay) == (first["id"], True)
    assert two.job["sampling"] == one.job["sampling"]
    assert ledger.job(second["id"]) is None
    with pytest.raises(IdempotencyMismatch, match=first["id"]):
        ledger.accept_job(new_row(), idempotency_key="k", request_sha256=b"y")


def test_a_key_is_the_tenants_own(ledger, new_row, accounts):
    other = accounts.create_key(tenant="another", name="k")
    one = ledger.accept_job(new_row(), idempotency_key="k", request_sha256=b"x")
    theirs = new_row(tenant_id=other.tenant_id, key_id=other.id)
    two = ledger.accept_job(theirs, idempotency_key="k", request_sha256=b"y")
    assert not one.is_replay
    assert not two.is_replay


def test_concurrent_requests_with_one_key_make_one_job(ledger, new_row):
    rows = [new_row() for _ in range(6)]
    barrier, found, failed = threading.Barrier(len(rows)), [], []

    def accept(row):
        try:
            barrier.wait(10)
            found.append(ledger.accept_job(row, idempotency_key="same", request_sha256=b"x"))
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            failed.append(error)

    threads = [threading.Thread(target=accept, args=(row,)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    assert len({a.job["id"] for a in found}) == 1
    assert sorted(a.is_replay for a in found) == [False] + [True] * (len(rows) - 1)


def test_a_job_of_no_tenant_is_not_accepted(ledger, new_row):
    row = new_row(tenant_id="tenant_none")
    with pytest.raises(IntegrityError):
        ledger.accept_job(row, idempotency_key="k", request_sha256=b"")
    assert ledger.job(row["id"]) is None


# -- pick up ---------------------------------------------------------------------------------


def test_invariant_2_attempts_only_grow(ledger, accept, engine):
    job = accept()
    assert [ledger.pick_up([job], w)[job].attempt for w in ("w1", "w2", "w1")] == [1, 2, 3]
    kept = ledger.job(job)
    assert (kept["status"], kept["worker"], kept["attempt"]) == ("running", "w1", 3)
    assert ledger.hand_back(job, 3)
    assert ledger.pick_up([job], "w4")[job].attempt == 4
    assert ledger.job(job)["started_at"] == kept["started_at"]
    with engine.connect() as db:
        rows = db.execute(select(attempts).where(attempts.c.job_id == job).order_by("number")).all()
    assert [(r.number, r.worker, r.outcome) for r in rows] == [
        (1, "w1", None),
        (2, "w2", None),
        (3, "w1", "handed_back"),
        (4, "w4", None),
    ]


def test_two_workers_that_pick_up_at_once_get_different_attempts(ledger, accept):
    names = [accept() for _ in range(5)]
    barrier, found = threading.Barrier(2), []

    def pick_up(worker):
        barrier.wait(10)
        found.append(ledger.pick_up(names, worker))

    threads = [threading.Thread(target=pick_up, args=(worker,)) for worker in ("w1", "w2")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 2
    for name in names:
        assert sorted(picks[name].attempt for picks in found) == [1, 2]


@pytest.mark.parametrize("status", TERMINAL)
def test_what_has_ended_is_not_picked_up(ledger, in_state, status):
    job = in_state(status)
    attempt = ledger.job(job)["attempt"]
    pick_up = ledger.pick_up([job], "w9")[job]
    assert (pick_up.attempt, pick_up.status, pick_up.is_canceled) == (None, status, False)
    assert ledger.job(job)["attempt"] == attempt


def test_a_pickup_tells_missing_canceled_and_ended_apart(ledger, accept, in_state):
    fresh, ended, canceled = accept(), in_state(JobStatus.FAILED), in_state(JobStatus.RUNNING)
    ledger.request_cancel(canceled, tenant_id=ledger.job(canceled)["tenant_id"])
    found = ledger.pick_up([fresh, "job_none", ended, canceled], "w2")
    assert found["job_none"] is None
    assert found[fresh].attempt == 1
    assert not found[fresh].is_canceled
    assert found[ended].attempt is None
    assert (found[canceled].attempt, found[canceled].is_canceled) == (2, True)
    assert ledger.pick_up([], "w2") == {}


# -- finish ----------------------------------------------------------------------------------


def test_invariant_3_a_job_ends_once(ledger, in_state, engine):
    job = in_state(JobStatus.RUNNING)
    assert ledger.finish(job, 1, DONE) == Finish.DONE
    kept = ledger.job(job)
    assert kept["finished_at"] is not None
    assert kept["output_text"] == "Hé"
    assert (kept["output_token_ids"], kept["output_ends"]) == ([7, 8], [1, 2])
    assert kept["output_logprobs"] == [[-0.5, []], [-1.0, []]]
    assert (kept["prompt_tokens"], kept["cached_tokens"], kept["output_gen"]) == (3, 1, 0)
    assert ledger.finish(job, 1, DONE) == Finish.REPEATED
    assert ledger.finish(job, 1, Ending(JobStatus.FAILED, FinishReason.ERROR)) == Finish.STALE
    assert ledger.job(job) == kept
    with engine.connect() as db:
        row = db.execute(select(attempts).where(attempts.c.job_id == job)).one()
    assert row.outcome == "succeeded"
    assert row.ended_at is not None


def test_invariant_5_a_stale_attempt_cannot_finish(ledger, in_state):
    job = in_state(JobStatus.RUNNING)
    ledger.pick_up([job], "w2")
    assert ledger.finish(job, 1, DONE) == Finish.STALE
    assert not ledger.hand_back(job, 1)
    assert status_of(ledger, job) == "running"
    assert ledger.finish(job, 2, DONE) == Finish.DONE
    assert ledger.finish(job, 1, DONE) == Finish.STALE
    assert ledger.finish("job_none", 1, DONE) == Finish.STALE


@pytest.mark.parametrize("status", [JobStatus.QUEUED, *TERMINAL])
def test_only_a_running_job_is_finished_or_handed_back(ledger, in_state, status):
    job = in_state(status)
    before = ledger.job(job)
    other = JobStatus.FAILED if status != JobStatus.FAILED else JobStatus.SUCCEEDED
    ending = Ending(other, FinishReason.ERROR)
    assert ledger.finish(job, before["attempt"], ending) == Finish.STALE
    assert not ledger.hand_back(job, before["attempt"])
    assert ledger.job(job) == before


def test_a_job_handed_back_is_queued_and_nobodys(ledger, in_state):
    job = in_state(JobStatus.RUNNING)
    assert ledger.hand_back(job, 1)
    kept = ledger.job(job)
    assert (kept["status"], kept["worker"], kept["attempt"]) == ("queued", None, 1)
    assert not ledger.hand_back(job, 1)


# -- cancel and expire -----------------------------------------------------------------------


def test_cancel_ends_a_queued_job_and_marks_a_running_one(ledger, in_state):
    queued, running = in_state(JobStatus.QUEUED), in_state(JobStatus.RUNNING)
    tenant = ledger.job(queued)["tenant_id"]
    assert ledger.request_cancel(queued, tenant_id=tenant) == Cancel.CANCELED
    assert (status_of(ledger, queued), ledger.job(queued)["finish_reason"]) == ("canceled",) * 2
    assert ledger.request_cancel(running, tenant_id=tenant) == Cancel.REQUESTED
    asked_at = ledger.job(running)["cancel_requested_at"]
    assert ledger.request_cancel(running, tenant_id=tenant) == Cancel.REQUESTED
    assert ledger.job(running)["cancel_requested_at"] == asked_at
    assert status_of(ledger, running) == "running"


@pytest.mark.parametrize("status", TERMINAL)
def test_cancel_of_what_has_ended_changes_nothing(ledger, in_state, status):
    job = in_state(status)
    before = ledger.job(job)
    assert ledger.request_cancel(job, tenant_id=before["tenant_id"]) == Cancel.ENDED
    assert ledger.job(job) == before


def test_another_tenants_job_is_missing_everywhere(ledger, in_state):
    job = in_state(JobStatus.QUEUED)
    assert ledger.request_cancel(job, tenant_id="tenant_other") == Cancel.MISSING
    assert ledger.request_cancel("job_none", tenant_id="tenant_other") == Cancel.MISSING
    assert ledger.job(job, tenant_id="tenant_other") is None
    assert ledger.summary(job, tenant_id="tenant_other") is None
    assert ledger.list_jobs("tenant_other", limit=10) == []
    assert status_of(ledger, job) == "queued"


def test_expiry_ends_what_is_queued_and_overdue_and_nothing_else(ledger, accept, in_state):
    overdue, running = in_state(JobStatus.QUEUED), in_state(JobStatus.RUNNING)
    patient = accept()
    later = accept(deadline_at=datetime.now(UTC) + timedelta(hours=1))
    rows = {row["id"]: row for row in ledger.expire_queued(limit=1000)}
    assert overdue in rows
    assert not rows.keys() & {running, patient, later}
    kept = ledger.job(overdue)
    assert (kept["status"], kept["error_code"]) == ("expired", "deadline_exceeded")
    assert kept["finish_reason"] == "expired"
    assert overdue not in [row["id"] for row in ledger.expire_queued(limit=1000)]


def test_a_job_that_was_handed_back_is_ended_with_its_output(ledger, in_state):
    job = in_state(JobStatus.RUNNING)
    tenant = ledger.job(job)["tenant_id"]
    ledger.hand_back(job, 1)
    assert job not in [row["id"] for row in ledger.expire_queued(limit=1000)]
    assert job in [row["id"] for row in ledger.overdue_resumable(limit=1000)]
    assert ledger.request_cancel(job, tenant_id=tenant) == Cancel.REQUESTED
    ending = Ending(
        JobStatus.CANCELED, FinishReason.CANCELED, text="ab", token_ids=(1, 2), ends=(1, 2)
    )
    assert not ledger.end_queued(job, 0, ending)
    assert ledger.end_queued(job, 1, ending)
    kept = ledger.job(job)
    assert (kept["status"], kept["output_text"]) == ("canceled", "ab")
    assert not ledger.end_queued(job, 1, ending)
    assert ledger.request_cancel(job, tenant_id=tenant) == Cancel.ENDED


def test_a_handed_back_job_that_is_running_again_is_not_ended_as_queued(ledger, in_state):
    job = in_state(JobStatus.RUNNING)
    ending = Ending(JobStatus.EXPIRED, FinishReason.EXPIRED)
    assert not ledger.end_queued(job, 1, ending)
    assert job not in [row["id"] for row in ledger.overdue_resumable(limit=1000)]
    ledger.hand_back(job, 1)
    ledger.pick_up([job], "w2")
    assert not ledger.end_queued(job, 1, ending)
    assert status_of(ledger, job) == "running"


def test_expiry_is_bounded(ledger, in_state):
    for _ in range(3):
        in_state(JobStatus.QUEUED)
    assert len(ledger.expire_queued(limit=2)) == 2


def test_the_database_itself_refuses_an_ending_without_a_time(engine, in_state):
    job = in_state(JobStatus.QUEUED)
    for status in ("succeeded", "sleeping"):
        with pytest.raises(IntegrityError), engine.begin() as db:
            db.execute(update(jobs).where(jobs.c.id == job).values(status=status))


# -- lists, outbox, retention ----------------------------------------------------------------


def test_lists_are_newest_first_filtered_and_paged(ledger, accept, in_state):
    names = [accept(job_class="batch", model="m1") for _ in range(3)]
    done = in_state(JobStatus.SUCCEEDED)
    tenant = ledger.job(done)["tenant_id"]
    everything = [row["id"] for row in ledger.list_jobs(tenant, limit=10)]
    assert everything == [done, *reversed(names)]
    assert [r["id"] for r in ledger.list_jobs(tenant, limit=2, before=done)] == names[:0:-1]
    assert [r["id"] for r in ledger.list_jobs(tenant, limit=9, status=["succeeded"])] == [done]
    assert len(ledger.list_jobs(tenant, limit=9, job_class="batch")) == 3
    assert len(ledger.list_jobs(tenant, limit=9, model="m1", status=["queued", "failed"])) == 3
    assert ledger.list_jobs(tenant, limit=9, model="m2") == []
    assert "output_text" not in ledger.list_jobs(tenant, limit=1)[0]
    summary = ledger.summary(done, tenant_id=tenant)
    assert summary is not None
    assert "output_text" not in summary


def test_the_outbox_holds_a_job_until_it_is_confirmed(ledger, accept, engine):
    with engine.begin() as db:
        db.execute(delete(outbox))
    first, second = accept(), accept()
    assert [r["id"] for r in ledger.outbox_jobs(older_than_s=0, limit=9)] == [first, second]
    assert [r["id"] for r in ledger.outbox_jobs(older_than_s=0, limit=1)] == [first]
    assert ledger.outbox_jobs(older_than_s=3600, limit=9) == []
    ledger.outbox_done([first])
    ledger.outbox_done([first])
    ledger.outbox_done([])
    assert [r["id"] for r in ledger.outbox_jobs(older_than_s=0, limit=9)] == [second]


def test_ended_jobs_are_found_by_the_age_of_their_end(ledger, in_state):
    ended, running = in_state(JobStatus.SUCCEEDED), in_state(JobStatus.RUNNING)
    found = [r["id"] for r in ledger.ended_jobs(older_than_s=0, newer_than_s=60)]
    assert ended in found
    assert running not in found
    assert ledger.ended_jobs(older_than_s=60, newer_than_s=120) == []


def test_open_jobs_are_walked_in_order_of_age(ledger, in_state):
    queued, ended, running = (
        in_state(s) for s in (JobStatus.QUEUED, JobStatus.FAILED, JobStatus.RUNNING)
    )
    found = [r["id"] for r in ledger.open_jobs(after="", limit=10_000)]
    assert found == sorted(found)
    assert {queued, running} <= set(found)
    assert ended not in found
    assert [r["id"] for r in ledger.open_jobs(after=queued, limit=1)] == [running]


def test_retention_deletes_what_ended_long_ago_with_all_that_hangs_on_it(
    ledger, in_state, new_row, engine
):
    row = new_row()
    ledger.accept_job(row, idempotency_key="k", request_sha256=b"")
    ledger.pick_up([row["id"]], "w1")
    ledger.finish(row["id"], 1, DONE)
    recent, running = in_state(JobStatus.SUCCEEDED), in_state(JobStatus.RUNNING)
    long_ago = datetime.now(UTC) - timedelta(days=40)
    with engine.begin() as db:
        db.execute(update(jobs).where(jobs.c.id == row["id"]).values(finished_at=long_ago))
    before = datetime.now(UTC) - timedelta(days=30)
    assert ledger.delete_ended(before=before, limit=10) == 1
    assert ledger.delete_ended(before=before, limit=10) == 0
    assert ledger.job(row["id"]) is None
    assert ledger.job(recent) is not None
    assert ledger.job(running) is not None
    with engine.connect() as db:
        for table in (attempts, outbox, idempotency_keys):
            count = select(func.count()).select_from(table).where(table.c.job_id == row["id"])
            assert db.execute(count).scalar_one() == 0
    again = ledger.accept_job(new_row(), idempotency_key="k", request_sha256=b"other")
    assert not again.is_replay


# -- away ------------------------------------------------------------------------------------


def test_a_postgres_that_is_away_is_database_unavailable(new_row):
    engine = connect("postgresql+psycopg://postgres:x@127.0.0.1:1/headrace")
    ledger, row = Ledger(engine), new_row()
    calls = [
        lambda: ledger.accept_job(row, idempotency_key=None, request_sha256=b""),
        lambda: ledger.job("job"),
        lambda: ledger.summary("job", tenant_id="t"),
        lambda: ledger.list_jobs("t", limit=1),
        lambda: ledger.request_cancel("job", tenant_id="t"),
        lambda: ledger.pick_up(["job"], "w"),
        lambda: ledger.finish("job", 1, DONE),
        lambda: ledger.hand_back("job", 1),
        lambda: ledger.outbox_jobs(older_than_s=1, limit=1),
        lambda: ledger.outbox_done(["job"]),
        lambda: ledger.open_jobs(after="", limit=1),
        lambda: ledger.expire_queued(limit=1),
        lambda: ledger.delete_ended(before=datetime.now(UTC), limit=1),
        ledger.ping,
    ]
    for call in calls:
        with pytest.raises(DatabaseUnavailable) as caught:
            call()
        assert caught.value.retry_after_s == 1
    engine.dispose()


def test_a_ledger_goes_on_after_its_connections_were_cut(ledger, accept, engine, database_url):
    job = accept()
    with engine.connect() as db:  # the connection that the pool hands out next
        cut = db.execute(select(func.pg_backend_pid())).scalar_one()
    other_engine = connect(database_url)
    with other_engine.connect() as other:
        assert other.execute(select(func.pg_terminate_backend(cut))).scalar_one()
    other_engine.dispose()
    assert ledger.job(job) is not None


# -- where the time went ---------------------------------------------------------------------


def timings_of(engine, job):
    columns = [attempts.c[name] for name in asdict(TOLD)]
    with engine.connect() as db:
        rows = db.execute(
            select(*columns).where(attempts.c.job_id == job).order_by(attempts.c.number)
        )
        return [tuple(row) for row in rows]


TOLD = Timings(admitted_ms=5, first_token_ms=40, last_token_ms=90, resumed_at=3, num_tokens=7)


def test_an_ending_and_a_hand_back_keep_what_the_worker_measured(ledger, accept, engine):
    job = accept()
    ledger.pick_up([job], "w1")
    assert ledger.hand_back(job, 1, TOLD)
    ledger.pick_up([job], "w2")
    ledger.pick_up([job], "w3")  # w2 died and told nothing
    canceled = Timings(None, None, None, resumed_at=10, num_tokens=0)
    assert ledger.finish(job, 3, DONE, canceled) is Finish.DONE
    nothing = (None,) * 5
    assert timings_of(engine, job) == [(5, 40, 90, 3, 7), nothing, (None, None, None, 10, 0)]


def test_a_refused_result_changes_no_timings(ledger, accept, engine):
    job = accept()
    ledger.pick_up([job], "w1")
    ledger.pick_up([job], "w2")
    assert ledger.finish(job, 1, DONE, TOLD) is Finish.STALE
    assert not ledger.hand_back(job, 1, TOLD)
    assert timings_of(engine, job) == [(None,) * 5] * 2
