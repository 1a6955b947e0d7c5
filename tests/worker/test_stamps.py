"""The line that attempts table, spans and metrics cut: without gaps, whatever was not reached."""

from headrace.worker.stamps import Stamps


def lengths(stamps: Stamps) -> dict[str, float]:
    return {name: end - begin for name, begin, end in stamps.points()}


def whole(**changes) -> Stamps:
    points = {"picked_up_at": 10.0, "admitted_at": 11.0, "first_token_at": 13.0}
    points |= {"last_token_at": 17.0, "committed_at": 25.0, "waited_s": 0.5}
    return Stamps(**(points | changes))


def test_the_parts_of_a_whole_attempt_add_up_to_its_time():
    parts = lengths(whole())
    assert parts == {"queue": 0.5, "prepare": 1, "prefill": 2, "decode": 4, "publish": 8}
    assert sum(parts.values()) == 25.0 - 10.0 + 0.5


def test_what_was_not_reached_has_no_part_and_leaves_no_gap():
    canceled = whole(first_token_at=None, last_token_at=None)
    assert lengths(canceled) == {"queue": 0.5, "prepare": 1, "publish": 14}
    refused = whole(admitted_at=None, first_token_at=None, last_token_at=None)
    assert lengths(refused) == {"queue": 0.5, "publish": 15}


def test_time_given_to_an_attempt_that_died_is_not_the_queues():
    assert lengths(whole(was_lost=True))["lost"] == 0.5


def test_the_attempts_table_gets_milliseconds_after_the_pickup():
    told = whole().timings(resumed_at=2, num_tokens=5)
    assert (told.admitted_ms, told.first_token_ms, told.last_token_ms) == (1000, 3000, 7000)
    assert (told.resumed_at, told.num_tokens) == (2, 5)
    refused = whole(admitted_at=None, first_token_at=None, last_token_at=None)
    assert refused.timings(resumed_at=0, num_tokens=0).admitted_ms is None
