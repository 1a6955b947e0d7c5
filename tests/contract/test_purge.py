"""The rows of a purge: what never ran and nothing else, page by page, beside other writers."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from headrace.contract.database import connect
from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.purge import Purge
from headrace.contract.records import jobs
from headrace.contract.specs import end_of
from headrace.contract.wire import FinishReason, JobStatus

ALL = {"job_class": None, "tenant_id": None, "after": "", "limit": 100}


@pytest.fixture
def model(request):
    return f"model of {request.node.name}"


@pytest.fixture
def purge(engine):
    return Purge(engine)


def test_a_page_holds_what_waits_and_never_ran(purge, ledger, accept, model):
    waiting, running, handed_back, ended = (accept(model=model) for _ in range(4))
    other = accept(model=model + " too")
    ledger.pick_up([running, handed_back], "w1")
    ledger.hand_back(handed_back, 1)
    ledger.request_cancel(ended, tenant_id=ledger.job(ended)["tenant_id"])
    (row,) = purge.cancel_page(model=model, **ALL)
    assert row["id"] == waiting
    found = ledger.job(waiting)
    assert (found["status"], found["finish_reason"]) == (JobStatus.CANCELED, FinishReason.CANCELED)
    assert found["finished_at"] is not None
    assert found["cancel_requested_at"] is not None
    assert end_of(row) == end_of(found), "the page tells the end without reading the row again"
    assert ledger.job(handed_back)["status"] == JobStatus.QUEUED
    assert ledger.job(other)["status"] == JobStatus.QUEUED
    assert purge.cancel_page(model=model, **ALL) == []


def test_class_and_tenant_narrow_it(purge, ledger, accept, model):
    batch, mine = accept(model=model, job_class="batch"), accept(model=model)
    tenant = ledger.job(mine)["tenant_id"]
    assert purge.cancel_page(model=model, **ALL | {"tenant_id": "tenant_none"}) == []
    page = purge.cancel_page(model=model, **ALL | {"job_class": "batch", "tenant_id": tenant})
    assert [row["id"] for row in page] == [batch]


def test_invariant_2_pages_go_by_id(purge, accept, model):
    accepted = [accept(model=model) for _ in range(5)]
    first = purge.cancel_page(model=model, **ALL | {"limit": 2})
    later = purge.cancel_page(model=model, **ALL | {"limit": 9, "after": first[-1]["id"]})
    assert [row["id"] for row in [*first, *later]] == sorted(accepted)


def test_invariant_1_a_job_that_is_picked_up_meanwhile_is_left_alone(
    purge, ledger, accept, engine, model
):
    taken, left = accept(model=model), accept(model=model)
    with engine.begin() as other:
        other.execute(select(jobs.c.id).where(jobs.c.id == taken).with_for_update())
        page = purge.cancel_page(model=model, **ALL)
    assert [row["id"] for row in page] == [left]
    assert ledger.job(taken)["status"] == JobStatus.QUEUED


def test_a_postgres_that_is_away_is_database_unavailable():
    away = Purge(connect("postgresql+psycopg://u:p@127.0.0.1:1/none"))
    with pytest.raises(DatabaseUnavailable):
        away.cancel_page(model="m", **ALL)
