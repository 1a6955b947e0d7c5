"""What a campaign writes down: every byte a client received, every row, every fault.

One line of JSON each, so that a run can be checked again from its file. Times are seconds of one
monotonic clock, that of the process which drives the campaign.

Invariants:
1. A record is written before anything is concluded from it; the checker sees nothing else.
2. Bytes are kept as they came (base64 in the file): whoever parses them is the checker's own code.
3. The recorder holds no more than its file's buffer, however long the run is.

Called by: clients (Asked, Answer, Opened, Chunk, Closed, Canceled), stage (Sample), campaign
(Row), scenarios (Fault, MayReset, Reference), checker (reads).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

#: Bytes the file's buffer holds: a record costs no system call.
BUFFER_BYTES = 1 << 18


class Asked(msgspec.Struct, frozen=True, tag=True):
    """A job that a client is about to submit, and all that decides its answer."""

    key: str  # Idempotency-Key; also the job's metadata "campaign"
    tenant: str
    seed: int
    num_tokens: int  # max_tokens; the stub never stops earlier
    prompt: list[int] | str = "p"  # as ids, whose number the usage must say, or as text
    poison: str | None = None  # how it kills its engine (HEADRACE_STUB_POISON)
    reference: str | None = None  # name of the Reference that is its answer, not the stub's tokens
    at_s: float = 0.0


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What one POST of that key got; status 0: no answer, `error` says why."""

    key: str
    status: int
    job: str | None
    at_s: float
    error: str = ""  # the problem's code, or the connection's failure
    tenant: str = ""


class Opened(msgspec.Struct, frozen=True, tag=True):
    """A stream that a subscriber was given: status of the answer, 0 = there was none."""

    job: str
    connection: int  # 0, 1, ... of this job
    last_event_id: str | None
    status: int
    at_s: float


class Chunk(msgspec.Struct, frozen=True, tag=True):
    """Bytes of a stream's body, as the socket gave them."""

    job: str
    connection: int
    at_s: float
    data: bytes


class Closed(msgspec.Struct, frozen=True, tag=True):
    """The end of a connection: `end` after the terminal event, else what ended it."""

    job: str
    connection: int
    how: str
    at_s: float


class Canceled(msgspec.Struct, frozen=True, tag=True):
    """A cancel that was asked, and its answer."""

    job: str
    status: int
    at_s: float


class MayReset(msgspec.Struct, frozen=True, tag=True):
    """The job's log and its worker died together: its stream may say `reset`."""

    job: str


class Reference(msgspec.Struct, frozen=True, tag=True):
    """The answer of a prompt in an undisturbed run."""

    name: str
    token_ids: list[int]
    text: str


class Attempt(msgspec.Struct, frozen=True):
    number: int
    worker: str
    outcome: str | None


class Row(msgspec.Struct, frozen=True, tag=True):
    """A job as Postgres has it in the end, with what hangs on it."""

    job: str
    key: str | None  # of idempotency_keys
    campaign: str | None  # the key as the job's own metadata says it
    tenant: str  # name
    status: str
    attempt: int
    finish_reason: str | None
    error_code: str | None
    prompt_tokens: int | None
    text: str | None
    token_ids: list[int] | None
    ends: list[int] | None
    gen: int | None
    is_canceled: bool  # cancellation was asked
    num_crashes: int
    dead_letter: str | None  # its signature
    attempts: list[Attempt]


class Fault(msgspec.Struct, frozen=True, tag=True):
    """Something that was done to the fleet."""

    name: str
    target: str
    at_s: float
    detail: dict[str, str | int | float | bool] = {}


class Sample(msgspec.Struct, frozen=True, tag=True):
    """A figure of a process: `rss_bytes`, `stale_writes`, ..."""

    process: str
    pid: int
    name: str
    value: float
    at_s: float


class Note(msgspec.Struct, frozen=True, tag=True):
    """A word of the campaign: the scenario, its seed, `overdue` when its deadline was reached."""

    name: str
    value: str
    at_s: float


Record = (
    Asked
    | Answer
    | Opened
    | Chunk
    | Closed
    | Canceled
    | MayReset
    | Reference
    | Row
    | Fault
    | Sample
    | Note
)


class Recorder:
    """Writes records to a file, from any thread or task."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_records = 0
        self._file = path.open("wb", BUFFER_BYTES)
        self._encoder = msgspec.json.Encoder()
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        line = self._encoder.encode(record) + b"\n"
        with self._lock:
            self._file.write(line)
            self.num_records += 1

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_records(path: Path) -> Iterator[Record]:
    """Yield a run's records in the order they were written."""
    decoder = msgspec.json.Decoder(Record)
    with path.open("rb", BUFFER_BYTES) as file:
        for line in file:
            yield decoder.decode(line)


def now_s() -> float:
    """Return the campaign's clock."""
    return time.monotonic()
