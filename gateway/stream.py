"""The events of one job for one subscriber, from wherever they are: frames, log or row.

First the subscription, then row and log, then frames. A gap, an overflow, a lost connection and a
silence all have the same cure: look at the log, and where the log cannot say, at the row.

Invariants:
1. The mailbox is open before row and log are read (follower invariant 1).
2. A frame that was lost costs at most heartbeat_s: every silence of that length asks Redis how far
   the log is, and Postgres when Redis does not know. A courier that died between its commit and
   its end record is noticed after ROW_EVERY silences, if the sweeper was not faster.
3. Redis or Postgres being away ends no stream; it goes on when they are back.
4. The log is read LOG_PAGE records at a time, the next when the one before was sent: a subscriber
   that is far behind costs one page, however long the job is. It is read on from the place this
   stream has in it (gateway/log_place), and from its beginning only where that place is not there.
5. Leaving the stream changes nothing about the job (design invariant 10).

Called by: gateway/sse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import RowMapping

from headrace.contract.errors import DatabaseUnavailable, QueueUnavailable
from headrace.contract.ledger import Ledger
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import JobEnd, JobStatus, StreamMessage, TokenChunk
from headrace.gateway.cursor import Event, StreamCursor
from headrace.gateway.follower import Follower, Mailbox
from headrace.gateway.log_place import BEGINNING
from headrace.gateway.metrics import Metrics

#: Silences after which the row is looked at although Redis says that nothing happened.
ROW_EVERY = 6
#: Records of a log that are in memory at once for one subscriber; a record is a flush of the job.
LOG_PAGE = 128


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
        self._asked_start = 0  # the attempt whose start was looked for in the row
        self._is_gone = False  # the row was deleted: nothing will come any more

    def events(self) -> Iterator[list[Event]]:
        """Yield events as they come, [] where a heartbeat is due, and stop after the end."""
        cursor = self._cursor
        with self._follower.follow(self._model, self._job) as box:
            box.place = BEGINNING
            yield from self._first_look(box)
            while not (cursor.is_done or self._is_gone):
                messages = box.take(self._heartbeat_s)
                if box.is_closed:
                    return
                events = [event for message in messages for event in self._take(box, message)]
                if box.is_behind or cursor.is_behind:
                    yield from self._read_log(box, events)
                elif not messages:
                    yield from self._check(box)
                elif events:
                    yield events

    def _first_look(self, box: Mailbox) -> Iterator[list[Event]]:
        row = self._read_row()
        if row is None:
            return
        if JobStatus(row["status"]).is_terminal:
            yield self._cursor.take_row(row)
            return
        events = self._state_events(row)
        if self._cursor.next:
            try:
                position = self._log.position(self._model, self._job)
            except QueueUnavailable:
                position = None
            if position is not None:
                events += self._cursor.meet(position.gen, position.next)
        yield from self._read_log(box, events)

    def _read_log(self, box: Mailbox, events: list[Event]) -> Iterator[list[Event]]:
        """Yield these events and all that the log holds; where it lacks some, ask the row.

        The log is read before the first are yielded: a start that is announced meanwhile is in no
        log, and must find the mailbox open.
        """
        box.catch_up()
        self._cursor.is_behind = False
        self._metrics.resyncs.inc()
        place = box.place if box.place is not None else BEGINNING
        if place.next > self._cursor.next:  # the stream has begun again
            place = BEGINNING
        begin, is_last = place.begin, False
        while not is_last:
            try:
                view = self._log.read(self._model, self._job, begin, LOG_PAGE)
            except QueueUnavailable:
                box.is_behind = True
                yield events + self._look_at_row()
                return
            found = place.new_in(view)
            if found is None:
                box.place = place = BEGINNING
                begin = 0
                continue
            begin, is_last = begin + LOG_PAGE, view.num_records < LOG_PAGE
            if events := events + self._take_page(box, found, is_last):
                yield events
            events, place = [], BEGINNING  # what follows a page has been found to be of its log

    def _take_page(
        self, box: Mailbox, found: Sequence[StreamMessage], is_last: bool
    ) -> list[Event]:
        events = [event for message in found for event in self._take(box, message)]
        has_missed = bool(found) and isinstance(found[-1], JobEnd) and not self._cursor.is_done
        if has_missed or (is_last and self._cursor.is_behind):
            events += self._look_at_row()
        return events

    def _take(self, box: Mailbox, message: StreamMessage) -> list[Event]:
        """Return what a frame or a record makes; a start that was lost is told from the row."""
        events: list[Event] = []
        if isinstance(message, TokenChunk):
            if box.place is not None:
                box.place = box.place.after(message)
            if self._cursor.lacks_start(message.attempt) and message.attempt > self._asked_start:
                self._asked_start = message.attempt
                events += self._look_at_row()
        return events + self._cursor.take(message)

    def _check(self, box: Mailbox) -> Iterator[list[Event]]:
        """After a silence: see whether anything was missed; [] where nothing was."""
        try:
            position = self._log.position(self._model, self._job)
        except QueueUnavailable:
            position = None
        cursor = self._cursor
        if position is None:
            yield self._look_at_row()
        elif position.is_ended or (position.gen, position.next) != (cursor.gen, cursor.next):
            yield from self._read_log(box, [])
        else:
            self._num_silences += 1
            yield self._look_at_row() if self._num_silences % ROW_EVERY == 0 else []

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
