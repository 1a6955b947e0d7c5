"""Who computes a step: the model, or a stub whose tokens anyone can predict.

The loop builds a batch, calls `run`, then `sample`. On a device `run` only starts the work and
`sample` waits for its results; here both are done when they return. The stub does all that the
model does but the arithmetic: token i of a sequence is `stub_token(seed, i)`, so that a test of the
fleet can know every answer in advance, and see a lost, repeated or reordered token.

Called by: loop.py.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from headrace.worker.engine import cpu_ops, sampling
from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.batch import Batch
from headrace.worker.engine.model import forward
from headrace.worker.engine.sampling import Sampled
from headrace.worker.engine.weights import Weights, load_weights
from headrace.worker.frames import EngineConfig

#: ids below are left to special tokens, so that a stub's token never is a stop token by chance.
FIRST_STUB_TOKEN = 256


class Runner(Protocol):
    dtype_name: str
    vocab_size: int
    max_positions: int
    block_size: int
    num_blocks: int  # that the pool may hand out

    def run(self, batch: Batch) -> None:
        """Compute the batch's rows into the cache."""
        ...

    def sample(self, batch: Batch) -> Sampled:
        """Return a next token for each of `batch.due`, of the batch run last."""
        ...

    def clear(self, blocks: list[int]) -> None:
        """Overwrite blocks whose content is no numbers: a masked NaN still spoils a sum."""
        ...


def build_runner(config: EngineConfig) -> Runner:
    """Load what the config names; raise UnsupportedModel or MemoryError with the reason."""
    folder = Path(config.model_folder)
    arch = Architecture.from_folder(folder)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    # auto is float32 on a CPU: most have no bf16 arithmetic, and in bf16 the embedded model's first
    # token of "What is the capital of France?" is a tie (logits 25.36 and 25.26, steps of 0.125).
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    num_blocks = _count_blocks(config, arch, dtype)
    if config.runner == "stub":
        return StubRunner(arch, config.block_size, num_blocks, config.stub_step_ms / 1e3)
    return CpuRunner(arch, load_weights(folder, arch, dtype), config.block_size, num_blocks)


class CpuRunner:
    """The decoder in plain torch, with its keys and values in one pool of pages."""

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

    @torch.inference_mode()
    def run(self, batch: Batch) -> None:
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

    @torch.inference_mode()
    def sample(self, batch: Batch) -> Sampled:
        return sampling.sample(self._logits, batch.due)

    def clear(self, blocks: list[int]) -> None:
        self._k_cache[:, blocks] = 0
        self._v_cache[:, blocks] = 0


class StubRunner:
    """Computes nothing; its tokens are a pure function of seed and index."""

    def __init__(self, arch: Architecture, block_size: int, num_blocks: int, step_s: float) -> None:
        if arch.vocab_size <= FIRST_STUB_TOKEN:
            raise UnsupportedModel(
                f"stub runner asked on a vocabulary of {arch.vocab_size}; it uses the ids from "
                f"{FIRST_STUB_TOKEN} on: name a model with more tokens"
            )
        self.dtype_name = "float32"
        self.vocab_size = arch.vocab_size
        self.max_positions = arch.max_positions
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._step_s = step_s

    def run(self, batch: Batch) -> None:
        time.sleep(self._step_s)

    def sample(self, batch: Batch) -> Sampled:
        tokens = [
            stub_token(seq.asked.params.seed, seq.num_output, self.vocab_size) for seq in batch.due
        ]
        return Sampled(np.array(tokens, np.int64), np.ones(len(tokens), bool))

    def clear(self, blocks: list[int]) -> None:
        """Do nothing: there is no cache."""


def stub_token(seed: int, index: int, vocab_size: int) -> int:
    """Return output token `index` of a stub's sequence: SplitMix64 of both, in the vocabulary."""
    mask = 2**64 - 1
    word = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & mask
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
    word ^= word >> 31
    return FIRST_STUB_TOKEN + word % (vocab_size - FIRST_STUB_TOKEN)


def _count_blocks(config: EngineConfig, arch: Architecture, dtype: torch.dtype) -> int:
    """Return the pool's size in blocks; MemoryError if the machine does not have it."""
    block_bytes = arch.kv_bytes_per_token * dtype.itemsize * config.block_size
    num_blocks = config.num_blocks or config.kv_bytes // block_bytes
    asked_bytes = num_blocks * block_bytes
    found_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_blocks < 1 or (config.runner == "model" and asked_bytes > found_bytes):
        raise MemoryError(
            f"KV pool of {asked_bytes:,} bytes asked in blocks of {block_bytes:,}; the worker "
            f"has {config.kv_bytes:,} (kv_bytes) and the machine {found_bytes:,}: set them so "
            "that at least one block fits"
        )
    return num_blocks
