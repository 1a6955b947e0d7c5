"""The model on a CPU: the decoder in plain torch.

Called by: runner.build_runner.
"""

from __future__ import annotations

from pathlib import Path

import torch

from headrace.worker.engine import cpu_ops, sampling
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.batch import Batch
from headrace.worker.engine.flat import flatten
from headrace.worker.engine.model import forward
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.startup import StartupLedger
from headrace.worker.engine.weights import Weights, count_weight_bytes, obtain_weights
from headrace.worker.frames import EngineConfig


def build_cpu_runner(
    config: EngineConfig,
    arch: Architecture,
    folder: Path,
    dtype_name: str,
    num_blocks: int,
    ledger: StartupLedger,
) -> CpuRunner:
    """Load the weights and make the pool."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    dtype = getattr(torch, dtype_name)
    with ledger.stage("weights", count_weight_bytes(arch, dtype.itemsize, dtype.itemsize)):
        weights = obtain_weights(folder, arch, dtype, is_random=config.random_weights)
    pool_tokens = num_blocks * config.block_size
    with ledger.stage("pool", pool_tokens * arch.kv_bytes_per_token * dtype.itemsize):
        return CpuRunner(arch, weights, config.block_size, num_blocks)


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
