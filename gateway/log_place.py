"""Where in a job's log a subscriber is: how many records it has, and which was the last.

A frame is one record of the log (contract/tokens), so whoever has read the log once and follows the
frames knows how long it is, and after a gap reads on instead of reading all of it again.

Invariants:
1. A place is of one log: it is believed only if the record that stands before it there is the very
   one that was had (generation, attempt, first and next index). A log that was begun anew, cut or
   written together into fewer records does not pass, and is read from its beginning.
2. Records of a log are contiguous in tokens, so what stands after that record is what comes next.

Called by: gateway/stream (keeps its place), gateway/follower (fills gaps).
"""

from __future__ import annotations

from typing import NamedTuple

from headrace.contract.tokens import LogView
from headrace.contract.wire import JobEnd, TokenChunk


class LogPlace(NamedTuple):
    num_records: int = 0  # had, from the first on; 0: none is known
    gen: int = 0  # of the last of them, as all below
    attempt: int = 0
    first: int = 0
    next: int = 0

    @property
    def begin(self) -> int:
        """The record to read from: the last one that was had, which proves the place."""
        return max(0, self.num_records - 1)

    def after(self, chunk: TokenChunk) -> LogPlace:
        """Return the place once this chunk was seen, in a frame or in the log."""
        if not self.num_records or chunk.gen > self.gen:
            return _of(chunk, 1) if chunk.first == 0 else BEGINNING
        if chunk.gen == self.gen and chunk.attempt >= self.attempt:
            if chunk.first == self.next:
                return _of(chunk, self.num_records + 1)
            if chunk.attempt > self.attempt:
                return BEGINNING  # its predecessor's last tokens were lost, and are made again
        return self  # a repeat, a straggler, or beyond a gap

    def new_in(self, view: LogView) -> tuple[TokenChunk | JobEnd, ...] | None:
        """Return what a view of the log from `begin` on holds beyond; None: it is another log."""
        chunks = view.chunks
        if self.num_records:
            if not chunks or _of(chunks[0], self.num_records) != self:
                return None
            chunks = chunks[1:]
        return chunks if view.end is None else (*chunks, view.end)


BEGINNING = LogPlace()


def _of(last: TokenChunk, num_records: int) -> LogPlace:
    return LogPlace(num_records, last.gen, last.attempt, last.first, last.next)
