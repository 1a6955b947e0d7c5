"""The events of one job for one subscriber, from wherever they are: frames, log or row.

First the subscription, then row and log, then frames. A gap, an overflow, a lost connection and a
silence all have the same cure: look at the log, and where the log cannot say, at the row.

Invariants:
1. The mailbox is open before row and log are read (follower invariant 1).
2. A frame that was lost costs at most heartbeat_s: every silence of that length asks Redis how far
   the log is, and Postgres when Redis does not know. A courier that died between its commit and
   its end record is noticed after ROW_EVERY silences, if the sweeper was not faster.
3. Redis or Postgres being away ends no stream; it goes on when they are back.
4. Leaving the stream changes nothing about the job (design invariant 10).

Called by: gateway/sse.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import RowMapping

from headrace.contract.errors import DatabaseUnavailable, QueueUnavailable
from headrace.contract.ledger import Ledger
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import JobStatus
from headrace.gateway.cursor import Event, StreamCursor
from headrace.gateway.follower import Follower, Mailbox
from headrace.gateway.metrics import Metrics

#: Silences after which the row is looked at although Redis says that nothing happened.
ROW_EVERY = 6


class JobStream:
    """One subscription to one job."""

    def __init__(
        self,
        cursor: StreamCursor,
        *,
        model: str,
        job: str,
        ledger: Ledger,
        token_log: TokenLog,
        follower: Follower,
        metrics: Metrics,
        heartbeat_s: float,
    ) -> None:
        self._cursor = cursor
        self._model = model
        self._job = job
        self._ledger = ledger
        self._log = token_log
        self._follower = follower
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s
        self._num_silences = 0
        self._is_gone = False  # the row was deleted: nothing will come any more

    def events(self) -> Iterator[list[Event]]:
        """Yield events as they come, [] where a heartbeat is due, and stop after the end."""
        cursor = self._cursor
        with self._follower.follow(self._model, self._job) as box:
            if events := self._first_look(box):
                yield events
            while not (cursor.is_done or self._is_gone):
                messages = box.take(self._heartbeat_s)
                if box.is_closed:
                    return
                events = [event for message in messages for event in cursor.take(message)]
                if box.is_behind or cursor.is_behind:
                    events += self._read_log(box)
                elif not messages:
                    events += self._check(box)
                if events or not messages:
                    yield events

    def _first_look(self, box: Mailbox) -> list[Event]:
        row = self._read_row()
        if row is None:
            return []
        if JobStatus(row["status"]).is_terminal:
            return self._cursor.take_row(row)
        events = self._state_events(row)
        if self._cursor.next:
            try:
                position = self._log.position(self._model, self._job)
            except QueueUnavailable:
                position = None
            if position is not None:
                events += self._cursor.meet(position.gen, position.next)
        return events + self._read_log(box)

    def _read_log(self, box: Mailbox) -> list[Event]:
        """Take everything the log holds; if it does not reach as far as it should, ask the row."""
        box.catch_up()
        self._cursor.is_behind = False
        self._metrics.resyncs.inc()
        try:
            view = self._log.read(self._model, self._job)
        except QueueUnavailable:
            box.is_behind = True
            return self._look_at_row()
        events: list[Event] = []
        if view.chunks and self._cursor.lacks_start(view.chunks[-1].attempt):
            events += self._look_at_row()
        events += [event for chunk in view.chunks for event in self._cursor.take(chunk)]
        if view.end is not None:
            events += self._cursor.take(view.end)
        if self._cursor.is_behind or (view.end is not None and not self._cursor.is_done):
            events += self._look_at_row()
        return events

    def _check(self, box: Mailbox) -> list[Event]:
        """After a silence: see whether anything was missed."""
        try:
            position = self._log.position(self._model, self._job)
        except QueueUnavailable:
            position = None
        if position is None:
            return self._look_at_row()
        cursor = self._cursor
        if position.is_ended or (position.gen, position.next) != (cursor.gen, cursor.next):
            return self._read_log(box)
        self._num_silences += 1
        return self._look_at_row() if self._num_silences % ROW_EVERY == 0 else []

    def _look_at_row(self) -> list[Event]:
        row = self._read_row()
        if row is None:
            return []
        if JobStatus(row["status"]).is_terminal:
            return self._cursor.take_row(row)
        return self._state_events(row)

    def _read_row(self) -> RowMapping | None:
        try:
            row = self._ledger.job(self._job)
        except DatabaseUnavailable:
            return None
        self._is_gone = row is None
        return row

    def _state_events(self, row: RowMapping) -> list[Event]:
        if row["status"] == JobStatus.RUNNING:
            return self._cursor.told(row["attempt"], row["worker"])
        return self._cursor.told_queued()
