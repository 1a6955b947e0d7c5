"""Where a job's time went: whatever its attempts tell, the spans have no gap and add up."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gateway.dashboard.job_timeline import timeline

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(ms: float) -> datetime:
    return BEGIN + timedelta(milliseconds=ms)


def attempt(number, started, ended=None, outcome=None, points=None, resumed_at=0):
    told = points is not None
    first, second, third = points or (None, None, None)
    return {
        "number": number,
        "worker": f"w{number}",
        "started_at": at(started),
        "ended_at": None if ended is None else at(ended),
        "outcome": outcome,
        "admitted_ms": first,
        "first_token_ms": second,
        "last_token_ms": third,
        "resumed_at": resumed_at if told else None,
    }


def spans(attempts, finished=None, now=10_000.0) -> list[tuple[str, int | None, float, float]]:
    row = {"created_at": BEGIN, "finished_at": None if finished is None else at(finished)}
    found = timeline(row, attempts, now=at(now))
    return [(s["span"], s["attempt"], s["start_ms"], s["duration_ms"]) for s in found]


def test_the_spans_of_a_plain_job():
    assert spans([attempt(1, 10, 100, "succeeded", (5, 30, 80))], 100) == [
        ("queue", None, 0, 10),
        ("prepare", 1, 10, 5),
        ("prefill", 1, 15, 25),
        ("decode", 1, 40, 50),
        ("publish", 1, 90, 10),
    ]


def test_an_attempt_that_died_is_lost_up_to_the_next_pickup():
    taken_over = [attempt(1, 10), attempt(2, 60, 100, "succeeded", (5, 10, 30))]
    assert spans(taken_over, 100)[:3] == [
        ("queue", None, 0, 10),
        ("lost", 1, 10, 50),
        ("prepare", 2, 60, 5),
    ]


def test_a_job_waits_again_after_a_hand_back():
    handed_back = [
        attempt(1, 10, 30, "handed_back", (5, None, None)),
        attempt(2, 60, 100, "succeeded", (5, 10, 30)),
    ]
    assert spans(handed_back, 100)[:5] == [
        ("queue", None, 0, 10),
        ("prepare", 1, 10, 5),
        ("publish", 1, 15, 15),
        ("queue", None, 30, 30),
        ("prepare", 2, 60, 5),
    ]


def test_what_the_sweeper_ended_was_lost_and_what_an_older_worker_ended_was_not():
    assert spans([attempt(1, 10, 100, "canceled")], 100)[1] == ("lost", 1, 10, 90)
    assert spans([attempt(1, 10, 100, "succeeded")], 100)[1] == ("running", 1, 10, 90)


def test_a_job_that_goes_on_is_shown_up_to_now():
    assert spans([], now=50) == [("queue", None, 0, 50)]
    assert spans([attempt(1, 10)], now=50)[1] == ("running", 1, 10, 40)


def test_a_job_canceled_in_the_queue_has_waited_all_its_life():
    assert spans([], 70) == [("queue", None, 0, 70)]


MS = st.integers(0, 1000)
POINT = st.none() | st.integers(-5, 2000)  # clocks of another host: anything may come


@given(
    st.lists(st.tuples(MS, st.none() | MS, st.none() | st.tuples(POINT, POINT, POINT)), max_size=4),
    st.none() | MS,
)
def test_whatever_is_told_the_spans_touch_and_add_up(parts, finished):
    starts = sorted(start for start, _, _ in parts)
    attempts = [
        attempt(number, start, None if length is None else start + length, "failed", points)
        for number, (start, (_, length, points)) in enumerate(zip(starts, parts, strict=True), 1)
    ]
    found = spans(attempts, finished, now=3000)
    end = 0.0
    for _, _, start, length in found:
        assert start == pytest.approx(end)
        assert length >= 0
        end = start + length
    assert end == pytest.approx(3000 if finished is None else finished)
