"""Jobs that were picked up after workers went silent with them, on real stores."""

from headrace.contract.crashes import MAX_LOSSES
from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.wire import JobStatus
from headrace.tests.worker.conftest import MODEL


def lose(bench, job_id: str) -> list:
    """Let the worker that has the job die without a word, and claim what is there."""
    for held, attempt in bench.held.pairs():
        bench.held.remove(held, attempt)
    bench.room.release(job_id)
    bench.streams.hand_back(MODEL, job_id, bench.row(job_id)["attempt"])  # its lease ran out
    return bench.claim()


def test_a_job_that_every_worker_goes_silent_with_ends_alone_and_then_dead(bench):
    job_id = bench.accept()
    bench.claim()
    for _ in range(MAX_LOSSES - 1):
        (job,) = lose(bench, job_id)
        assert job.claim.suspect == 0
    assert lose(bench, job_id) == [], "it runs with others no more"
    row = bench.row(job_id)
    assert (row["status"], row["suspect"], bench.held.pairs()) == ("queued", 2, [])
    bench.room.reserve("busy", 1)
    assert bench.claim() == []
    bench.room.release("busy")
    (job,) = bench.claim()
    for _ in range(MAX_LOSSES - 1):
        assert (job.claim.suspect, job.ending) == (2, None)
        (job,) = lose(bench, job_id)
    (job,) = lose(bench, job_id)
    assert job.ending is not None
    bench.settle(job)
    row = bench.row(job_id)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "poison")
    end = bench.tokens.read(MODEL, job_id).end
    assert end is not None
    assert (end.error_code, end.error_text) == ("poison", row["error_text"])
    assert (bench.num_entries(), bench.held.pairs()) == (0, [])


def test_a_token_between_two_losses_begins_the_count_anew(bench):
    job_id = bench.accept()
    (job,) = bench.claim()
    for number in range(3 * MAX_LOSSES):
        chunk = bench.chunk(job_id, job.attempt, number, "x")
        bench.tokens.append(MODEL, [("t", chunk)])
        found = lose(bench, job_id)
        if not found:
            break
        (job,) = found
        if job.ending is not None:
            break
    assert bench.row(job_id)["suspect"] == 0
    assert len(bench.tokens.read(MODEL, job_id).chunks) == 9


def test_a_job_that_was_canceled_meanwhile_ends_as_canceled(bench):
    job_id = bench.accept()
    bench.claim()
    bench.ledger.request_cancel(job_id, tenant_id=bench.key.tenant_id)
    (job,) = lose(bench, job_id)
    assert job.ending is not None
    assert job.ending.status is JobStatus.CANCELED


def test_with_postgres_away_a_loss_is_not_noted_and_the_job_runs(bench, monkeypatch):
    def away(*_: object) -> None:
        raise DatabaseUnavailable("record loss: Postgres did not answer")

    job_id = bench.accept()
    bench.claim()
    monkeypatch.setattr(bench.suspicion._crashes, "found_lost", away)
    (job,) = lose(bench, job_id)
    assert job.ending is None


def test_a_prompt_that_ends_its_worker_when_it_is_read_is_found_too(bench, monkeypatch):
    class Gone(BaseException):
        """The process is no more."""

    def read(_: object) -> list[int]:
        raise Gone

    job_id = bench.accept()
    monkeypatch.setattr(bench.intake, "_prompt_ids", read)
    for _ in range(4 * MAX_LOSSES):
        try:
            if found := lose(bench, job_id):
                break
        except Gone:
            continue
    (job,) = found
    assert job.ending is not None
    bench.settle(job)
    row = bench.row(job_id)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "poison")
