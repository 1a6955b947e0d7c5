"""Who computes a step: the model on a GPU or a CPU, or a stub whose tokens anyone can predict.

The loop submits a batch, and collects the results of the oldest one when more than `depth` are in
flight. On a device `submit` only starts the work; a CPU has nobody else to do it, so it is done in
`collect`. Each runner is loaded only where it is asked for: a stub starts without torch (0.5 s of
a core instead of 2), a CPU without Triton.

Called by: loop.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import msgspec

from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.batch import Batch
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.startup import StartupLedger, fill_limits
from headrace.worker.engine.stub import StubRunner
from headrace.worker.frames import EngineConfig

#: bytes of the KV pool on a CPU where none are named.
DEFAULT_KV_BYTES = 1 << 30
#: bytes of a number in what a CPU computes in.
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


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
    if config.device == "cuda":
        from headrace.worker.engine.gpu_start import build_gpu_runner

        return build_gpu_runner(config, arch, folder, ledger)
    # auto is float32 on a CPU: most have no bf16 arithmetic, and small models answer many questions
    # by less than bf16 errs (SmolLM2's first token on the capital of France leads by 0.1 of 25).
    dtype = "float32" if config.dtype == "auto" else config.dtype
    num_blocks = _count_blocks(config, arch, ITEM_BYTES[dtype])
    if config.runner == "stub":
        step_s, depth = config.stub_step_ms / 1e3, config.stub_depth
        return StubRunner(
            arch,
            config.block_size,
            num_blocks,
            step_s,
            depth,
            num_steps_to_loss=config.stub_lost_steps,
            poison_id=config.stub_poison,
            broken_by=config.stub_broken_by,
        )
    from headrace.worker.engine.cpu_runner import build_cpu_runner

    return build_cpu_runner(config, arch, folder, dtype, num_blocks, ledger)


def _is_for_gpu(config: EngineConfig) -> bool:
    import torch

    from headrace.kernels.triton_seam import is_interpreted

    # Triton's interpreter stands for a GPU where it is told to: so the tests run all but the GPU.
    has_gpu = torch.cuda.is_available() or (config.device == "cuda" and is_interpreted())
    if config.device == "cuda" and not has_gpu:
        raise UnsupportedModel(
            "device cuda asked; torch finds no GPU here: install its driver and a CUDA build of "
            "torch, or set the device to cpu"
        )
    return has_gpu and config.device != "cpu"


def _count_blocks(config: EngineConfig, arch: Architecture, item_bytes: int) -> int:
    """Return the pool's size in blocks; MemoryError if the machine does not have it."""
    block_bytes = arch.kv_bytes_per_token * item_bytes * config.block_size
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
