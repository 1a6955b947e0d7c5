"""Whether the fleet is well: the newest sample, the alarms, the stores' health, the history.

Invariants:
1. What is shown was sampled once for the whole fleet; a gateway adds what only it can know: whether
   it reaches Redis and Postgres, and whether samples still come.
2. With Redis away there is an answer all the same: no sample, and the alarm that says why.
3. A sample that is older than alarms.SILENCE_S is not shown as if it were now.

Called by: live_routes.py, feed.py; `alarms` also by gateway/metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from headrace.contract.errors import DatabaseUnavailable, QueueUnavailable
from headrace.contract.ledger import Ledger
from headrace.contract.live import Alarm, Live, Point, Sampled, Span
from headrace.gateway.dashboard.alarms import SILENCE_S, iso, process_alarms

#: Seconds the answer to "is Postgres there" is believed.
PING_S = 5.0

#: The form of both lists of an answer; pages and programs look for these names.
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look at the stores found."""

    sampled: Sampled | None
    is_redis_up: bool
    is_postgres_up: bool
    alarms: list[Alarm]


class Overview:
    """The operations of the overview."""

    def __init__(self, live: Live, ledger: Ledger) -> None:
        self._live = live
        self._ledger = ledger
        self._lock = threading.Lock()
        self._own: list[Alarm] = []  # those of this process, for their `since`
        self._pinged_at = float("-inf")  # monotonic s
        self._is_postgres_up = True

    def show(self, span: Span = Span.HOUR) -> State:
        """Return everything of the overview, with the history of an hour or a day."""
        look = self._look()
        points: Sequence[Point] = []
        if look.is_redis_up:
            try:
                points = self._live.history(span)
            except QueueUnavailable:
                points = []
        sample = None if look.sampled is None else look.sampled.sample
        return {**_state(look), "sample": sample, "history": columns(points)}

    def figures(self) -> State:
        """Return what the feed carries: the sample's figures beside the state of the stores."""
        look = self._look()
        sample = {} if look.sampled is None else look.sampled.sample
        return {**_state(look), **sample}

    def alarms(self) -> list[Alarm]:
        """Return the alarms that stand now."""
        return self._look().alarms

    def _look(self) -> _Look:
        found, is_redis_up = None, True
        try:
            found = self._live.sampled()
        except QueueUnavailable:
            is_redis_up = False
        is_postgres_up = self._ping()
        with self._lock:
            self._own = process_alarms(
                is_redis_up=is_redis_up,
                is_postgres_up=is_postgres_up,
                sample_age_s=None if found is None else found[1],
                at=datetime.now(UTC),
                before=self._own,
            )
            own = self._own
        sampled = found[0] if found is not None and found[1] <= SILENCE_S else None
        theirs = [] if sampled is None else sampled.alarms
        return _Look(sampled, is_redis_up, is_postgres_up, [*own, *theirs])

    def _ping(self) -> bool:
        now = time.monotonic()
        if now - self._pinged_at >= PING_S:
            self._pinged_at = now
            try:
                self._ledger.ping()
                self._is_postgres_up = True
            except DatabaseUnavailable:
                self._is_postgres_up = False
        return self._is_postgres_up


def columns(points: Sequence[Point]) -> dict[str, list[float | None]]:
    """Return points as one list a series, with `at` in Unix seconds: what charts draw."""
    names = list(points[-1]) if points else ["at"]
    return {name: [point.get(name) for point in points] for name in names}


def _state(look: _Look) -> State:
    return {
        "at": iso(datetime.now(UTC)) if look.sampled is None else look.sampled.sample["at"],
        "redis": "up" if look.is_redis_up else "away",
        "postgres": "up" if look.is_postgres_up else "away",
        "alarms": [
            {
                "code": alarm.code,
                "severity": alarm.severity.value,
                "text": alarm.text,
                "since": alarm.since,
                "model": alarm.model,
            }
            for alarm in look.alarms
        ],
    }
