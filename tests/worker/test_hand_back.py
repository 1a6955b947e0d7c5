"""Jobs on their way back, on real stores."""

from typing import Any

import pytest

from headrace.contract.errors import DatabaseUnavailable, QueueUnavailable
from headrace.contract.ledger import Ledger
from headrace.contract.wire import JobStatus
from headrace.tests.worker.conftest import MODEL
from headrace.worker.evidence import Evidence
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


def way_back(bench, jobs: list[RunningJob], ledger: Any = None) -> HandBack:
    return HandBack(
        model=MODEL,
        worker=bench.name,
        courier=InHand(jobs),  # type: ignore[arg-type]
        endings=bench.endings,
        suspicion=bench.suspicion,
        ledger=ledger or bench.ledger,
        streams=bench.streams,
        held=bench.held,
        spans=JobSpans(None, MODEL, bench.name),
    )


def hand_back(bench, jobs: list[RunningJob], ledger: Any = None) -> None:
    way_back(bench, jobs, ledger).all("ordered")


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


CERTAIN = Evidence("SIGSEGV", "a signal ended it: SIGSEGV", is_certain=True)
UNCERTAIN = Evidence("SIGKILL", "a signal ended it: SIGKILL", is_certain=False)


def die(bench, jobs: list[RunningJob], evidence: Evidence, *had: str) -> None:
    """Let the engine die; it had these jobs, and others that are in nobody's hand any more.

    The next one is sane.
    """
    way = way_back(bench, jobs)
    way.after_death(evidence, frozenset((*(job.job for job in jobs), *had)))
    way.inquests.next_engine(is_sane=True)
    way.inquests.turn()
    assert way.inquests.num_open == 0


def test_a_certain_death_puts_all_that_the_engine_had_under_suspicion(bench):
    jobs = claimed(bench, 2)
    die(bench, jobs, CERTAIN)
    assert bench.held.pairs() == []
    rows = [bench.row(job.job) for job in jobs]
    assert [(row["status"], row["suspect"]) for row in rows] == [("queued", 1)] * 2
    other = bench.accept()
    bench.room.reserve("busy", 1)
    assert [job.job for job in bench.claim()] == [other], "a busy worker passes them by"
    for job_id in ("busy", other, *(job.job for job in jobs)):
        bench.room.release(job_id)
    again = bench.claim()
    assert [(job.job, job.claim.suspect, job.attempt) for job in again] == [
        (job.job, 1, 2) for job in jobs
    ]
    assert bench.room.is_on_trial
    bench.accept()
    assert bench.claim() == [], "nothing runs beside suspects"


def test_a_job_that_the_engine_never_had_is_handed_back_as_in_good_order(bench):
    had, late = claimed(bench, 2)
    way_back(bench, [had, late]).after_death(CERTAIN, frozenset({had.job}))
    assert (bench.row(late.job)["suspect"], bench.row(late.job)["status"]) == (0, "queued")
    assert bench.row(had.job)["suspect"] == 2, "it was alone in the engine"


def test_what_was_on_its_way_out_of_the_engine_was_with_it_too(bench):
    (job,) = claimed(bench, 1)
    die(bench, [job], CERTAIN, "job_that_was_canceled")
    assert bench.row(job.job)["suspect"] == 1


def test_a_death_from_outside_puts_nothing_under_suspicion(bench):
    jobs = claimed(bench, 2)
    die(bench, jobs, UNCERTAIN)
    assert {bench.row(job.job)["suspect"] for job in jobs} == {0}
    bench.room.reserve("busy", 1)
    for job in jobs:
        bench.room.release(job.job)
    assert {job.job for job in bench.claim()} == {job.job for job in jobs}


def test_what_dies_alone_again_is_dead_and_its_stream_and_row_say_so(bench):
    job_id = bench.accept()
    for num_resumed in (0, 3):
        (job,) = bench.claim()
        assert job.num_logged == num_resumed
        if not num_resumed:
            bench.tokens.append(MODEL, [("t", bench.chunk(job_id, job.attempt, 0, "hel"))])
        bench.room.release(job_id)
        die(bench, [job], CERTAIN)
    assert bench.held.pairs() == [(job_id, 2)], "leased until its end is told"
    bench.settle()
    row = bench.row(job_id)
    assert (row["status"], row["error_code"], row["output_text"]) == ("failed", "poison", "hel")
    assert "SIGSEGV" not in row["error_text"], "what it died of is for operators"
    end = bench.tokens.read(MODEL, job_id).end
    assert end is not None
    assert (end.status, end.error_code, end.next) == (JobStatus.FAILED, "poison", 3)
    assert end.error_text == row["error_text"]
    assert (bench.num_entries(), bench.held.pairs()) == (0, [])
    assert bench.metrics.registry.get_sample_value("headrace_dead_letters_total") == 1


def test_with_redis_away_the_next_pickup_puts_a_suspect_where_it_belongs(bench, monkeypatch):
    (job,) = claimed(bench, 1)

    def away(*_: Any, **__: Any) -> None:
        raise QueueUnavailable("hand back: Redis did not answer")

    with monkeypatch.context() as patched:
        patched.setattr(bench.streams, "hand_back", away)
        die(bench, [job], CERTAIN)
    assert (bench.row(job.job)["status"], bench.row(job.job)["suspect"]) == ("queued", 2)
    bench.room.release(job.job)
    bench.streams.hand_back(MODEL, job.job, 1)  # as if its lease had run out
    assert bench.claim() == [], "its entry said nothing, its row did"
    assert (bench.row(job.job)["status"], bench.held.pairs()) == ("queued", [])
    (again,) = bench.claim()
    assert (again.job, again.claim.suspect, again.attempt) == (job.job, 2, 3)
