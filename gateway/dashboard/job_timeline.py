"""Where a job's time went: spans from its acceptance to its end, without gaps and overlaps.

Begin and end of an attempt are Postgres' times; the points within it are the worker's, in ms after
the begin, cut to the attempt. So the spans add up to the job's time whatever the clocks say.

    accepted -- queue --> picked up -- prepare --> admitted -- prefill --> first token
             -- decode --> last token -- publish --> committed

An attempt that never told its points is `lost` (its worker died: until the next pickup, or until
the job was ended without it) or `running` (it is at work, or its worker is of an older version).

Called by: gateway/dashboard/jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import zip_longest
from typing import Any

from sqlalchemy import RowMapping

#: A row of `jobs` or `attempts`, or what looks like one.
Row = RowMapping | Mapping[str, Any]
#: A span and the column that says when it ended.
_POINTS = (("prepare", "admitted_ms"), ("prefill", "first_token_ms"), ("decode", "last_token_ms"))
#: Outcomes that the sweeper writes for an attempt whose worker is gone.
_SWEPT = ("canceled", "expired")


def timeline(row: Row, attempts: Sequence[Row], *, now: datetime) -> list[dict[str, Any]]:
    """Return the spans of a job, in order; of one that has not ended, up to now."""
    accepted: datetime = row["created_at"]
    end = max(row["finished_at"] or now, accepted)
    spans: list[dict[str, Any]] = []

    def add(name: str, begin: datetime, until: datetime, attempt: Row | None) -> None:
        if until > begin or (attempt is not None and attempt["resumed_at"] is not None):
            spans.append(
                {
                    "span": name,
                    "attempt": None if attempt is None else attempt["number"],
                    "worker": None if attempt is None else attempt["worker"],
                    "start_ms": _ms(begin - accepted),
                    "duration_ms": _ms(until - begin),
                }
            )

    at = accepted
    for attempt, following in zip_longest(attempts, attempts[1:]):
        begin = max(at, min(attempt["started_at"], end))
        add("queue", at, begin, None)
        stop = attempt["ended_at"] or (following["started_at"] if following else end)
        stop = max(begin, min(stop, end))
        at = begin
        for name, until in _points(attempt, begin, stop, is_last=following is None):
            add(name, at, until, attempt)
            at = until
    add("queue", at, end, None)
    return spans


def _points(
    attempt: Row, begin: datetime, stop: datetime, *, is_last: bool
) -> list[tuple[str, datetime]]:
    """Return the attempt's spans by name and end."""
    if attempt["resumed_at"] is None:
        outcome = attempt["outcome"]
        is_lost = outcome in _SWEPT or (outcome is None and not is_last)
        return [("lost" if is_lost else "running", stop)]
    found: list[tuple[str, datetime]] = []
    at = begin
    for name, column in _POINTS:
        if attempt[column] is not None:
            at = max(at, min(stop, begin + timedelta(milliseconds=attempt[column])))
            found.append((name, at))
    return [*found, ("publish", stop)]


def _ms(length: timedelta) -> float:
    return length / timedelta(milliseconds=1)
