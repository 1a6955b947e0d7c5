"""What clients are told while a scenario looks: counts, ends, and which job a key became.

The recorder is the one place everything passes; a listener sees each record after it was written.

Called by: scenarios_stores, scenarios_streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from headrace.tests.faults.record import Answer, Asked, Chunk, Record
from headrace.tests.faults.scenario import Run


@dataclass(slots=True)
class Heard:
    """What was recorded since the context began."""

    answers: Counter[int] = field(default_factory=Counter)  # statuses of POSTs
    num_chunks: int = 0
    num_tokens: dict[str, int] = field(default_factory=dict)  # job -> max_tokens, once accepted
    canceled_at_s: dict[str, float] = field(default_factory=dict)  # job -> its stream said so
    _asked: dict[str, int] = field(default_factory=dict)

    def take(self, record: Record) -> None:
        match record:
            case Asked():
                self._asked[record.key] = record.num_tokens
            case Answer():
                self.answers[record.status] += 1
                if record.job is not None:
                    self.num_tokens[record.job] = self._asked.pop(record.key, 0)
            case Chunk():
                self.num_chunks += 1
                if b"event: canceled\n" in record.data:
                    self.canceled_at_s[record.job] = record.at_s
            case _:
                pass


@contextmanager
def heard(run: Run) -> Iterator[Heard]:
    """Listen as long as the context lasts; listeners may be nested."""
    found, add = Heard(), run.recorder.add

    def add_and_tell(record: Record) -> None:
        add(record)
        found.take(record)

    run.recorder.add = add_and_tell  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        run.recorder.add = add  # pyright: ignore[reportAttributeAccessIssue]
