"""What becomes of a job whose engine died, on a real Postgres."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from headrace.contract.crashes import (
    ALONE,
    IN_GROUP,
    MAX_LOSSES,
    SIGNATURE_CHARS,
    Crashes,
    InHand,
    Judged,
    Standing,
    Verdict,
    judge,
)
from headrace.contract.ledger import Ending
from headrace.contract.records import attempts, dead_letters
from headrace.contract.timings import Timings
from headrace.contract.wire import FinishReason, JobStatus

OUTPUT = Ending(
    status=JobStatus.FAILED,
    finish_reason=FinishReason.ERROR,
    prompt_tokens=3,
    gen=0,
    text="ab",
    token_ids=(7, 8),
    ends=(1, 2),
)


@pytest.fixture
def crashes(engine):
    return Crashes(engine)


@pytest.fixture
def run(ledger, accept):
    """Accept a job, or pick it up again; returns it as its worker has it."""

    def run(job: str = "", worker: str = "w1", num_logged: int = 2) -> InHand:
        job = job or accept()
        pickup = ledger.pick_up([job], worker)[job]
        timings = Timings(1, 2, 3, resumed_at=0, num_tokens=num_logged)
        return InHand(job, pickup.attempt, num_logged, OUTPUT, timings)

    return run


def die(crashes, *in_hand, is_certain=True, was_alone=False, signature="SIGSEGV"):
    return crashes.record(
        in_hand, "w1", signature, "a signal", is_certain=is_certain, was_alone=was_alone
    )


def letters(engine, *jobs):
    with engine.connect() as db:
        query = select(dead_letters).where(dead_letters.c.job_id.in_(jobs))
        return {row["job_id"]: row for row in db.execute(query).mappings()}


def attempt_of(engine, job, number):
    with engine.connect() as db:
        query = select(attempts).where(attempts.c.job_id == job, attempts.c.number == number)
        return db.execute(query).mappings().one()


@pytest.mark.parametrize(
    ("suspect", "was_alone", "after", "is_dead"),
    [
        (0, False, IN_GROUP, False),
        (0, True, ALONE, False),
        (1, False, ALONE, False),
        (1, True, ALONE, False),
        (2, False, ALONE, False),
        (2, True, ALONE, True),
    ],
)
def test_a_certain_death_raises_the_level_and_only_one_alone_is_dead(
    suspect, was_alone, after, is_dead
):
    was = Standing(num_crashes=suspect, suspect=suspect, num_losses=2, lost_at=5)
    found = judge(was, is_certain=True, was_alone=was_alone, num_logged=5)
    assert found == (Standing(suspect + 1, after), is_dead), "and losses before it are forgotten"


def test_losses_count_only_without_a_token_between():
    standing, levels = Standing(), []
    for num_logged in (0, 0, 4, 4, 4):
        standing, is_dead = judge(standing, is_certain=False, was_alone=True, num_logged=num_logged)
        levels.append((standing.suspect, standing.num_losses))
        assert not is_dead
    assert levels == [(0, 1), (0, 2), (0, 1), (0, 2), (ALONE, 0)]


def test_invariant_2_poison_is_dead_after_three_runs_and_its_neighbour_is_not(
    crashes, engine, ledger, run
):
    poison, innocent = run(), run()
    verdicts = die(crashes, poison, innocent)
    assert verdicts == dict.fromkeys(
        (poison.job, innocent.job), Judged(Verdict.SUSPECTED, IN_GROUP)
    )
    again = [run(poison.job), run(innocent.job)]
    assert ledger.job(poison.job)["attempt"] == 2
    verdicts = die(crashes, *again)
    assert verdicts[innocent.job] == Judged(Verdict.SUSPECTED, ALONE)
    verdict = die(crashes, run(poison.job), was_alone=True)[poison.job]
    assert verdict.verdict is Verdict.DEAD
    assert [ledger.job(each.job)["status"] for each in (poison, innocent)] == ["failed", "queued"]
    assert letters(engine, poison.job, innocent.job).keys() == {poison.job}


def test_a_dead_job_fails_with_its_output_and_has_a_letter(crashes, engine, ledger, run):
    job = ""
    for _ in range(2):
        in_hand = run(job)
        job = in_hand.job
        (verdict,) = die(crashes, in_hand, was_alone=True, signature="s" * 999).values()
    row, letter = ledger.job(job), letters(engine, job)[job]
    assert (row["status"], row["finish_reason"], row["error_code"]) == ("failed", "error", "poison")
    assert verdict.ending is not None
    assert row["error_text"] == verdict.ending.error_text
    assert (row["output_text"], row["output_token_ids"], row["output_ends"]) == (
        "ab",
        [7, 8],
        [1, 2],
    )
    assert row["finished_at"] is not None
    assert (letter["tenant_id"], letter["model"]) == (row["tenant_id"], row["model"])
    assert (letter["signature"], letter["detail"]) == ("s" * SIGNATURE_CHARS, "a signal")
    assert (letter["num_runs"], row["num_crashes"]) == (2, 2)
    assert (letter["replayed_at"], letter["replayed_as"]) == (None, None)


def test_an_attempt_says_what_it_died_of_and_where_its_time_went(crashes, engine, run):
    certain, uncertain = run(), run()
    die(crashes, certain)
    die(crashes, uncertain, is_certain=False, signature="SIGKILL")
    first = attempt_of(engine, certain.job, 1)
    assert (first["outcome"], first["signature"], first["last_token_ms"]) == (
        "crashed",
        "SIGSEGV",
        3,
    )
    assert first["ended_at"] is not None
    assert attempt_of(engine, uncertain.job, 1)["outcome"] == "lost"


def test_invariant_3_a_stale_attempt_and_an_ended_job_are_not_judged(crashes, engine, ledger, run):
    stale, ended, live = run(), run(), run()
    run(stale.job, worker="w2")
    ledger.finish(ended.job, 1, OUTPUT)
    verdicts = die(crashes, stale, ended, live, was_alone=True)
    assert [verdicts[each.job].verdict for each in (stale, ended, live)] == [
        Verdict.STALE,
        Verdict.STALE,
        Verdict.SUSPECTED,
    ]
    row = ledger.job(stale.job)
    assert (row["status"], row["worker"], row["num_crashes"]) == ("running", "w2", 0)
    assert attempt_of(engine, stale.job, 1)["outcome"] is None


def test_invariant_3_a_repeat_changes_nothing(crashes, ledger, run):
    in_hand = run()
    die(crashes, in_hand)
    assert die(crashes, in_hand)[in_hand.job].verdict is Verdict.STALE
    assert ledger.job(in_hand.job)["num_crashes"] == 1


def test_invariant_4_a_pickup_learns_the_level(crashes, ledger, run):
    in_hand = run()
    assert ledger.pick_up([in_hand.job], "w1")[in_hand.job].suspect == 0
    die(crashes, run(in_hand.job))
    assert ledger.pick_up([in_hand.job], "w1")[in_hand.job].suspect == IN_GROUP


def test_deaths_from_outside_blame_nobody_until_the_third_without_a_token(crashes, run):
    in_hand = run(num_logged=0)
    for _ in range(MAX_LOSSES - 1):
        (judged,) = die(crashes, in_hand, is_certain=False).values()
        assert judged == Judged(Verdict.RELEASED, 0)
        in_hand = run(in_hand.job, num_logged=0)
    (judged,) = die(crashes, in_hand, is_certain=False).values()
    assert judged == Judged(Verdict.SUSPECTED, ALONE)


def test_workers_that_go_silent_are_counted_by_who_picks_the_job_up(crashes, engine, ledger, run):
    in_hand = run(num_logged=0)
    verdicts = []
    for _ in range(2 * MAX_LOSSES):
        in_hand = run(in_hand.job, num_logged=0)  # the worker before died without a word
        judged = crashes.found_lost(in_hand, "w2")
        verdicts.append((judged.verdict, judged.suspect))
        status = ledger.job(in_hand.job)["status"]
        assert status == ("queued" if judged.verdict is Verdict.SUSPECTED else status)
    may_run, alone = (Verdict.RELEASED, 0), (Verdict.RELEASED, ALONE)
    assert verdicts == [may_run, may_run, (Verdict.SUSPECTED, ALONE), alone, alone, verdicts[-1]]
    assert verdicts[-1] == (Verdict.DEAD, ALONE)
    letter = letters(engine, in_hand.job)[in_hand.job]
    assert letter["signature"] == "worker lost"
    row = ledger.job(in_hand.job)
    assert (row["status"], row["error_code"]) == ("failed", "poison")


def test_a_worker_that_died_after_tokens_were_logged_is_no_loss_in_a_row(crashes, run):
    in_hand = run(num_logged=0)
    for num_logged in range(1, 3 * MAX_LOSSES):
        in_hand = run(in_hand.job, num_logged=num_logged)
        assert crashes.found_lost(in_hand, "w2").verdict is Verdict.RELEASED


def test_a_death_with_nothing_in_hand_is_no_transaction_of_anything(crashes):
    assert die(crashes) == {}
