"""A job inside the courier: tokens, chunks, takeover, ending."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace.contract.streams import Claim
from headrace.contract.wire import (
    FinishReason,
    JobClass,
    JobSpec,
    JobStatus,
    Priority,
    Sampling,
    TokenLogprobs,
)
from headrace.worker.running import MIN_LOGPROB, RunningJob
from headrace.worker.text import OutputText

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENIZER = Tokenizer(models.BPE({c: i for i, c in enumerate(ALPHABET)}, []))
TOKENIZER.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
TOKENIZER.decoder = decoders.ByteLevel()
END = 255  # a token no text of these tests holds


def running(attempt: int = 1, **sampling) -> RunningJob:
    sampling = {"max_tokens": 100, **sampling}
    spec = JobSpec(
        job="job_1",
        tenant="t",
        model="m",
        job_class=JobClass.INTERACTIVE,
        priority=Priority.NORMAL,
        sampling=Sampling(**sampling),
        prompt="p",
    )
    return RunningJob(
        spec=spec,
        claim=Claim("job_1", b"", 10, "lane", "1-1", False),
        attempt=attempt,
        gen=0,
        prompt_ids=[1, 2],
        stop_token_ids=(END,),
        text=OutputText(TOKENIZER, spec.sampling.stop),
    )


def feed(job: RunningJob, ids: list[int]) -> None:
    for token in ids:
        job.take(token, is_last=False, logprobs=None)


def test_max_tokens_ends_the_job_with_length():
    job = running(max_tokens=3)
    feed(job, TOKENIZER.encode("abcdef").ids)
    assert job.ending is not None
    assert (job.ending.finish_reason, job.ending.text) == (FinishReason.LENGTH, "abc")


def test_an_end_token_ends_the_job_and_counts_but_adds_no_text():
    job = running()
    feed(job, [*TOKENIZER.encode("ab").ids, END])
    assert job.ending is not None
    assert job.ending.finish_reason is FinishReason.STOP
    assert len(job.ending.token_ids) == 3


def test_no_token_is_taken_after_the_end():
    job = running(stop=("b",))
    feed(job, TOKENIZER.encode("abcd").ids)
    assert job.ending is not None
    assert (job.ending.text, len(job.ids)) == ("a", 2)
    job.end(JobStatus.CANCELED, FinishReason.CANCELED)
    assert job.ending.status is JobStatus.SUCCEEDED


def test_infinite_logprobs_become_finite_so_that_json_can_hold_them():
    job = running(logprobs=1)
    job.take(5, is_last=False, logprobs=TokenLogprobs(-float("inf"), ((7, -float("inf")),)))
    chunk = job.chunk()
    assert chunk is not None
    assert chunk.logprobs == (TokenLogprobs(MIN_LOGPROB, ((7, MIN_LOGPROB),)),)


def test_an_end_record_before_the_end_is_a_mistake():
    with pytest.raises(RuntimeError):
        running().end_record()


@given(
    text=st.text(alphabet="abé世", min_size=1, max_size=30),
    flushes=st.lists(st.integers(0, 30), max_size=8),
    takeover=st.integers(0, 30),
    stop=st.sampled_from([(), ("ab",), ("世a",)]),
)
def test_invariant_7_a_takeover_at_any_token_ends_with_the_same_text(text, flushes, takeover, stop):
    """One attempt does it all; another dies after `takeover` tokens, having logged some."""
    ids = [*TOKENIZER.encode(text).ids, END]
    alone = running(stop=stop)
    feed(alone, ids)
    assert alone.ending is not None

    first, log = running(stop=stop), []
    for at, token in enumerate(ids[:takeover]):
        first.take(token, is_last=False, logprobs=None)
        if at in flushes and (chunk := first.chunk()) is not None:
            log.append(chunk)
            first.num_logged = chunk.next
    second = running(attempt=2, stop=stop)
    second.resume(log)
    if second.ending is None:
        feed(second, ids[second.num_logged :])
    assert second.ending is not None
    assert second.ending.text == alone.ending.text
    assert second.ending.token_ids == alone.ending.token_ids
    assert second.ending.ends == alone.ending.ends
    assert second.ending.finish_reason == alone.ending.finish_reason


@given(st.text(alphabet="abé世", min_size=1, max_size=20), st.integers(0, 40))
def test_logged_chunks_hold_what_was_logged_and_chunk_the_rest(text, logged):
    job = running()
    feed(job, TOKENIZER.encode(text).ids)
    job.num_logged = min(logged, len(job.ids))
    rest = job.chunk()
    chunks = job.logged_chunks() + ([rest] if rest else [])
    assert "".join(chunk.text for chunk in chunks) == "".join(job.pieces)
    assert [token for chunk in chunks for token in chunk.ids] == job.ids


@given(st.integers(0, 5), st.integers(0, 5))
def test_what_earlier_attempts_logged_stays_theirs_when_it_is_put_back(before, after):
    """A chunk of attempt 2 from 0 on would say that attempt 2 made all tokens again."""
    ids = TOKENIZER.encode("abcdefghij").ids
    first = running()
    feed(first, ids[:before])
    second = running(attempt=2)
    second.resume([chunk] if (chunk := first.chunk()) else [])
    feed(second, ids[before : before + after])
    second.num_logged = before + after
    found = [(c.attempt, c.first, len(c.ids)) for c in second.logged_chunks()]
    parts = [(1, 0, before), (2, before, after)]
    assert found == [part for part in parts if part[2]]
