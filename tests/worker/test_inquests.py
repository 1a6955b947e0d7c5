"""Deaths that cannot be judged yet, on real stores: Postgres away, or the next engine awaited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.wire import JobStatus
from headrace.tests.worker.test_hand_back import CERTAIN, InHand, claimed, way_back
from headrace.worker.hand_back import HandBack
from headrace.worker.running import RunningJob


class Judges:
    """Judges, unless it is away."""

    def __init__(self, bench, monkeypatch) -> None:
        self.is_away, self.num_asked, self._judge = True, 0, bench.suspicion.judge
        monkeypatch.setattr(bench.suspicion, "judge", self.judge)

    def judge(self, *args: Any, **named: Any) -> Any:
        self.num_asked += 1
        if self.is_away:
            raise DatabaseUnavailable("record crash: Postgres did not answer")
        return self._judge(*args, **named)


@pytest.fixture
def judges(bench, monkeypatch) -> Judges:
    return Judges(bench, monkeypatch)


def die(bench, jobs: list[RunningJob]) -> HandBack:
    way = way_back(bench, jobs)
    way.after_death(CERTAIN, frozenset(job.job for job in jobs))
    return way


def suspected(bench) -> RunningJob:
    """Let a job die alone once, and be claimed for its trial."""
    job_id = bench.accept()
    (job,) = bench.claim()
    bench.room.release(job_id)
    assert die(bench, [job]).inquests.num_open == 0, "nobody can be dead of it"
    (again,) = bench.claim()
    assert again.claim.suspect == 2
    bench.room.release(job_id)
    return again


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_invariant_1_what_died_alone_again_is_dead_once_the_next_engine_is_sane(bench):
    job = suspected(bench)
    inquests = die(bench, [job]).inquests
    inquests.turn()
    assert (inquests.num_open, bench.row(job.job)["status"]) == (1, JobStatus.RUNNING)
    inquests.next_engine(is_sane=True)
    inquests.turn()
    bench.settle()
    row = bench.row(job.job)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "poison")


def test_invariant_1_an_engine_that_is_broken_in_itself_kills_nobody(bench):
    job = suspected(bench)
    inquests = die(bench, [job]).inquests
    inquests.next_engine(is_sane=False)
    inquests.turn()
    row = bench.row(job.job)
    assert (row["status"], row["suspect"], row["num_losses"]) == (JobStatus.QUEUED, 2, 1)
    (again,) = bench.claim()
    assert (again.job, again.claim.suspect) == (job.job, 2), "it has its trial elsewhere"


def test_invariant_2_a_death_that_postgres_was_not_told_of_is_told_later(bench, judges):
    jobs = claimed(bench, 2)
    inquests = die(bench, jobs).inquests
    running = threading.Thread(target=inquests.run)
    running.start()
    try:
        until(lambda: judges.num_asked > 2)
        assert inquests.num_open == 1
        assert {job for job, _ in bench.held.pairs()} == {job.job for job in jobs}
        assert {bench.row(job.job)["suspect"] for job in jobs} == {0}
        judges.is_away = False
        until(lambda: inquests.num_open == 0)
    finally:
        inquests.close()
        running.join(20)
    assert not running.is_alive()
    rows = [bench.row(job.job) for job in jobs]
    told = [(row["status"], row["suspect"], row["num_crashes"]) for row in rows]
    assert told == [("queued", 1, 1)] * 2
    assert bench.held.pairs() == []
    for job in jobs:
        bench.room.release(job.job)
    again = {(job.job, job.claim.suspect) for job in bench.claim()}
    assert again == {(job.job, 1) for job in jobs}


def test_invariant_3_a_later_death_waits_for_an_earlier_one(bench, judges):
    first, second = claimed(bench, 2)
    way = die(bench, [first])
    way._courier = InHand([second])  # type: ignore[assignment]
    judges.num_asked = 0
    way.after_death(CERTAIN, frozenset({second.job}))
    assert (judges.num_asked, way.inquests.num_open) == (1, 2), "the first was tried, and failed"
    judges.is_away = False
    way.inquests.turn()
    assert way.inquests.num_open == 0
    assert [bench.row(job.job)["suspect"] for job in (first, second)] == [2, 2]


def test_invariant_4_what_is_open_at_the_end_blames_nobody_and_the_leases_run_out(bench, judges):
    jobs = claimed(bench, 2)
    inquests = die(bench, jobs).inquests
    inquests.close()
    assert (inquests.num_open, bench.held.pairs()) == (0, [])
    assert {bench.row(job.job)["status"] for job in jobs} == {JobStatus.RUNNING}
    assert bench.claim() == []


def test_invariant_4_at_the_end_no_engine_is_awaited(bench):
    job = suspected(bench)
    inquests = die(bench, [job]).inquests
    inquests.close()
    assert (inquests.num_open, bench.row(job.job)["status"]) == (0, JobStatus.QUEUED)
