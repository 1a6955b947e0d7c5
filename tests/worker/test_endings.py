"""Endings on real stores: result first, then the end record, then the acknowledgement."""

from headrace.contract.ledger import Ending
from headrace.contract.wire import FinishReason, JobStatus
from headrace.tests.worker.conftest import END, MODEL


def finished(bench, text: str):
    job_id = bench.accept()
    (job,) = bench.claim()
    for token in [*bench.prompts.encode(text, add_special_tokens=False), END]:
        job.take(token, is_last=False, logprobs=None)
    assert job.ending is not None
    return job_id, job


def test_invariant_6_the_row_the_end_record_and_the_log_say_the_same(bench):
    job_id, job = finished(bench, "hello")
    bench.tokens.append(MODEL, [("t", job.chunk())])
    bench.settle(job)
    row, view = bench.row(job_id), bench.tokens.read(MODEL, job_id)
    assert row["status"] == JobStatus.SUCCEEDED
    assert row["output_text"] == "".join(chunk.text for chunk in view.chunks) == "hello"
    assert view.end is not None
    assert view.end.next == len(row["output_token_ids"]) == 6
    assert bench.num_entries() == 0
    assert bench.held.pairs() == []


def test_invariant_5_a_stale_attempts_result_is_refused_counted_and_tells_nobody(bench):
    job_id, job = finished(bench, "old")
    bench.ledger.pick_up([job_id], "w2")
    bench.settle(job)
    assert bench.row(job_id)["status"] == JobStatus.RUNNING
    assert bench.tokens.read(MODEL, job_id).end is None
    assert bench.num_entries() == 1, "the newer attempt acknowledges it"
    stale = bench.metrics.registry.get_sample_value(
        "headrace_worker_stale_writes_total", {"at": "result"}
    )
    assert stale == 1


def test_an_ending_that_was_committed_before_is_told_again(bench):
    """The commit succeeded and its answer was lost: the repeat goes on as if it had come."""
    job_id, job = finished(bench, "hi")
    assert job.ending is not None
    bench.ledger.finish(job_id, job.attempt, job.ending)
    bench.settle(job)
    assert bench.tokens.read(MODEL, job_id).end is not None
    assert bench.num_entries() == 0


def test_a_result_that_postgres_refuses_for_its_content_fails_that_job_alone(bench):
    bad_id, bad = finished(bench, "bad")
    good_id, good = finished(bench, "good")
    bad.ending = Ending(
        status=JobStatus.SUCCEEDED, finish_reason=FinishReason.STOP, text="no\0text"
    )
    bench.settle(bad, good)
    row = bench.row(bad_id)
    assert (row["status"], row["error_code"]) == (JobStatus.FAILED, "result_unstorable")
    assert bench.row(good_id)["output_text"] == "good"
