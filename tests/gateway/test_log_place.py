"""A place in a log: counted by frames, proved by its last record, given up where that is not so."""

import msgspec
import pytest

from headrace.contract import wire
from headrace.contract.tokens import LogView
from headrace.gateway.log_place import BEGINNING, LogPlace
from headrace.tests.gateway.courier import chunk_of

JOB = "job_" + "d" * 32


def chunk(first: int, count: int, attempt: int = 1, gen: int = 0) -> wire.TokenChunk:
    return chunk_of(JOB, first, count, attempt=attempt, gen=gen)


def place_of(*chunks: wire.TokenChunk) -> LogPlace:
    place = BEGINNING
    for each in chunks:
        place = place.after(each)
    return place


def view(*chunks: wire.TokenChunk, end: wire.JobEnd | None = None) -> LogView:
    return LogView(chunks, end, len(chunks) + (end is not None))


LOG = (chunk(0, 2), chunk(2, 1), chunk(3, 4))


def test_records_are_counted_as_they_come():
    assert [place_of(*LOG[:count]).num_records for count in range(4)] == [0, 1, 2, 3]
    assert place_of(*LOG).begin == 2
    assert BEGINNING.begin == 0


def test_repeats_stragglers_and_what_is_beyond_a_gap_change_nothing():
    place = place_of(*LOG[:2])
    assert place.after(LOG[0]) == place.after(LOG[1]) == place
    assert place.after(chunk(9, 1)) == place
    assert place_of(chunk(0, 2, attempt=2)).after(chunk(2, 1, attempt=1)).num_records == 1
    assert place_of(chunk(0, 2, gen=1)).after(chunk(2, 1)).num_records == 1


def test_who_comes_in_the_middle_has_no_place():
    assert place_of(chunk(5, 2), chunk(7, 1)) == BEGINNING


def test_another_attempt_goes_on_in_the_same_log():
    place = place_of(LOG[0], chunk(2, 1, attempt=2))
    assert (place.num_records, place.attempt) == (2, 2)


def test_a_log_that_lost_its_tail_or_was_begun_anew_has_no_place_yet():
    assert place_of(*LOG, chunk(3, 1, attempt=2)) == BEGINNING
    assert place_of(*LOG, chunk(4, 1, attempt=2, gen=1)) == BEGINNING
    assert place_of(*LOG, chunk(0, 1, attempt=2, gen=1)).num_records == 1


def test_what_is_new_follows_the_record_that_proves_the_place():
    end = wire.JobEnd(
        job=JOB,
        gen=0,
        next=7,
        status=wire.JobStatus.SUCCEEDED,
        finish_reason=wire.FinishReason.LENGTH,
        prompt_tokens=1,
        cached_tokens=0,
    )
    place = place_of(*LOG[:2])
    assert place.new_in(view(*LOG[1:])) == (LOG[2],)
    assert place.new_in(view(*LOG[1:], end=end)) == (LOG[2], end)
    assert place.new_in(view(LOG[1])) == ()
    assert BEGINNING.new_in(view(*LOG)) == LOG
    assert BEGINNING.new_in(view(end=end)) == (end,)


@pytest.mark.parametrize(
    "found",
    [
        (),
        (chunk(2, 2),),  # written together
        (chunk(2, 1, attempt=2),),
        (chunk(2, 1, gen=1),),
        (chunk(3, 4),),
    ],
)
def test_invariant_1_another_log_is_not_believed(found):
    assert place_of(*LOG[:2]).new_in(view(*found)) is None


def test_a_place_is_worth_no_more_than_its_last_record_says():
    """The text does not count: indexes and who made them do."""
    other = msgspec.structs.replace(LOG[1], text="other")
    assert place_of(*LOG[:2]).new_in(view(other, LOG[2])) == (LOG[2],)
