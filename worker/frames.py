"""The wire between a worker's courier and its engine: frames over an inherited Unix socketpair.

A frame is a u32 little-endian payload length, a u8 kind, and the payload. Both ends are of one
build and are restarted together, so there is no version field. The engine sends one `STEP` frame a
step, fixed binary, also when the step made no token: a courier that sees none for long knows that
the engine hangs, not that it is busy. Everything rare is msgpack.

Invariants:
 1. A reader yields exactly the frames written, whole and in order, however the bytes are cut.
 2. `FrameWriter.send` never blocks: what the socket does not take waits in the writer's backlog.
 3. A frame is never half-dropped: the bytes that leave are the frames' own, in order.
 4. `unpack_step(pack_step(...))` gives back every field; a payload of the wrong size is refused.
 5. A sequence gets exactly one entry whose reason is not `GOING_ON`, and none after it.

Called by: worker/engine/loop.py (the engine's end) and worker/courier (the other).

Size: a wire whose two ends are of one build is read as one text, messages and codec together.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import msgspec
import numpy as np

#: bytes; a frame beyond this is a broken peer, not a long prompt (10^6 tokens are 4 MB).
MAX_FRAME_BYTES = 64 << 20
#: bytes the writer may hold back before `is_full`; a step of 1024 tokens is 25 kB, so ~300 steps.
MAX_BACKLOG_BYTES = 8 << 20
#: bytes read from the socket at once.
READ_BYTES = 1 << 18


class FrameError(ValueError):
    """The peer sent bytes that are no frame; the connection is of no further use."""


class Kind(IntEnum):
    COMMAND = 1  # courier -> engine: Admit | Cancel | Stop
    READY = 2  # engine -> courier: once, when the model is loaded and the pool allocated
    FATAL = 3  # engine -> courier: the last frame of an engine that ends by an error
    STEP = 4  # engine -> courier: once a step
    FAILURE = 5  # engine -> courier: text for the entry with reason FAILED that follows


class Reason(IntEnum):
    """Why a sequence ended with this entry; its values are on the wire."""

    GOING_ON = 0
    STOP_TOKEN = 1  # the entry's token is the stop token; without one, a resumed output's last was
    LENGTH = 2  # max_tokens reached; without a token, when a resumed output already had them all
    CANCELED = 3  # entry without a token
    FAILED = 4  # entry without a token; a Failure frame came just before


class SamplingParams(msgspec.Struct, frozen=True, array_like=True):
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    seed: int = 0  # any 64-bit value; the courier draws one when the client names none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # 1 = off
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None = off, 0 = the chosen token's only, k = and the k likeliest


class Admit(msgspec.Struct, frozen=True, array_like=True, tag=1):
    seq_id: int  # chosen by the courier, never used twice in an engine's life
    prompt: bytes  # token ids, int32 little-endian
    output: bytes  # ids logged by an earlier attempt, int32 little-endian: prefilled, not repeated
    params: SamplingParams
    max_tokens: int  # output tokens in all, those in `output` included
    stop_token_ids: list[int] = []
    is_batch: bool = False  # batch class: runs after interactive work and is preempted first
    salt: bytes = b""  # the tenant's; prefix blocks are shared only under the same salt


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=2):
    seq_id: int  # an unknown or already ended one is ignored: the end was on its way


class Stop(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """End the engine at the next step; sequences in hand get no further entry."""


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the courier starts an engine with, as the JSON of `--config`."""

    model_folder: str  # a transformers folder: config.json and safetensors
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = float32 on a CPU
    kv_dtype: Literal["auto", "fp8"] = "auto"  # of the KV pool; auto = the model's
    weights_dtype: Literal["auto", "fp8"] = "auto"  # fp8 = linear layers with 8 bits (W8A8)
    random_weights: bool = False  # benchmarks: weights from a seed, only config.json is read
    num_threads: int = 0  # of torch on CPU; 0 = torch's own choice
    num_blocks: int | None = None  # of the KV pool; None = as many as kv_bytes hold
    kv_bytes: int | None = None  # None = what is free on a GPU; on a CPU 1 GiB
    gpu_memory_fraction: float = 0.92  # of a GPU's memory that the engine may take in all
    block_size: int = 64  # tokens
    max_seq_tokens: int | None = None  # None = what model and pool allow
    max_num_seqs: int = 0  # running at once; 0 = by device (worker/engine/startup.py: fill_limits)
    max_step_tokens: int = 0  # computed in one step, which holds decodes up so long; 0 = by device
    target_step_ms: float | None = None  # prompts are cut to keep it; 0 = off, None = by device
    runner: Literal["model", "stub"] = "model"  # stub: token i is a pure function of (seed, i)
    stub_step_ms: float = 0.0  # how long a step of the stub takes
    stub_depth: int = 0  # steps of the stub in flight before the oldest is collected
    stub_lost_steps: int = 0  # steps after which the stub's device is lost; 0 = never
    stub_poison: int = 0  # token id that makes a prompt poison (stub.py); 0 = none does
    stub_broken_by: str = ""  # a file; while it exists every step kills the stub; empty = never
    log_format: Literal["text", "json"] = "text"
    worker: str = ""  # whose engine it is, for its log
    debug_check: bool = False  # assert the invariants of pool and scheduler each step


class StartStage(msgspec.Struct, frozen=True, array_like=True):
    """A part of an engine's start."""

    name: str
    seconds: float
    num_bytes: int  # of the device's memory that it took and kept


class Ready(msgspec.Struct, frozen=True):
    num_blocks: int
    block_size: int  # tokens in a block
    max_seq_tokens: int  # prompt + output of one sequence at most
    vocab_size: int
    dtype: str  # "float32" | "bfloat16"
    load_s: float
    device: Literal["cpu", "cuda"]  # what `auto` came to
    max_num_seqs: int  # running at once
    stages: list[StartStage]  # where the start's seconds and bytes went, in order
    gpu: str = ""  # UUID of the device, as NVML writes it; empty on a CPU


class Fatal(msgspec.Struct, frozen=True):
    code: str
    text: str
    kind: str = ""  # of the exception
    where: str = ""  # `file:function`, the innermost frame of ours


class Failure(msgspec.Struct, frozen=True):
    seq_id: int
    code: str
    text: str


Command = Admit | Cancel | Stop

_HEAD = struct.Struct("<IB")
_command_decoder = msgspec.msgpack.Decoder(Command)
_ready_decoder = msgspec.msgpack.Decoder(Ready)
_fatal_decoder = msgspec.msgpack.Decoder(Fatal)
_failure_decoder = msgspec.msgpack.Decoder(Failure)


def pack_frame(kind: Kind, payload: bytes | memoryview) -> bytes:
    """Put length and kind before a payload."""
    return _HEAD.pack(len(payload), kind) + payload


def pack_command(command: Command) -> bytes:
    """Encode a whole frame, length and kind included, as the courier sends it."""
    return pack_frame(Kind.COMMAND, msgspec.msgpack.encode(command))


def pack_notice(notice: Ready | Fatal | Failure) -> bytes:
    """Encode a whole frame of one of the engine's rare messages."""
    kinds = {Ready: Kind.READY, Fatal: Kind.FATAL, Failure: Kind.FAILURE}
    return pack_frame(kinds[type(notice)], msgspec.msgpack.encode(notice))


def unpack(kind: int, payload: memoryview) -> Command | Ready | Fatal | Failure | StepFrame:
    """Decode a frame's payload by its kind; raise FrameError for what is none of ours."""
    try:
        match kind:
            case Kind.COMMAND:
                return _command_decoder.decode(payload)
            case Kind.READY:
                return _ready_decoder.decode(payload)
            case Kind.FATAL:
                return _fatal_decoder.decode(payload)
            case Kind.FAILURE:
                return _failure_decoder.decode(payload)
            case Kind.STEP:
                return unpack_step(payload)
    except msgspec.MsgspecError as error:
        raise FrameError(f"frame of kind {kind} does not decode: {error}") from error
    raise FrameError(f"frame of unknown kind {kind}: courier and engine are of different builds")


#: One token or one end. `index` is that of the token in the job's output (of the next one, when
#: there is none), so that the courier sees a gap.
ENTRY = np.dtype(
    [
        ("seq_id", "<u8"),
        ("token", "<i4"),  # -1 = none
        ("index", "<u4"),
        ("cached_tokens", "<u4"),  # prompt tokens this sequence took from the prefix cache
        ("reason", "u1"),
        ("num_logprobs", "i1"),  # -1 = none; k >= 0: the chosen token's and k others in the tail
        ("unused", "<u2"),
    ]
)
_LOGPROB = np.dtype([("token", "<i4"), ("logprob", "<f4")])


class StepStats(msgspec.Struct):
    """Figures of a step; the order of fields is their order on the wire."""

    step: int = 0  # counts from 1
    time_ns: int = 0  # CLOCK_MONOTONIC at the end of the step; shared by processes of one host
    num_preempted_total: int = 0
    prefix_hit_tokens_total: int = 0
    room_tokens: int = 0  # pool tokens minus the predicted peak of all admitted; may be negative
    num_running: int = 0
    num_waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    cached_blocks: int = 0
    prefill_tokens: int = 0  # prompt tokens computed in this step
    step_us: int = 0  # from its submission, or the end of the step before it, to its results
    predicted_output_tokens: int = 0  # mean of recent outputs; 0 = nothing known yet
    num_admits_total: int = 0  # Admit commands read so far: `room_tokens` accounts for these
    host_us: int = 0  # the engine's own work since the last frame, without waiting for results
    num_decodes: int = 0  # sequences that had one token computed in this step


@dataclass(slots=True)
class StepFrame:
    stats: StepStats
    entries: np.ndarray  # [num_entries] of ENTRY
    #: per entry with num_logprobs >= 0, in order: (chosen's logprob, [(token, logprob), ...])
    logprobs: list[tuple[float, list[tuple[int, float]]]]


_STATS = struct.Struct("<QQQQqIIIIIIIIQIII")  # StepStats, then num_entries


def pack_step(
    stats: StepStats,
    entries: np.ndarray,  # [num_entries] of ENTRY
    logprobs: Sequence[tuple[float, np.ndarray, np.ndarray]] = (),  # (chosen, ids, logprobs)
) -> bytes:
    """Encode a whole STEP frame; one tuple of logprobs for each entry that says it has them."""
    parts = [_STATS.pack(*msgspec.structs.astuple(stats), len(entries)), entries.tobytes()]
    for chosen, ids, values in logprobs:
        pairs = np.empty(len(ids), _LOGPROB)
        pairs["token"], pairs["logprob"] = ids, values
        parts += [struct.pack("<f", chosen), pairs.tobytes()]
    return pack_frame(Kind.STEP, b"".join(parts))


def unpack_step(payload: memoryview) -> StepFrame:
    """Decode a STEP payload; the entries are copied, so the reader's buffer may be reused."""
    if len(payload) < _STATS.size:
        raise FrameError(f"step frame has {len(payload)} bytes, its header alone {_STATS.size}")
    *values, num_entries = _STATS.unpack_from(payload)
    tail = _STATS.size + num_entries * ENTRY.itemsize
    if tail > len(payload):
        raise FrameError(f"step frame of {num_entries} entries has only {len(payload)} bytes")
    entries = np.frombuffer(payload, ENTRY, num_entries, _STATS.size).copy()
    logprobs: list[tuple[float, list[tuple[int, float]]]] = []
    for count in entries["num_logprobs"][entries["num_logprobs"] >= 0].tolist():
        if tail + 4 + count * _LOGPROB.itemsize > len(payload):
            raise FrameError(f"step frame of {len(payload)} bytes ends within its logprobs")
        pairs = np.frombuffer(payload, _LOGPROB, count, tail + 4)
        others = list(zip(pairs["token"].tolist(), pairs["logprob"].tolist(), strict=True))
        logprobs.append((struct.unpack_from("<f", payload, tail)[0], others))
        tail += 4 + count * _LOGPROB.itemsize
    if tail != len(payload):
        raise FrameError(f"step frame has {len(payload)} bytes, its entries say {tail}")
    return StepFrame(StepStats(*values), entries, logprobs)


class FrameReader:
    """Cut a stream of bytes into frames; feed it from a socket or by hand."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Append bytes as they came."""
        self._buffer += data

    def frames(self) -> Iterator[tuple[int, memoryview]]:
        """Yield (kind, payload) of every whole frame; payloads stay valid, they are copies."""
        start = 0
        try:
            while len(self._buffer) - start >= _HEAD.size:
                length, kind = _HEAD.unpack_from(self._buffer, start)
                if length > MAX_FRAME_BYTES:
                    raise FrameError(f"frame of {length} bytes announced: max {MAX_FRAME_BYTES}")
                end = start + _HEAD.size + length
                if len(self._buffer) < end:
                    break
                payload = memoryview(bytes(self._buffer[start + _HEAD.size : end]))
                start = end
                yield kind, payload
        finally:
            del self._buffer[:start]

    def receive(self, sock: socket.socket) -> bool:
        """Take what the socket has without waiting; return False once the peer is gone."""
        while True:
            try:
                data = sock.recv(READ_BYTES, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return True
            except ConnectionError:
                return False
            if not data:
                return False
            self.feed(data)
            if len(data) < READ_BYTES:
                return True


class FrameWriter:
    """Send frames without ever waiting for the peer; what does not fit is kept in order."""

    def __init__(self, sock: socket.socket, max_backlog_bytes: int = MAX_BACKLOG_BYTES) -> None:
        self._sock = sock
        self._max_backlog_bytes = max_backlog_bytes
        self._backlog: deque[memoryview] = deque()
        self.backlog_bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether the peer is so far behind that no more should be made for it."""
        return self.backlog_bytes > self._max_backlog_bytes

    def send(self, frame: bytes) -> None:
        """Send a packed frame as far as the socket takes it, after what still waits."""
        self._backlog.append(memoryview(frame))
        self.backlog_bytes += len(frame)
        self.flush()

    def flush(self) -> None:
        """Send of the backlog what the socket takes; raise ConnectionError if the peer is gone."""
        while self._backlog:
            head = self._backlog[0]
            try:
                sent = self._sock.send(head, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            self.backlog_bytes -= sent
            if sent == len(head):
                self._backlog.popleft()
            else:
                self._backlog[0] = head[sent:]

    def drain(self, timeout_s: float) -> bool:
        """Wait until the backlog is sent, at most this long a turn; for the last frames only."""
        while self._backlog:
            if not select.select([], [self._sock], [], timeout_s)[1]:
                return False
            self.flush()
        return True
