"""Dead letters on a real Postgres: groups, pages, filters, and one replay a letter."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select, update

from headrace.contract.dead_letters import DeadLetters, LetterFilter
from headrace.contract.errors import LetterReplayed, NotFound, Poison
from headrace.contract.ids import new_id
from headrace.contract.job_edits import JobEdits
from headrace.contract.records import dead_letters, jobs, outbox
from headrace.tests.contract.burial import bury

MODEL = "tiny/model: a {b}"
NONE = LetterFilter(signature="no such signature")


@pytest.fixture
def letters(engine) -> DeadLetters:
    return DeadLetters(engine)


@pytest.fixture
def dead(engine, accept):
    """Return a function that makes a dead letter and returns its job's id."""

    def make(signature: str = "", detail: str = "a trace", **changes) -> str:
        return bury(engine, accept(**changes), signature or new_id("sig"), detail)

    return make


def test_a_group_counts_its_letters_and_names_whom_they_concern(letters, dead, engine):
    one = new_id("sig")
    jobs_of_one = [dead(one, f"detail {n}", model=f"m{n % 2}") for n in range(3)]
    other = dead()
    letters.replay(jobs_of_one[0])
    rows = {row["signature"]: row for row in letters.groups(LetterFilter(), limit=100).rows}
    group = rows[one]
    assert (group["num_letters"], group["num_unreplayed"]) == (3, 2)
    assert group["models"] == ["m0", "m1"]
    assert len(group["tenants"]) == 1
    assert group["detail"] == "detail 2"
    assert group["first_at"] < group["last_at"]
    assert rows[letters.letter(other)["signature"]]["num_letters"] == 1
    order = [row["last_at"] for row in letters.groups(LetterFilter(), limit=100).rows]
    assert order == sorted(order, reverse=True)


def test_groups_are_bounded_and_say_how_many_there_are(letters, dead):
    model = new_id("m")
    for _ in range(3):
        dead(model=model)
    found = letters.groups(LetterFilter(model=model), limit=2)
    assert (len(found.rows), found.num_groups) == (2, 3)
    assert letters.groups(NONE, limit=2).num_groups == 0


def test_invariant_3_pages_join_and_hold_each_letter_once(letters, dead):
    signature = new_id("sig")
    made = [dead(signature) for _ in range(5)]
    wanted, found, before = LetterFilter(signature=signature), [], None
    for size in (2, 2, 1):
        page = letters.page(wanted, limit=2, before=before)
        assert len(page.rows) == size
        found += [row["job_id"] for row in page.rows]
        before = page.next_before
    assert before is None
    assert found == made[::-1]


def test_each_part_of_a_filter_narrows_it(letters, dead, engine):
    signature = new_id("sig")
    wanted, other = dead(signature, model="a"), dead(signature, model="b")
    row = letters.letter(wanted)
    soon = row["created_at"] + timedelta(hours=1)

    def found(**given) -> set[str]:
        page = letters.page(LetterFilter(signature=signature, **given), limit=10)
        return {one["job_id"] for one in page.rows}

    assert found() == {wanted, other}
    assert found(model="a") == {wanted}
    assert found(tenant=row["tenant"]) == found(tenant=row["tenant_id"]) == {wanted, other}
    assert found(tenant="nobody") == set()
    assert found(created_after=row["created_at"], created_before=soon) == {wanted, other}
    assert found(created_before=row["created_at"]) == set()
    assert found(created_after=soon) == set()
    assert found(job_ids=(other,)) == {other}
    assert found(job_ids=()) == set()
    letters.replay(wanted)
    assert found(is_replayed=True) == {wanted}
    assert found(is_replayed=False) == {other}


def test_a_replay_is_a_new_job_of_the_same_input_and_the_letter_names_it(
    letters, dead, ledger, engine
):
    old = dead(meta={"a": "b"})
    made = letters.replay(old)
    new, row = ledger.job(made), letters.letter(old)
    assert (new["made_from"], new["status"], new["input"], new["meta"]) == (
        old, "queued", {"prompt": "Hello"}, {"a": "b"},
    )  # fmt: skip
    assert (new["num_crashes"], new["suspect"]) == (0, 0), "it begins as any other"
    assert (row["replayed_as"], row["replayed_status"]) == (made, "queued")
    assert row["replayed_at"] is not None
    with engine.connect() as db:
        assert db.execute(select(outbox.c.id).where(outbox.c.job_id == made)).all()


def test_invariant_1_a_letter_is_replayed_once_unless_asked_again(letters, dead, engine):
    old = dead()
    first = letters.replay(old)
    with pytest.raises(LetterReplayed, match=first):
        letters.replay(old)
    second = letters.replay(old, again=True)
    assert letters.letter(old)["replayed_as"] == second != first
    with engine.connect() as db:
        made = db.execute(select(jobs.c.id).where(jobs.c.made_from == old)).scalars().all()
    assert sorted(made) == [first, second]


def test_invariant_1_two_who_ask_at_once_make_one_job(letters, dead, engine):
    old, outcomes = dead(), []
    together = threading.Barrier(4)

    def ask() -> None:
        together.wait(30)
        try:
            outcomes.append(letters.replay(old))
        except LetterReplayed as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outcomes.count("letter_replayed") == 3
    with engine.connect() as db:
        made = db.execute(select(jobs.c.id).where(jobs.c.made_from == old)).scalars().all()
    assert len(made) == 1


def test_invariant_2_a_retry_by_any_way_is_told_in_the_letter(letters, dead, engine):
    old = dead()
    ((_, made),) = JobEdits(engine).retry([old])
    assert letters.letter(old)["replayed_as"] == made
    with pytest.raises(LetterReplayed):
        letters.replay(old)


def test_only_letters_that_nobody_replayed_count_for_many(letters, dead):
    signature = new_id("sig")
    made = [dead(signature) for _ in range(3)]
    letters.replay(made[1])
    assert letters.num_replayable(LetterFilter(signature=signature)) == 2
    assert letters.num_replayable(LetterFilter(signature=signature, job_ids=(made[1],))) == 0
    assert letters.num_replayable(NONE) == 0


def test_a_job_without_a_letter_has_none_to_replay(letters, accept):
    job = accept()
    assert letters.letter(job) is None
    with pytest.raises(NotFound, match="ended as poison"):
        letters.replay(job)


def test_new_letters_are_counted_by_model(letters, dead, engine):
    model = new_id("m")
    old, _ = dead(model=model), dead(model=model)
    assert letters.num_new(newer_than_s=300)[model] == 2
    with engine.begin() as db:
        at = datetime.now(UTC) - timedelta(seconds=301)
        db.execute(update(dead_letters).where(dead_letters.c.job_id == old).values(created_at=at))
    assert letters.num_new(newer_than_s=300)[model] == 1


def test_invariant_4_what_the_client_reads_says_what_to_do_and_nothing_of_the_engine(dead, ledger):
    row = ledger.job(dead("IndexError model.py:forward at 0x7f", "secret/path.py line 3"))
    assert (row["status"], row["error_code"]) == ("failed", Poison.code)
    assert "ask the operator" in row["error_text"]
    for inner in ("IndexError", "model.py", "secret", "0x7f"):
        assert inner not in row["error_text"]


def test_a_letter_goes_with_its_job(letters, dead, engine):
    job = dead()
    with engine.begin() as db:
        db.execute(jobs.delete().where(jobs.c.id == job))
    assert letters.letter(job) is None
