"""Where one subscriber is in a job's stream: turns whatever arrives into what may be sent.

Messages come from two sides, frames as they are published and the log or row when it is read, so
they overlap, repeat and leave gaps. The cursor is pure: no I/O, no clock.

Invariants (design invariant 4; tests/gateway/test_cursor.py):
1. Token events hold the indexes next, next + 1, ... without gap or repeat, in order, until the
   stream says `reset`; then they begin again at 0.
2. A chunk beyond `next` is not sent: `is_behind` asks the caller to read the log, and what was
   dropped is found there (logged before seen).
3. A log that was begun anew (a higher `gen`), or lost its tail, is announced by `reset` before any
   of its tokens, and only where tokens were sent or claimed before. The row of a job that has ended
   does not say which attempt made which token: it is compared with what was sent.
4. One terminal event, after the last token; nothing follows it.

Called by: gateway/stream.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from sqlalchemy import RowMapping

from headrace.contract import wire
from headrace.contract.errors import InvalidEventId
from headrace.contract.specs import end_of
from headrace.gateway.job_json import logprobs_json, output_chunk, terminal_json

#: Tokens in one event at most; replays are cut, live flushes are far smaller.
MAX_EVENT_TOKENS = 256

_EVENT_ID = re.compile(r"(-1|0|[1-9][0-9]{0,8})(?:\.(0|[1-9][0-9]{0,8}))?")


@dataclass(frozen=True, slots=True)
class Event:
    """What a subscriber sees; `id` where it may resume after it."""

    name: str
    data: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Resume:
    """What a client says it has: everything before `next` of log `gen`."""

    next: int = 0
    gen: int | None = None  # None: it has nothing, so any log will do


def parse_event_id(text: str) -> Resume:
    """Read `N` or `N.G`: index of the last token seen, and the log it was of."""
    match = _EVENT_ID.fullmatch(text)
    if match is None:
        raise InvalidEventId(
            f"event id {text[:40]!r} is not one of ours; they are `N` or `N.G`, N = index of the "
            "last token seen, -1 = none: send the last id received"
        )
    index = int(match[1])
    return Resume() if index < 0 else Resume(index + 1, int(match[2] or 0))


class StreamCursor:
    """The state of one subscription: the next index to send, and of which log."""

    def __init__(self, job: str, resume: Resume) -> None:
        self._job = job
        self.next = resume.next
        self.gen = resume.gen or 0
        self.is_behind = False  # something before what arrived is missing: read the log
        self.is_done = False  # the terminal event was given
        self._sent_from = resume.next  # first index that this subscription itself sent,
        self._sent_crc = 0  # and the checksum of the ids from there to `next`
        self._is_met = resume.next == 0  # the client's claim was compared with a log
        self._attempt_seen = 0
        self._attempt_told = 0
        self._is_told = False  # that it is queued

    def meet(self, gen: int, num_tokens: int) -> list[Event]:
        """Compare what the client claims to have with the log as it is."""
        events = self._follow_log(gen)
        if num_tokens < self.next:
            events += self._start_over("the log has fewer tokens than were seen")
        return events

    def take(self, message: wire.StreamMessage) -> list[Event]:
        """Return the events that follow from a frame, or from a record of the log."""
        if self.is_done:
            return []
        if isinstance(message, wire.JobEnd):
            return self._take_end(message)
        if self._is_met and message.gen < self.gen:
            return []  # of a log that was given up
        events = self._follow_log(message.gen)
        if isinstance(message, wire.JobStarted):
            return events + self._take_start(message)
        if message.attempt > self._attempt_seen > 0 and message.first < self.next:
            # As in _take_start, whose message may be lost.
            events += self._start_over("tokens that were sent were lost and are made again")
        self._attempt_seen = max(self._attempt_seen, message.attempt)
        if message.first > self.next:
            self.is_behind = True
            return events
        return events + list(self._tokens(message))

    def take_row(self, row: RowMapping) -> list[Event]:
        """Return what is left of a job that has ended, from its row."""
        events: list[Event] = []
        if not self.is_done:
            self.is_behind = False
            end, chunk = end_of(row), output_chunk(row)
            events += self.meet(end.gen, end.next)
            if chunk is not None:
                if not self._is_as_sent(chunk):
                    events += self._start_over("tokens that were sent were made again, and differ")
                self._attempt_seen = max(self._attempt_seen, chunk.attempt)
                events += self.take(chunk)
            events += self.take(end)
        return events

    def told(self, attempt: int, worker: str | None) -> list[Event]:
        """Say that an attempt has started, once."""
        if attempt <= self._attempt_told:
            return []
        self._attempt_told = attempt
        self._attempt_seen = max(self._attempt_seen, attempt)
        data = {"job": self._job, "attempt": attempt, "worker": worker}
        return [Event("started", data)]

    def lacks_start(self, attempt: int) -> bool:
        """True when tokens of an attempt are at hand whose start was not told: it is not logged."""
        return attempt > self._attempt_told and not self.is_done

    def told_queued(self) -> list[Event]:
        """Say that the job waits, if nothing was said yet."""
        if self._is_told or self._attempt_told:
            return []
        self._is_told = True
        return [Event("queued", {"job": self._job})]

    def _take_start(self, start: wire.JobStarted) -> list[Event]:
        events: list[Event] = []
        if start.attempt > self._attempt_seen and start.next < self.next:
            # Redis lost the tail that was sent, and the attempt makes those tokens again.
            events += self._start_over("tokens that were sent were lost and are made again")
        if start.next > self.next:
            self.is_behind = True
        return events + self.told(start.attempt, start.worker)

    def _take_end(self, end: wire.JobEnd) -> list[Event]:
        events = self._follow_log(end.gen)
        if end.next < self.next:
            events += self._start_over("the job ended with fewer tokens than were sent")
        if end.next > self.next:
            self.is_behind = True
            return events
        self.is_done = True
        data = {"job": self._job, **terminal_json(end)}
        return [*events, Event(end.status.value, data, self._event_id())]

    def _follow_log(self, gen: int) -> list[Event]:
        """Go over to another log; the client is told if it holds tokens of the one before."""
        self._is_met = True
        if gen == self.gen:
            return []
        events = self._start_over("the token log was begun anew") if self.next else []
        self.gen = gen
        return events

    def _is_as_sent(self, chunk: wire.TokenChunk) -> bool:
        """True when a whole output begins with what was sent, which keeps no more than a sum."""
        ids = chunk.ids[self._sent_from : self.next]
        return crc32(array("q", ids)) == self._sent_crc

    def _start_over(self, reason: str) -> list[Event]:
        self.next = self._sent_from = self._sent_crc = 0
        self.is_behind = True
        return [Event("reset", {"job": self._job, "reason": reason})]

    def _tokens(self, chunk: wire.TokenChunk) -> Iterator[Event]:
        rest = chunk.since(self.next) if chunk.ids else None
        while rest is not None:
            count = min(len(rest.ids), MAX_EVENT_TOKENS)
            is_whole = count == len(rest.ids)
            data: dict[str, Any] = {
                "job": self._job,
                "index": rest.first,
                "count": count,
                "text": rest.text if is_whole else rest.text[: rest.ends[count - 1]],
                "token_ids": rest.ids[:count],
            }
            if rest.logprobs is not None:
                data["logprobs"] = logprobs_json(rest.logprobs[:count])
            self.next = rest.first + count
            self._sent_crc = crc32(array("q", rest.ids[:count]), self._sent_crc)
            yield Event("token", data, self._event_id())
            rest = chunk.since(self.next)

    def _event_id(self) -> str:
        return f"{self.next - 1}.{self.gen}" if self.gen else str(self.next - 1)
