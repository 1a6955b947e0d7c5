"""Labels on a real Postgres: each way of making a job writes them, and they end with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, select, text
from sqlalchemy.exc import IntegrityError

from headrace.contract import labels
from headrace.contract.job_edits import JobEdits
from headrace.contract.labels import LABEL, NUM_BYTES, label_of
from headrace.contract.ledger import Ending
from headrace.contract.records import job_labels, jobs
from headrace.contract.wire import FinishReason, JobStatus

ENTRIES = [
    ("env", "prod"),
    ("env", ""),
    ("größe ", "😀 e\u0300"),
    ("x" * 64, "y" * 512),
    ("'\"\\", "\\x00 \n\t"),
    ("a:b", "c"),
]


@pytest.fixture
def labels_of(engine):
    """Return a function that reads a job's labels."""

    def read(job_id: str) -> set[bytes]:
        query = select(job_labels.c.label).where(job_labels.c.job_id == job_id)
        with engine.connect() as db:
            return {bytes(label) for label in db.execute(query).scalars()}

    return read


@pytest.mark.parametrize("entry", ENTRIES)
def test_python_and_postgres_make_the_same_label(engine, entry):
    with engine.connect() as db:
        query = text(
            "SELECT "
            + LABEL.replace("::bytea", "\\:\\:bytea")
            + " FROM (SELECT CAST(:key AS text) AS key, CAST(:value AS text) AS value) AS entry"
        )
        found = db.execute(query, {"key": entry[0], "value": entry[1]}).scalar_one()
    assert bytes(found) == label_of(*entry)
    assert len(found) == NUM_BYTES


def test_where_a_name_ends_matters():
    assert label_of("ab", "c") != label_of("a", "bc")


@pytest.mark.parametrize("key", [None, "some-key"])
def test_invariant_1_an_accepted_job_has_a_label_for_each_entry(ledger, new_row, labels_of, key):
    row = new_row(meta=dict(ENTRIES))
    ledger.accept_job(row, idempotency_key=key, request_sha256=b"")
    assert labels_of(row["id"]) == {label_of(*entry) for entry in dict(ENTRIES).items()}


def test_a_job_that_is_refused_leaves_no_labels(ledger, new_row, labels_of):
    row = new_row(key_id="key_of_nobody")
    with pytest.raises(IntegrityError):
        ledger.accept_job(row, idempotency_key=None, request_sha256=b"")
    assert labels_of(row["id"]) == set()


def test_a_job_without_metadata_is_accepted_without_labels(accept, labels_of):
    assert labels_of(accept(meta={})) == set()


def test_invariant_1_a_job_that_was_made_anew_has_its_labels(engine, ledger, accept, labels_of):
    old = accept(meta=dict(ENTRIES))
    ledger.pick_up([old], "w1")
    ledger.finish(old, 1, Ending(JobStatus.FAILED, FinishReason.ERROR))
    ((_, new),) = JobEdits(engine).retry([old])
    assert labels_of(new) == labels_of(old) != set()


def test_invariant_1_labels_go_with_their_job(ledger, accept, labels_of):
    job = accept(meta=dict(ENTRIES))
    ledger.pick_up([job], "w1")
    ledger.finish(job, 1, Ending(JobStatus.SUCCEEDED, FinishReason.STOP))
    assert labels_of(job)
    ledger.delete_ended(before=datetime.now(UTC) + timedelta(days=1), limit=1000)
    assert ledger.job(job) is None
    assert labels_of(job) == set()


def test_invariant_2_entries_that_share_a_label_are_one_row(engine, accept, labels_of, monkeypatch):
    job = accept(meta=dict(ENTRIES))
    monkeypatch.setattr(labels, "LABEL", "'same'::bytea")
    with engine.begin() as db:
        db.execute(delete(job_labels).where(job_labels.c.job_id == job))
        db.execute(labels.labeling(jobs, jobs.c.id == job))
    assert labels_of(job) == {b"same"}
