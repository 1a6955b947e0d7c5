"""The audit log on a real Postgres: what a row may hold, and in which order they are read."""

from __future__ import annotations

import pytest

from headrace.contract.accounts import Accounts
from headrace.contract.audit import BEGUN, DONE, MAX_DETAILS_BYTES, Audit, Entry
from headrace.contract.database import connect
from headrace.contract.errors import DatabaseUnavailable


@pytest.fixture(scope="module")
def audit(engine) -> Audit:
    return Audit(engine)


def entry(**changes) -> Entry:
    fields = {"actor": "ada", "actor_kind": "operator", "role": "admin", "action": "key.create"}
    return Entry(**(fields | {"address": "10.0.0.1"} | changes))


def newest(audit: Audit) -> dict:
    return dict(audit.page(limit=1)[0])


def test_a_row_is_there_before_the_action_and_complete_after_it(audit):
    row_id = audit.begin(entry(target="before"))
    row = newest(audit)
    assert (row["id"], row["outcome"], row["target"]) == (row_id, BEGUN, "before")
    audit.end(row_id, "conflict", "after", {"num_jobs": 3})
    row = newest(audit)
    assert (row["id"], row["outcome"], row["target"]) == (row_id, "conflict", "after")
    assert row["details"] == {"num_jobs": 3}
    assert (row["actor"], row["role"], row["address"]) == ("ada", "admin", "10.0.0.1")


def test_invariant_2_texts_are_such_as_a_row_can_hold(audit):
    odd = "a\x00b\ud800c"
    plain = "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    audit.write(
        entry(actor=odd, target=odd * 100, address=odd, details={odd: [odd, {"x": odd}]}), DONE
    )
    row = newest(audit)
    assert (row["actor"], row["address"]) == (plain, plain)
    assert row["target"] == (plain * 100)[:200]
    assert row["details"] == {plain: [plain, {"x": plain}]}


def test_invariant_2_details_that_are_too_large_are_left_out(audit):
    audit.write(entry(details={"text": "ä" * MAX_DETAILS_BYTES}), DONE)
    assert set(newest(audit)["details"]) == {"left_out"}


def test_invariant_2_a_key_in_a_text_is_cut_to_its_prefix(audit, engine):
    key = Accounts(engine).create_key(tenant="t", name="n").secret
    audit.write(entry(target=f"a {key} b", details={"key": key}), DONE)
    row = newest(audit)
    prefix = key.rpartition("_")[0]
    assert row["target"] == f"a {prefix}_... b"
    assert row["details"] == {"key": f"{prefix}_..."}


def test_rows_are_read_newest_first_from_where_a_page_ended(audit):
    ids = [audit.write(entry(actor="pages", target=str(n)), DONE) for n in range(5)]
    first = audit.page(limit=3, actor="pages")
    assert [row["id"] for row in first] == ids[:1:-1]
    rest = audit.page(limit=3, actor="pages", before=first[-1]["id"])
    assert [row["id"] for row in rest] == ids[1::-1]


def test_a_postgres_that_is_away_is_database_unavailable():
    engine = connect("postgresql+psycopg://postgres:x@127.0.0.1:1/headrace")
    audit = Audit(engine)
    for call in (
        lambda: audit.begin(entry()),
        lambda: audit.end(1, DONE, "", {}),
        lambda: audit.page(limit=1),
    ):
        with pytest.raises(DatabaseUnavailable):
            call()
    engine.dispose()
