"""Edits of many jobs on a real Postgres: what each does, and what it leaves alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from headrace.contract.job_edits import JobEdits
from headrace.contract.ledger import Ending, Finish
from headrace.contract.records import outbox
from headrace.contract.wire import FinishReason, JobStatus

COPIED = ("tenant_id", "key_id", "model", "job_class", "priority", "input", "sampling", "meta")


@pytest.fixture
def edits(engine) -> JobEdits:
    return JobEdits(engine)


@pytest.fixture
def in_state(ledger, accept):
    """Return a function that brings a fresh job into a state."""

    def make(status: JobStatus, **changes) -> str:
        job = accept(**changes)
        if status is not JobStatus.QUEUED:
            ledger.pick_up([job], "w1")
        if status.is_terminal:
            assert ledger.finish(job, 1, Ending(status, FinishReason.ERROR)) is Finish.DONE
        return job

    return make


def test_cancel_ends_what_never_ran_and_marks_what_has(edits, ledger, in_state):
    queued, running, ended = map(
        in_state, (JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.SUCCEEDED)
    )
    handed_back = in_state(JobStatus.RUNNING)
    assert ledger.hand_back(handed_back, 1)
    rows = {row["id"]: row for row in edits.cancel([queued, running, ended, handed_back, "job_0"])}
    assert rows.keys() == {queued, running, handed_back}
    assert rows[queued]["status"] == "canceled"
    assert rows[queued]["finish_reason"] == "canceled"
    assert rows[queued]["finished_at"] is not None
    for job, status in ((running, "running"), (handed_back, "queued")):
        assert (rows[job]["status"], rows[job]["finished_at"]) == (status, None)
        assert rows[job]["cancel_requested_at"] is not None
    assert ledger.job(ended)["status"] == "succeeded"
    again = {row["id"] for row in edits.cancel([queued, running])}
    assert again == {running}


@pytest.mark.parametrize("status", list(JobStatus))
def test_retry_makes_a_new_job_of_what_ended_without_success(edits, ledger, in_state, status):
    old = in_state(status, meta={"a": "b"}, job_class="batch", priority="low")
    made = edits.retry([old])
    if status not in ("failed", "canceled", "expired"):
        assert made == []
        return
    ((from_id, new),) = made
    before, after = ledger.job(old), ledger.job(new)
    assert from_id == old == after["made_from"]
    assert {name: after[name] for name in COPIED} == {name: before[name] for name in COPIED}
    assert (after["status"], after["attempt"], after["worker"]) == ("queued", 0, None)
    assert after["error_code"] is None
    assert after["finished_at"] is None
    assert before["status"] == status
    assert ledger.pick_up([new], "w2")[new].attempt == 1


def test_a_retried_job_is_in_the_outbox_and_has_its_deadline_from_now(
    edits, ledger, in_state, engine
):
    late = in_state(JobStatus.FAILED, deadline_at=datetime.now(UTC) + timedelta(seconds=90))
    ((_, new),) = edits.retry([late])
    row = ledger.job(new)
    assert 80 < (row["deadline_at"] - row["created_at"]).total_seconds() < 91
    with engine.connect() as db:
        assert db.execute(select(outbox.c.id).where(outbox.c.job_id == new)).all()


def test_retry_of_nothing_makes_nothing(edits):
    assert edits.retry([]) == []
    assert edits.retry(["job_none"]) == []


def test_only_queued_jobs_get_another_priority(edits, ledger, in_state):
    jobs = {status: in_state(status) for status in JobStatus}
    rows = edits.set_priority(list(jobs.values()), "high")
    assert [row["id"] for row in rows] == [jobs[JobStatus.QUEUED]]
    assert {s: ledger.job(j)["priority"] for s, j in jobs.items()} == {
        s: "high" if s == "queued" else "normal" for s in JobStatus
    }
    assert len(edits.set_priority([jobs[JobStatus.QUEUED]], "high")) == 1  # safe to repeat


def test_invariant_4_a_row_that_is_locked_is_not_waited_for(edits, ledger, in_state, engine):
    locked, free = in_state(JobStatus.QUEUED), in_state(JobStatus.QUEUED)
    with engine.begin() as db:
        db.exec_driver_sql("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (locked,))
        assert {row["id"] for row in edits.cancel([locked, free])} == {free}
        assert edits.set_priority([locked], "low") == []
    assert ledger.job(locked)["status"] == "queued"
    assert {row["id"] for row in edits.cancel([locked])} == {locked}
