"""The messages gateway, worker and tasks exchange through Redis: msgpack, versioned, closed.

Invariants:
1. Each message has `v`; a decoder refuses another version and unknown fields (`WireError`), so a
   rolling upgrade fails loudly instead of guessing.
2. A `TokenChunk` says which indexes it holds: `first` and one id a token. A reader can always see
   a gap, an overlap, and (by `gen`) that a log was begun anew.
3. `ends[i]` is the length of the chunk's text after its token i, in characters, so a chunk can be
   cut between any two tokens and every subscriber may resume at any index.
4. The bytes of each message are pinned by tests/golden/*.

Called by: contract.streams, contract.tokens, gateway and courier. Never pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec

from headrace.contract.errors import HeadraceError

#: Version of every message below; bumped together.
VERSION = 1


class WireError(HeadraceError):
    """Bytes that are not a message of this version."""

    code = "wire"


class JobClass(StrEnum):
    INTERACTIVE = "interactive"
    BATCH = "batch"


class Priority(StrEnum):
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class JobStatus(StrEnum):
    """States of a job, and who makes each transition; nothing else assigns one.

    (new) -> QUEUED               [ledger.accept_job]
    QUEUED -> RUNNING             [ledger.pick_up]
    RUNNING -> QUEUED             [ledger.hand_back]     drain
    RUNNING -> QUEUED, FAILED     [crashes.record, crashes.found_lost]  its engine or worker died
    RUNNING -> RUNNING            [ledger.pick_up]       takeover: the attempt grows
    RUNNING -> SUCCEEDED, FAILED, CANCELED, EXPIRED      [ledger.finish]
    QUEUED -> CANCELED            [ledger.request_cancel]  no attempt was made; else end_queued
    QUEUED -> EXPIRED             [ledger.expire_queued]   likewise
    QUEUED -> CANCELED, EXPIRED   [ledger.end_queued]      handed back: ends with its output
    """

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class FinishReason(StrEnum):
    STOP = "stop"  # an end token of the model, or a stop string
    LENGTH = "length"
    CANCELED = "canceled"
    EXPIRED = "expired"
    ERROR = "error"


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    v: int = VERSION


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How tokens are chosen; ranges are checked at the gateway (gateway/jobs)."""

    max_tokens: int = 256
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    seed: int = 0  # drawn at accept where the client gave none, so a resume repeats the noise
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None = off, 0 = the chosen token's, k = also the k likeliest


class JobSpec(_Message, frozen=True, tag="job"):
    """All a worker needs to run a job: the payload of a lane's entry."""

    job: str
    tenant: str
    model: str
    job_class: JobClass
    priority: Priority
    sampling: Sampling
    prompt: str | None = None  # exactly one of the three
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    deadline_ms: int | None = None  # Unix time
    traceparent: str | None = None  # W3C trace context, checked: parent of the spans


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), likeliest first


class TokenChunk(_Message, frozen=True, tag="tokens"):
    """A run of tokens of one job: what one flush adds to its log."""

    job: str
    attempt: int
    gen: int
    first: int  # index of the first token
    ids: tuple[int, ...]
    text: str
    ends: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def next(self) -> int:
        """Index after the last token."""
        return self.first + len(self.ids)

    def since(self, index: int) -> TokenChunk | None:
        """Return the part of the chunk from token `index` on; None when nothing is left."""
        skip = index - self.first
        if skip <= 0:
            return self
        if skip >= len(self.ids):
            return None
        start = self.ends[skip - 1]
        return msgspec.structs.replace(
            self,
            first=index,
            ids=self.ids[skip:],
            text=self.text[start:],
            ends=tuple(end - start for end in self.ends[skip:]),
            logprobs=None if self.logprobs is None else self.logprobs[skip:],
        )


class JobStarted(_Message, frozen=True, tag="started"):
    """Published at pickup; not logged (the job's row says the same)."""

    job: str
    attempt: int
    gen: int
    next: int  # tokens already in the log: what this attempt goes on after
    worker: str


class JobEnd(_Message, frozen=True, tag="end"):
    """The last record of a log, written after the result row is committed."""

    job: str
    gen: int
    next: int  # number of tokens of the whole output
    status: JobStatus
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    error_code: str | None = None
    error_text: str | None = None


class GpuFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What NVML says of a GPU."""

    name: str
    utilization: float  # 0..1, share of the last second a kernel ran
    memory_used_bytes: int
    memory_total_bytes: int
    power_w: float
    temperature_c: float


class WorkerState(StrEnum):
    """What a worker says of itself; its transitions are drawn in worker/duty.py."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DRAINED = "drained"
    QUARANTINED = "quarantined"
    BROKEN = "broken"  # its engines die before they serve: it takes nothing, and tries again


class WorkerBeat(_Message, frozen=True, tag="beat"):
    """A worker's heartbeat: state, the engine's last step, counts since the worker's start.

    Totals only grow while the worker's process lives, also over engines that died; means and rates
    are of the time since the beat before.
    """

    worker: str
    model: str
    host: str
    pid: int
    state: str  # WorkerState
    started_ms: int
    step: int
    step_age_ms: int  # since the engine's last step, 0 while it has no work
    num_running: int
    num_waiting: int
    free_blocks: int
    total_blocks: int
    engine_restarts: int = 0  # after deaths; those that were ordered do not count
    version: str = ""
    engine_pid: int = 0  # 0 = there is none
    engine_died_ms: int = 0  # Unix time of the last death; 0 = none died
    step_timeout_ms: int = 30_000  # an engine with work and no step for so long is ended
    gpus: tuple[GpuFigures, ...] = ()
    cached_blocks: int = 0
    max_num_seqs: int = 0
    num_held: int = 0  # jobs leased to this worker
    num_preempted: int = 0  # so far
    prompt_tokens_total: int = 0  # of sequences the engine ran: computed, or found in its cache
    prefix_hit_tokens_total: int = 0  # of those, found in its cache
    tokens_total: int = 0  # output tokens
    tokens_per_s: float = 0.0
    step_us: int = 0  # mean; 0 = no step
    batch: float = 0.0  # mean number of sequences that a step decoded
    latencies: dict[str, tuple[int, ...]] = {}  # latency_bounds.KINDS -> counts since the start


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the fleet knows of a served model (row of `models`, written by its workers)."""

    name: str
    folder: str  # where its tokenizer can be read by a gateway on the same host or volume
    max_seq_tokens: int
    vocab_size: int
    dtype: str
    has_chat_template: bool


Message = JobSpec | TokenChunk | JobStarted | JobEnd | WorkerBeat
StreamMessage = TokenChunk | JobStarted | JobEnd

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Decode one message; raise WireError for another version or anything malformed."""
    try:
        message = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"message of {len(data)} bytes cannot be read: {error}") from None
    if message.v != VERSION:
        raise WireError(f"message has version {message.v}; this process speaks {VERSION}: upgrade")
    return message


def decode_stream(data: bytes) -> StreamMessage:
    """Decode a message of a job's stream."""
    message = decode(data)
    if isinstance(message, JobSpec | WorkerBeat):
        raise WireError(f"{type(message).__name__} does not belong to a job's stream")
    return message


def split_frame(frame: bytes) -> Iterator[bytes]:
    """Yield the u32-prefixed (big-endian) messages of a shard frame (see tokens.APPEND)."""
    at = 0
    while at < len(frame):
        start = at + 4
        at = start + int.from_bytes(frame[at:start], "big")
        if start > len(frame) or at > len(frame):
            raise WireError(f"frame of {len(frame)} bytes is cut short: a message ends at {at}")
        yield frame[start:at]
