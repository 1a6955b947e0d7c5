"""Who computes a step: the model, or a stub whose tokens anyone can predict.

The loop submits a batch, and collects the results of the oldest one when more than `depth` are in
flight. On a device `submit` only starts the work; a CPU has nobody else to do it, so it is done in
`collect`. The stub does all that the model does but the arithmetic: token i of a sequence is
`stub_token(seed, i)`, so that a test of the fleet can know every answer in advance, and see a lost,
repeated or reordered token. With a depth it behaves as a device does: it keeps its own state by
slot, makes tokens without being told of the last ones, and notices stop tokens by itself.

Called by: loop.py.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch

from headrace.kernels.triton_seam import is_interpreted
from headrace.worker.engine import cpu_ops, sampling
from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.batch import Batch
from headrace.worker.engine.flat import flatten
from headrace.worker.engine.model import forward
from headrace.worker.engine.sampling import Sampled
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.startup import StartupLedger, fill_limits
from headrace.worker.engine.weights import Weights, count_weight_bytes, obtain_weights
from headrace.worker.frames import EngineConfig

#: ids below are left to special tokens, so that a stub's token never is a stop token by chance.
FIRST_STUB_TOKEN = 256
#: bytes of the KV pool on a CPU where none are named.
DEFAULT_KV_BYTES = 1 << 30


class Runner(Protocol):
    dtype_name: str
    vocab_size: int
    max_positions: int
    block_size: int
    num_blocks: int  # that the pool may hand out
    depth: int  # steps that may be in flight before the oldest must be collected; 0 on a CPU

    def submit(self, batch: Batch) -> None:
        """Start a step, behind those submitted before; on a device return at once."""
        ...

    def collect(self) -> Sampled:
        """Wait for the oldest step not collected; return a next token for each of its due slots."""
        ...

    def is_ready(self) -> bool:
        """Say whether `collect` would not have to wait."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """Overwrite blocks whose content is no numbers: a masked NaN still spoils a sum.

        It takes effect behind the steps submitted before, which may still write there.
        """
        ...


def resolve_config(config: EngineConfig) -> EngineConfig:
    """Find the device that `auto` stands for here, and fill in what depends on it."""
    is_for_gpu = config.runner == "model" and _is_for_gpu(config)
    return fill_limits(msgspec.structs.replace(config, device="cuda" if is_for_gpu else "cpu"))


def build_runner(config: EngineConfig, ledger: StartupLedger | None = None) -> Runner:
    """Load what the config names; raise UnsupportedModel or MemoryError with the reason."""
    config, ledger = resolve_config(config), ledger or StartupLedger()
    folder = Path(config.model_folder)
    arch = Architecture.from_folder(folder)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.device == "cuda":
        # Only here: on a machine without a GPU nothing of Triton is loaded.
        from headrace.worker.engine.gpu_start import build_gpu_runner

        return build_gpu_runner(config, arch, folder, ledger)
    # auto is float32 on a CPU: most have no bf16 arithmetic, and small models answer many questions
    # by less than bf16 errs (SmolLM2's first token on the capital of France leads by 0.1 of 25).
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    num_blocks = _count_blocks(config, arch, dtype)
    if config.runner == "stub":
        step_s, depth = config.stub_step_ms / 1e3, config.stub_depth
        return StubRunner(
            arch, config.block_size, num_blocks, step_s, depth, config.stub_lost_steps
        )
    return _build_cpu_runner(config, arch, folder, dtype, num_blocks, ledger)


def _build_cpu_runner(
    config: EngineConfig,
    arch: Architecture,
    folder: Path,
    dtype: torch.dtype,
    num_blocks: int,
    ledger: StartupLedger,
) -> CpuRunner:
    with ledger.stage("weights", count_weight_bytes(arch, dtype.itemsize, dtype.itemsize)):
        weights = obtain_weights(folder, arch, dtype, is_random=config.random_weights)
    pool_tokens = num_blocks * config.block_size
    with ledger.stage("pool", pool_tokens * arch.kv_bytes_per_token * dtype.itemsize):
        return CpuRunner(arch, weights, config.block_size, num_blocks)


def _is_for_gpu(config: EngineConfig) -> bool:
    # Triton's interpreter stands for a GPU where it is told to: so the tests run all but the GPU.
    has_gpu = torch.cuda.is_available() or (config.device == "cuda" and is_interpreted())
    if config.device == "cuda" and not has_gpu:
        raise UnsupportedModel(
            "device cuda asked; torch finds no GPU here: install its driver and a CUDA build of "
            "torch, or set the device to cpu"
        )
    return has_gpu and config.device != "cpu"


class DeviceLost(RuntimeError):
    """The GPU does not answer any more, or a kernel failed on it: nothing on it can be trusted."""


class CpuRunner:
    """The decoder in plain torch, with its keys and values in one pool of pages."""

    depth = 0

    def __init__(
        self, arch: Architecture, weights: Weights, block_size: int, num_blocks: int
    ) -> None:
        self.dtype_name = str(weights.embedding.dtype).removeprefix("torch.")
        self.vocab_size = arch.vocab_size
        self.max_positions = arch.max_positions
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._arch = arch
        self._weights = cpu_ops.pack_weights(weights)
        self._windows = frozenset(arch.windows)
        dtype = weights.embedding.dtype
        self._cos, self._sin = cpu_ops.rope_tables(*arch.rope_cos_sin())
        shape = (arch.num_layers, num_blocks, block_size, arch.num_kv_heads, arch.head_dim)
        # Zeros, not empty: what a mask hides must still be numbers. The pages come on first use.
        self._k_cache = torch.zeros(shape, dtype=dtype)
        self._v_cache = torch.zeros(shape, dtype=dtype)
        self._logits = torch.empty(0, arch.vocab_size)
        self._submitted: Batch | None = None

    def submit(self, batch: Batch) -> None:
        assert self._submitted is None, "a CPU has no steps in flight"
        self._submitted = batch

    @torch.inference_mode()
    def collect(self) -> Sampled:
        assert self._submitted is not None, "nothing was submitted"
        batch, self._submitted = flatten(self._submitted), None
        arch = self._arch
        step = cpu_ops.CpuStep.build(
            batch,
            self._cos,
            self._sin,
            self._windows,
            self.block_size,
            arch.num_q_heads // arch.num_kv_heads,
            self._k_cache.dtype,
        )
        self._logits = forward(
            arch,
            self._weights,
            self._k_cache,
            self._v_cache,
            torch.from_numpy(batch.tokens),
            step,
            torch.from_numpy(batch.due_rows).long(),
        )
        return sampling.sample(self._logits, batch.due)

    def is_ready(self) -> bool:
        return False

    def clear(self, blocks: list[int]) -> None:
        self._k_cache[:, blocks] = 0
        self._v_cache[:, blocks] = 0


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
    ) -> None:
        if arch.vocab_size <= FIRST_STUB_TOKEN:
            raise UnsupportedModel(
                f"stub runner asked on a vocabulary of {arch.vocab_size}; it uses the ids from "
                f"{FIRST_STUB_TOKEN} on: name a model with more tokens"
            )
        if depth < 0 or step_s < 0 or num_steps_to_loss < 0:
            raise ValueError(
                f"stub runner asked with a depth of {depth}, a step of {step_s} s and a loss after "
                f"{num_steps_to_loss} steps; all must be 0 or more: correct stub_depth, "
                "stub_step_ms or stub_lost_steps"
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
        self._slots = _StubSlots(0)
        self._in_flight: deque[tuple[float, Sampled]] = deque()  # done at (monotonic), results
        self._last_done_s = 0.0

    def submit(self, batch: Batch) -> None:
        if not self._slots.num_slots:
            self._slots = _StubSlots(batch.table.max_num_seqs)
        for seq in batch.started:
            self._slots.start(seq)
        self._slots.expect_positions(batch.decode_slots, batch.decode_positions)
        sampled = self._slots.sample(batch.due_slots, self.vocab_size)
        self._last_done_s = max(self._last_done_s, time.monotonic()) + self._step_s
        self._in_flight.append((self._last_done_s, sampled))

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


def _count_blocks(config: EngineConfig, arch: Architecture, dtype: torch.dtype) -> int:
    """Return the pool's size in blocks; MemoryError if the machine does not have it."""
    block_bytes = arch.kv_bytes_per_token * dtype.itemsize * config.block_size
    kv_bytes = DEFAULT_KV_BYTES if config.kv_bytes is None else config.kv_bytes
    num_blocks = config.num_blocks or kv_bytes // block_bytes
    asked_bytes = num_blocks * block_bytes
    found_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_blocks < 1 or (config.runner == "model" and asked_bytes > found_bytes):
        raise MemoryError(
            f"KV pool of {asked_bytes:,} bytes asked in blocks of {block_bytes:,}; the worker "
            f"has {kv_bytes:,} (kv_bytes) and the machine {found_bytes:,}: set them so "
            "that at least one block fits"
        )
    return num_blocks
