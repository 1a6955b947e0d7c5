"""Jobs on their way back, on real stores."""

from typing import Any

import pytest

from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.ledger import Ledger
from headrace.contract.wire import JobStatus
from headrace.tests.worker.conftest import MODEL
from headrace.worker.hand_back import HandBack
from headrace.worker.running import RunningJob
from headrace.worker.spans import JobSpans


class InHand:
    """What the courier gives up."""

    def __init__(self, jobs: list[RunningJob]) -> None:
        self._jobs = jobs

    def take_all(self) -> list[RunningJob]:
        jobs, self._jobs = self._jobs, []
        return jobs


def hand_back(bench, jobs: list[RunningJob], ledger: Any = None) -> None:
    HandBack(
        model=MODEL,
        worker=bench.name,
        courier=InHand(jobs),  # type: ignore[arg-type]
        ledger=ledger or bench.ledger,
        streams=bench.streams,
        held=bench.held,
        spans=JobSpans(None, MODEL, bench.name),
    ).all("ordered")


def claimed(bench, count: int) -> list[RunningJob]:
    for _ in range(count):
        bench.accept()
    jobs = bench.claim()
    assert len(jobs) == count
    return jobs


def test_what_is_handed_back_is_queued_and_claimed_first_by_whoever_asks(bench):
    jobs = claimed(bench, 2)
    later = bench.accept()
    hand_back(bench, jobs)
    assert bench.held.pairs() == []
    assert {bench.row(job.job)["status"] for job in jobs} == {JobStatus.QUEUED}
    again = bench.claim()
    assert {job.job for job in again[:2]} == {job.job for job in jobs}
    assert [job.attempt for job in again] == [2, 2, 1]
    assert again[2].job == later


def test_a_job_taken_over_elsewhere_meanwhile_stays_there(bench):
    (job,) = claimed(bench, 1)
    bench.ledger.pick_up([job.job], "w2")
    hand_back(bench, [job])
    row = bench.row(job.job)
    assert (row["status"], row["worker"], row["attempt"]) == (JobStatus.RUNNING, "w2", 2)


@pytest.mark.parametrize("num_well", [0, 1])
def test_a_store_that_is_away_is_asked_once_and_the_leases_run_out(bench, num_well):
    asked: list[str] = []

    class Away(Ledger):
        def hand_back(self, job_id: str, attempt: int, *timings: Any) -> bool:
            asked.append(job_id)
            if len(asked) > num_well:
                raise DatabaseUnavailable("hand back: Postgres did not answer")
            return super().hand_back(job_id, attempt, *timings)

    jobs = claimed(bench, 4)
    hand_back(bench, jobs, Away(bench.engine))
    assert len(asked) == num_well + 1
    assert bench.held.pairs() == [], "their leases are renewed no more"
    statuses = [bench.row(job.job)["status"] for job in jobs]
    assert statuses.count(JobStatus.RUNNING) == 4 - num_well
