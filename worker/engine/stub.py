"""A runner that computes nothing, so that a test of the fleet knows every answer in advance.

The stub does all that the model does but the arithmetic: token i of a sequence is
`stub_token(seed, i)`, so a lost, repeated or reordered token is seen. With a depth it behaves as a
device does: it keeps its own state by slot, makes tokens without being told of the last ones, and
notices stop tokens by itself.

It can be poisoned, for tests of what becomes of a job that kills its engine: a prompt that holds
`poison_id` followed by two more ids, KIND and K, ends the process when its output token K is due,
also after a takeover. KIND says how:

    1 segfault  SIGSEGV          5 abort   SIGABRT         9 stall  the step never ends
    2 bus       SIGBUS           6 raise   RuntimeError   10 kill   SIGKILL: as if from outside
    3 fpe       SIGFPE           7 memory  MemoryError    any other: as raise
    4 ill       SIGILL           8 exit    status 3, without a word
   11 hang      as stall, in C code that holds the interpreter's lock

Or it can be broken in itself: while the file `broken_by` exists, no step of anything is computed.

Called by: runner.build_runner, where HEADRACE_RUNNER is stub.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections import deque
from enum import IntEnum

import numpy as np

from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.batch import Batch
from headrace.worker.engine.last_words import DeviceLost
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.sequence import Sequence

#: ids below are left to special tokens, so that a stub's token never is a stop token by chance.
FIRST_STUB_TOKEN = 256


class Poison(IntEnum):
    """How a poisoned prompt ends its engine; the values are ids in its prompt."""

    SEGFAULT = 1
    BUS = 2
    FPE = 3
    ILL = 4
    ABORT = 5
    RAISE = 6
    MEMORY = 7
    EXIT = 8
    STALL = 9
    KILL = 10
    HANG = 11


_SIGNALS = {
    Poison.SEGFAULT: signal.SIGSEGV,
    Poison.BUS: signal.SIGBUS,
    Poison.FPE: signal.SIGFPE,
    Poison.ILL: signal.SIGILL,
    Poison.ABORT: signal.SIGABRT,
    Poison.KILL: signal.SIGKILL,
}


class StubRunner:
    """Computes nothing; its tokens are a pure function of seed and index."""

    def __init__(
        self,
        arch: Architecture,
        block_size: int,
        num_blocks: int,
        step_s: float,
        depth: int = 0,
        num_steps_to_loss: int = 0,  # 0 = the device is never lost
        poison_id: int = 0,  # 0 = no prompt is poison
        broken_by: str = "",  # a file; empty = never
    ) -> None:
        if arch.vocab_size <= FIRST_STUB_TOKEN:
            raise UnsupportedModel(
                f"stub runner asked on a vocabulary of {arch.vocab_size}; it uses the ids from "
                f"{FIRST_STUB_TOKEN} on: name a model with more tokens"
            )
        if depth < 0 or step_s < 0 or num_steps_to_loss < 0 or poison_id < 0:
            raise ValueError(
                f"stub runner asked with a depth of {depth}, a step of {step_s} s, a loss after "
                f"{num_steps_to_loss} steps and the poison {poison_id}; all must be 0 or more: "
                "correct stub_depth, stub_step_ms, stub_lost_steps or stub_poison"
            )
        self.dtype_name = "float32"
        self.vocab_size = arch.vocab_size
        self.max_positions = arch.max_positions
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.depth = depth
        self._step_s = step_s
        self._num_steps_to_loss = num_steps_to_loss
        self._num_collected = 0
        self._poison_id, self._broken_by = poison_id, broken_by
        self._poisons: dict[int, tuple[int, int]] = {}  # slot -> kind, output token it dies at
        self._slots = _StubSlots(0)
        self._in_flight: deque[tuple[float, Sampled]] = deque()  # done at (monotonic), results
        self._last_done_s = 0.0

    def submit(self, batch: Batch) -> None:
        if self._broken_by and os.path.exists(self._broken_by):
            raise RuntimeError(
                "the stub is broken, as stub_broken_by asks: remove the file it names"
            )
        if not self._slots.num_slots:
            self._slots = _StubSlots(batch.table.max_num_seqs)
        for seq in batch.started:
            self._slots.start(seq)
            if self._poison_id:
                self._poisons.pop(seq.slot, None)
                if (poison := poison_of(seq.asked.prompt, self._poison_id)) is not None:
                    self._poisons[seq.slot] = poison
        self._slots.expect_positions(batch.decode_slots, batch.decode_positions)
        if self._poisons:
            self._take_poison(batch.due_slots)
        sampled = self._slots.sample(batch.due_slots, self.vocab_size)
        self._last_done_s = max(self._last_done_s, time.monotonic()) + self._step_s
        self._in_flight.append((self._last_done_s, sampled))

    def _take_poison(self, due_slots: np.ndarray) -> None:
        num_outputs = self._slots.num_outputs(due_slots)
        for slot, num_output in zip(due_slots.tolist(), num_outputs, strict=True):
            kind, dies_at = self._poisons.get(slot, (0, 0))
            if kind and num_output is not None and num_output >= dies_at:
                die(kind)

    def collect(self) -> Sampled:
        done_s, sampled = self._in_flight.popleft()
        self._num_collected += 1
        if self._num_steps_to_loss and self._num_collected > self._num_steps_to_loss:
            raise DeviceLost(
                f"the stub's device was lost after {self._num_steps_to_loss} steps, as "
                "stub_lost_steps asks: set it to 0 where this is no test"
            )
        if (left_s := done_s - time.monotonic()) > 0:
            time.sleep(left_s)
        return sampled

    def is_ready(self) -> bool:
        # As late as may be, so that what runs against the stub meets every result at its latest.
        return len(self._in_flight) > self.depth and self._in_flight[0][0] <= time.monotonic()

    def clear(self, blocks: list[int]) -> None:
        """Do nothing: there is no cache."""


class _StubSlots:
    """What a device knows by slot, and the host may not know yet; [num_slots] each."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._seeds = np.zeros(num_slots, np.uint64)
        self._num_prompt = np.zeros(num_slots, np.int64)
        self._num_output = np.zeros(num_slots, np.int64)
        self._is_dead = np.ones(num_slots, bool)  # a stop token was made: rows mean nothing
        self._stop_ids = np.full((num_slots, 1), -1, np.int64)  # [num_slots, most of any], -1 = no

    def start(self, seq: Sequence) -> None:
        """Forget who had the slot, and take a sequence's parameters and its output so far."""
        slot, stop_ids = seq.slot, seq.asked.stop_token_ids
        self._seeds[slot] = seq.asked.params.seed % 2**64
        self._num_prompt[slot], self._num_output[slot] = seq.num_prompt, seq.num_output
        self._is_dead[slot] = False
        if (wider := len(stop_ids) - self._stop_ids.shape[1]) > 0:
            self._stop_ids = np.pad(self._stop_ids, ((0, 0), (0, wider)), constant_values=-1)
        self._stop_ids[slot] = -1
        self._stop_ids[slot, : len(stop_ids)] = stop_ids

    def expect_positions(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Stop a host that has lost count of its decodes."""
        expected = self._num_prompt[slots] + self._num_output[slots] - 1
        wrong = np.flatnonzero((expected != positions) & ~self._is_dead[slots])
        if len(wrong):
            raise RuntimeError(
                f"decodes of slots {slots[wrong].tolist()} are at {expected[wrong].tolist()} on "
                f"the device; the batch says {positions[wrong].tolist()}: the scheduler is wrong"
            )

    def num_outputs(self, slots: np.ndarray) -> list[int | None]:
        """Return how many output tokens each has; None of a dead one."""
        rows = zip(self._num_output[slots].tolist(), self._is_dead[slots].tolist(), strict=True)
        return [None if is_dead else num_output for num_output, is_dead in rows]

    def sample(self, slots: np.ndarray, vocab_size: int) -> Sampled:
        """Make a token for each slot; for dead ones what nobody should read."""
        is_alive = ~self._is_dead[slots]
        tokens = stub_tokens(self._seeds[slots], self._num_output[slots], vocab_size)
        is_stop = (self._stop_ids[slots] == tokens[:, None]).any(axis=1) & is_alive
        self._num_output[slots] += 1
        self._is_dead[slots] |= is_stop
        return Sampled(np.where(is_alive, tokens, np.int64(-(2**30))), is_alive, is_stop)


def stub_tokens(
    seeds: np.ndarray,  # [num_rows] uint64
    indices: np.ndarray,  # [num_rows] int64
    vocab_size: int,
) -> np.ndarray:  # [num_rows] int64
    """Return output token `index` of each: SplitMix64 of seed and index, in the vocabulary."""
    word = seeds * np.uint64(0x9E3779B97F4A7C15)
    word += (indices + 1).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return FIRST_STUB_TOKEN + (word % np.uint64(vocab_size - FIRST_STUB_TOKEN)).astype(np.int64)


def stub_token(seed: int, index: int, vocab_size: int) -> int:
    """Return output token `index` of one stub's sequence."""
    seeds, indices = np.array([seed % 2**64], np.uint64), np.array([index])
    return int(stub_tokens(seeds, indices, vocab_size)[0])


def poison_of(prompt: bytes, poison_id: int) -> tuple[int, int] | None:
    """Return what follows the poison's id in a prompt, the kind and K; None where it is sound."""
    ids = np.frombuffer(prompt, "<i4")
    for at in np.flatnonzero(ids[:-2] == poison_id).tolist():
        return int(ids[at + 1]), int(ids[at + 2])
    return None


def die(kind: int) -> None:
    """End this process, or this step never, as a kind of poison does."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a test of a thousand deaths leaves no cores
    if kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[Poison(kind)])
    while kind in (*_SIGNALS, Poison.STALL):  # a signal may take a moment
        time.sleep(3600)
    mutex = ctypes.create_string_buffer(128)  # a pthread_mutex_t, unlocked, and room enough
    while kind == Poison.HANG:  # PyDLL keeps the lock; the second call waits for the first
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    if kind == Poison.EXIT:
        os._exit(3)
    if kind == Poison.MEMORY:
        raise MemoryError("the prompt is poison: its step needs more memory than there is")
    raise RuntimeError(f"the prompt is poison of kind {kind}: its step cannot be computed")
