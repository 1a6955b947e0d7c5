"""Replays at a rate on a real Postgres: once a letter, also when processes share or die in them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, insert, select, update

from headrace.contract.dead_letters import DeadLetters, LetterFilter
from headrace.contract.errors import NotFound, ReplayEnded, ReplayUnderWay
from headrace.contract.ids import new_id
from headrace.contract.records import dead_letters, idempotency_keys, jobs, outbox, replays
from headrace.contract.replays import BURST_S, MAX_RATE, Replays, Step, filter_json, filter_of
from headrace.tests.contract.burial import bury


@pytest.fixture
def letters(engine) -> DeadLetters:
    return DeadLetters(engine)


@pytest.fixture
def todo(engine) -> Replays:
    return Replays(engine)


@pytest.fixture
def dead(engine, accept):
    """Return a function that makes so many letters of a signature; returns their jobs, by age."""

    def make(num: int, signature: str) -> list[str]:
        return [bury(engine, accept(), signature) for _ in range(num)]

    return make


@pytest.fixture
def started(letters, todo):
    """Return a function that starts a replay of a filter and returns its id."""

    def start(rate_per_min: int = MAX_RATE, **given) -> str:
        wanted = LetterFilter(**given)
        num = letters.num_replayable(wanted)
        row = todo.start(wanted, rate_per_min=rate_per_min, by="ann", num_matched=num)
        return row["id"]

    return start


@pytest.fixture
def pass_time(engine):
    """Return a function that lets a replay's rate have been unspent for so long."""

    def go(replay_id: str, seconds: float) -> None:
        with engine.begin() as db:
            db.execute(
                update(replays)
                .where(replays.c.id == replay_id)
                .values(paced_at=replays.c.paced_at - timedelta(seconds=seconds))
            )

    return go


def made_of(engine, job_ids) -> dict[str, int]:
    """Return how many jobs were made from each."""
    with engine.connect() as db:
        query = select(jobs.c.made_from, func.count()).where(jobs.c.made_from.in_(job_ids))
        return {old: num for old, num in db.execute(query.group_by(jobs.c.made_from)).all()}


def step_to_the_end(todo: Replays, replay_id: str) -> None:
    """Step as time goes by: at 6000 a minute a job is due each 10 ms."""
    deadline = time.monotonic() + 60
    while not todo.step(replay_id).is_ended:
        assert time.monotonic() < deadline


def run_out(todo, pass_time, replay_id: str, most: int = 100) -> list[Step]:
    """Step until the replay has ended, with time enough between."""
    steps: list[Step] = []
    while not (steps and steps[-1].is_ended):
        assert len(steps) < most
        pass_time(replay_id, BURST_S)
        steps.append(todo.step(replay_id))
    return steps


def test_a_filter_survives_its_row():
    at = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    for wanted in (
        LetterFilter(),
        LetterFilter(signature="s", model="m", tenant="t"),
        LetterFilter(created_after=at, created_before=at, job_ids=("job_a", "job_b")),
        LetterFilter(job_ids=()),
    ):
        assert filter_of(filter_json(wanted)) == wanted


def test_all_of_a_signature_are_made_anew_oldest_first(engine, todo, dead, started, letters):
    mine, others = new_id("sig"), dead(1, new_id("sig"))
    old = dead(3, mine)
    replay = started(signature=mine)
    step_to_the_end(todo, replay)
    row = todo.replay(replay)
    assert (row["num_matched"], row["num_done"], row["num_refused"]) == (3, 3, 0)
    assert made_of(engine, old + others) == dict.fromkeys(old, 1)
    made = [letters.letter(job)["replayed_as"] for job in old]
    assert made == sorted(made)
    with engine.connect() as db:
        waiting = select(outbox.c.job_id).where(outbox.c.job_id.in_(made))
        assert set(db.execute(waiting).scalars()) == set(made)
        keys = select(idempotency_keys.c.key).where(idempotency_keys.c.job_id.in_(made))
        assert set(db.execute(keys).scalars()) == {f"replay {replay} {job}" for job in old}


def test_invariant_1_steps_at_once_take_each_letter_once(engine, todo, dead, started, pass_time):
    old = dead(12, signature := new_id("sig"))
    replay = started(signature=signature, rate_per_min=24)  # two each 5 s
    together, ended = threading.Barrier(3), threading.Event()

    def work() -> None:
        together.wait(30)
        while not ended.is_set():
            pass_time(replay, 5)
            if todo.step(replay).is_ended:
                ended.set()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert ended.wait(120)
    for thread in threads:
        thread.join(60)
    assert made_of(engine, old) == dict.fromkeys(old, 1)
    assert todo.replay(replay)["num_done"] == 12


def test_invariant_1_a_process_killed_in_the_middle_of_a_step_has_done_nothing(
    engine, todo, dead, started, database_url
):
    old = dead(3, signature := new_id("sig"))
    replay = started(signature=signature)
    dies = f"""
        import os, signal
        from headrace.contract import replays
        from headrace.contract.database import connect

        whole = replays._make

        def make(*given):
            whole(*given)
            print("made", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        replays._make = make
        replays.Replays(connect({database_url!r})).step({replay!r})
    """
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / ".imports")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(dies)], env=env, capture_output=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (-9, b"made\n"), done.stderr.decode()
    assert made_of(engine, old) == {}
    assert todo.replay(replay)["num_done"] == 0
    step_to_the_end(todo, replay)  # its locks go when Postgres sees that it died
    assert made_of(engine, old) == dict.fromkeys(old, 1)


def test_invariant_1_a_second_replay_of_the_same_letters_makes_none_again(
    engine, todo, dead, started, pass_time
):
    old = dead(4, signature := new_id("sig"))
    first = started(signature=signature)
    second = started(job_ids=tuple(old[:3]))
    run_out(todo, pass_time, second)
    run_out(todo, pass_time, first)
    assert made_of(engine, old) == dict.fromkeys(old, 1)
    rows = [todo.replay(each) for each in (first, second)]
    assert [(row["num_done"], row["num_refused"]) for row in rows] == [(1, 3), (3, 0)]


def test_invariant_3_a_job_that_dies_again_is_not_replayed_by_the_same_replay(
    engine, todo, dead, started, letters, pass_time
):
    (old,) = dead(1, signature := new_id("sig"))
    replay = started(signature=signature, rate_per_min=60)
    assert todo.step(replay) == Step(1, is_ended=False)
    again = bury(engine, letters.letter(old)["replayed_as"], signature)
    assert run_out(todo, pass_time, replay)[-1].is_ended
    assert made_of(engine, [old, again]) == {old: 1}
    assert todo.replay(replay)["num_done"] == 1


def test_invariant_4_the_rate_is_kept_and_an_outage_is_not_caught_up_with(
    todo, dead, started, pass_time
):
    dead(9, signature := new_id("sig"))
    replay = started(signature=signature, rate_per_min=1)
    assert todo.step(replay).num_made == 1, "the first at once"
    assert todo.step(replay).num_made == 0
    pass_time(replay, 20)
    assert todo.step(replay).num_made == 0
    pass_time(replay, 40)
    assert todo.step(replay).num_made == 1
    pass_time(replay, 3600)
    assert todo.step(replay).num_made == 1
    assert todo.step(replay).num_made == 0

    todo.stop(replay, by="ann")
    faster = started(signature=signature, rate_per_min=36)
    pass_time(faster, 3600)
    assert todo.step(faster).num_made == 3, "what five seconds bring, no hour"


def test_invariant_5_what_was_deleted_meanwhile_is_refused(engine, todo, dead, started, pass_time):
    old = dead(3, signature := new_id("sig"))
    replay = started(signature=signature)
    with engine.begin() as db:
        db.execute(jobs.delete().where(jobs.c.id == old[1]))
    run_out(todo, pass_time, replay)
    row = todo.replay(replay)
    assert (row["num_matched"], row["num_done"], row["num_refused"]) == (3, 2, 1)


def test_a_letter_that_another_holds_delays_the_end_and_is_not_forgotten(
    engine, todo, dead, started, pass_time
):
    old = dead(2, signature := new_id("sig"))
    replay = started(signature=signature)
    pass_time(replay, 1)
    held = select(dead_letters).where(dead_letters.c.job_id == old[0]).with_for_update()
    done: list[Step] = []
    with engine.begin() as db:
        db.execute(held)
        step = threading.Thread(target=lambda: done.append(todo.step(replay)))
        step.start()
        waits = (
            "select count(*) from pg_stat_activity"
            " where wait_event_type = 'Lock' and datname = current_database()"
        )
        deadline = time.monotonic() + 60
        while not db.exec_driver_sql(waits).scalar_one():
            assert time.monotonic() < deadline
    step.join(60)
    assert done == [Step(2, is_ended=True)]
    assert made_of(engine, old) == dict.fromkeys(old, 1)


def test_a_replay_that_is_stopped_makes_nothing_more(engine, todo, dead, started, pass_time):
    old = dead(3, signature := new_id("sig"))
    replay = started(signature=signature, rate_per_min=1)
    assert todo.step(replay).num_made == 1
    row = todo.stop(replay, by="bob")
    assert (row["canceled_by"], row["num_done"], row["num_refused"]) == ("bob", 1, 0)
    assert row["ended_at"] is not None
    pass_time(replay, 600)
    assert todo.step(replay) == Step(0, is_ended=False)
    assert len(made_of(engine, old)) == 1
    with pytest.raises(ReplayEnded):
        todo.stop(replay, by="bob")


def test_a_filter_is_replayed_by_one_at_a_time(todo, dead, started):
    dead(1, signature := new_id("sig"))
    first = started(signature=signature, rate_per_min=1)
    with pytest.raises(ReplayUnderWay, match=first):
        started(signature=signature, rate_per_min=60)
    todo.stop(first, by="ann")
    assert started(signature=signature) != first


def test_invariant_2_of_two_who_start_at_the_same_instant_one_is_refused(todo, dead, started):
    num_starters = 4
    for number in range(10):  # without the lock most rounds let several in
        signature = f"s{number}"
        dead(1, signature)
        barrier, outcomes = threading.Barrier(num_starters), []

        def start(barrier=barrier, outcomes=outcomes, signature=signature) -> None:
            barrier.wait(20)
            try:
                outcomes.append(started(signature=signature))
            except ReplayUnderWay:
                outcomes.append(None)

        threads = [threading.Thread(target=start) for _ in range(num_starters)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert len(outcomes) == num_starters
        assert sum(each is not None for each in outcomes) == 1, outcomes


def test_lists_are_newest_first_and_the_open_ones_oldest_first(todo, started, engine):
    made = [started(signature=new_id("none")) for _ in range(3)]
    newest = [row["id"] for row in todo.newest(limit=2)]
    assert newest == made[:0:-1]
    assert [row["id"] for row in todo.newest(limit=1, before=newest[-1])] == made[:1]
    assert todo.open_ids()[-3:] == made
    assert todo.step(made[0]) == Step(0, is_ended=True), "nothing matches it"
    assert todo.open_ids()[-2:] == made[1:]


def test_what_does_not_exist_is_not_found(todo):
    for ask in (todo.replay, lambda name: todo.stop(name, by="x")):
        with pytest.raises(NotFound, match="list them"):
            ask("rpl_none")
    assert todo.step("rpl_none") == Step(0, is_ended=False)


def test_a_client_cannot_take_the_key_of_a_replay(engine, todo, dead, started, ledger):
    """An idempotency key of a client holds no space (gateway/intake), so none is the same."""
    (old,) = dead(1, signature := new_id("sig"))
    replay = started(signature=signature)
    todo.step(replay)
    tenant = ledger.job(old)["tenant_id"]
    row = {"tenant_id": tenant, "key": f"replay {replay} {old}", "request_sha256": b""}
    with pytest.raises(Exception, match="idempotency_keys"), engine.begin() as db:
        db.execute(insert(idempotency_keys), [row | {"job_id": old}])
