"""Starting the engine on a GPU: what is refused, what goes where, and how large the pool is.

    refuse -> weights -> state -> a step of the largest kind, to see what it takes -> KV pool from
    what is then free -> scales of an fp8 pool -> graphs of all steps that only draw

Nothing is compiled but the Triton kernels, by other processes while the weights load
(gpu_compilers.py), kept in its cache on disk from then on; and nothing is tuned. The pool comes
last, so that it is given exactly what is free.

Invariants:
 1. A model that does not fit is refused before a byte of it is read, with the bytes it needs and
    the bytes there are.
 2. A head dim, dtype or device that the kernels do not serve is refused with what they do serve.
 3. The pool and everything a step needs are allocated when `build_gpu_runner` returns.

Called by: runner.build_runner; gpu_compile.py takes the same steps on the meta device.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np
import torch

from headrace.kernels import step as layout
from headrace.kernels.checks import HEAD_DIMS
from headrace.kernels.triton_seam import is_interpreted
from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.gpu_compilers import start_compilers
from headrace.worker.engine.gpu_layers import in_fp8
from headrace.worker.engine.gpu_model import GpuModel, KvCache, Need
from headrace.worker.engine.gpu_runner import GpuRunner
from headrace.worker.engine.gpu_state import DeviceState
from headrace.worker.engine.startup import StartupLedger
from headrace.worker.engine.weights import (
    Keep,
    Weights,
    as_it_is,
    count_weight_bytes,
    obtain_weights,
)
from headrace.worker.frames import EngineConfig

#: steps in flight before the oldest is collected: the device works on one while the host reads
#: another's results and prepares the next.
DEPTH = 2
#: bytes kept free of the pool for captured graphs: about 5 MiB each.
GRAPH_BYTES = 1 << 30
#: largest finite e4m3, and how far beyond what calibration saw a scale lets values go.
E4M3_MAX, SCALE_MARGIN = 448.0, 2.0
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def build_gpu_runner(
    config: EngineConfig,  # its limits filled in
    arch: Architecture,
    folder: Path,
    ledger: StartupLedger | None = None,
) -> GpuRunner:
    """Load what the config names onto the GPU; UnsupportedModel or MemoryError say why not."""
    device = torch.device("cpu") if is_interpreted() else torch.device("cuda")
    ledger = ledger or StartupLedger()
    ledger.device = device
    dtype = DTYPES[config.dtype]
    _refuse_unsupported(arch, config, dtype)
    with ledger.stage("device"):
        if device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())
        _refuse_too_large(config, arch, dtype, device)
        compilers = start_compilers(config, arch, device)
    with compilers:
        with ledger.stage("weights"):
            weights = obtain_weights(
                folder, arch, dtype, device, is_random=config.random_weights, keep=keep_of(config)
            )
        with ledger.stage("state"):
            state = make_state(config, arch, device)
            model = make_model(config, arch, weights, state, _device_name(device))
        with ledger.stage("kernels"):
            told = compilers.wait()
    with ledger.stage("first step"), torch.inference_mode():
        step_bytes = try_step(config, arch, model, state, dtype)
    with ledger.stage("KV pool"), torch.inference_mode():
        num_blocks = _count_blocks(config, arch, dtype, device, step_bytes)
        cache = allocate(config, arch, dtype, device, num_blocks)
    if config.kv_dtype == "fp8":
        with ledger.stage("KV scales"), torch.inference_mode():
            calibrate(config, arch, model, state, cache)
    runner = GpuRunner(arch, model, cache, state, DEPTH)
    with ledger.stage("graphs"):
        runner.capture()
    compilers.stamp()
    print("\n".join(told), end="\n" if told else "", file=sys.stderr, flush=True)
    return runner


def keep_of(config: EngineConfig) -> Keep:
    """Return what is made of each layer's weights as they are loaded."""
    return in_fp8 if config.weights_dtype == "fp8" else as_it_is


def make_model(
    config: EngineConfig,
    arch: Architecture,
    weights: Weights,
    state: DeviceState,
    device_name: str,
) -> GpuModel:
    """Build the model's launches as the config wants them."""
    return GpuModel(
        arch,
        weights,
        state,
        device_name,
        is_fp8_cache=config.kv_dtype == "fp8",
    )


def make_state(config: EngineConfig, arch: Architecture, device: torch.device) -> DeviceState:
    """Allocate the tables of the running sequences."""
    max_seq_tokens = min(config.max_seq_tokens or arch.max_positions, arch.max_positions)
    return DeviceState(
        num_slots=config.max_num_seqs,
        max_blocks=-(-max_seq_tokens // config.block_size),
        max_rows=config.max_step_tokens,
        vocab_size=arch.vocab_size,
        device=device,
        depth=DEPTH,
    )


def _refuse_unsupported(arch: Architecture, config: EngineConfig, dtype: torch.dtype) -> None:
    if arch.head_dim not in HEAD_DIMS:
        raise UnsupportedModel(
            f"head_dim is {arch.head_dim}; the GPU kernels run {list(HEAD_DIMS)}: serve this model "
            "on the CPU (device = cpu)"
        )
    if dtype is torch.float32 and "fp8" in (config.kv_dtype, config.weights_dtype):
        raise UnsupportedModel(
            "dtype float32 asked with fp8 for weights or KV cache; fp8 goes with bfloat16 only: "
            "set dtype to auto or bfloat16"
        )
    if config.block_size < 16 or config.block_size & (config.block_size - 1):
        raise UnsupportedModel(
            f"block_size is {config.block_size}; the GPU kernels run powers of two from 16 on: "
            "set 64 or 128"
        )


def _refuse_too_large(
    config: EngineConfig, arch: Architecture, dtype: torch.dtype, device: torch.device
) -> None:
    """Compare what must fit with what is free, before anything is read."""
    if device.type != "cuda":
        return
    free = torch.cuda.mem_get_info()[0]
    linear_itemsize = 1 if config.weights_dtype == "fp8" else dtype.itemsize
    weights = count_weight_bytes(arch, dtype.itemsize, linear_itemsize)
    block = _block_bytes(config, arch, dtype)
    least = weights + block + GRAPH_BYTES
    if least > free:
        raise MemoryError(
            f"model asked needs at least {least:,} bytes on the GPU ({weights:,} of weights, "
            f"{block:,} for one block of KV, {GRAPH_BYTES:,} for steps); {free:,} are free: use a "
            "larger GPU or a smaller model, or end what else uses this one"
        )


def try_step(
    config: EngineConfig,
    arch: Architecture,
    model: GpuModel,
    state: DeviceState,
    dtype: torch.dtype,
) -> int:
    """Launch steps of the largest kinds on nothing but padding; return the bytes they take.

    This also loads every kernel that those steps use, and compiles what no other process has.
    """
    is_cuda = state.device.type == "cuda"
    cache = allocate(config, arch, dtype, state.device, 1)
    before = 0
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    state.reset()
    state.set_blocks(np.zeros((1, 3), np.int32))
    state.begin()
    model.compute_rows(cache, state.max_rows)
    for need in Need:
        model.draw_due(state.num_slots, need)
    model.decode(cache, state.num_slots, Need.DRAW)
    model.decode(cache, 1, Need.DRAW)
    state.reset()
    if not is_cuda:
        return 0
    torch.cuda.synchronize()
    step_bytes = torch.cuda.max_memory_allocated() - before
    del cache
    torch.cuda.empty_cache()
    return step_bytes


def calibrate(
    config: EngineConfig, arch: Architecture, model: GpuModel, state: DeviceState, cache: KvCache
) -> None:
    """Set the scales of an fp8 pool from the keys and values of one prompt of random tokens.

    e4m3 keeps its relative precision over six orders of magnitude, so a scale need only put the
    largest values below its end, with room for others than these.
    """
    num_tokens = min(256, state.max_rows)
    num_blocks = -(-num_tokens // config.block_size)
    wide = allocate(
        msgspec.structs.replace(config, kv_dtype="auto"),
        arch,
        model.dtype,
        state.device,
        num_blocks,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(arch.vocab_size, (num_tokens,), generator=generator, dtype=torch.int32)
    state.words[0, layout.ALIVE] = 1
    state.tables[0, :num_blocks] = torch.arange(num_blocks, dtype=torch.int32)
    state.row_slots[:num_tokens] = 0
    state.row_tokens[:num_tokens] = tokens.to(state.device)
    state.row_positions[:num_tokens] = torch.arange(num_tokens, dtype=torch.int32)
    state.chunk_starts[1:] = num_tokens
    state.chunk_lens[0] = num_tokens
    model.compute_rows(wide, num_tokens)
    state.reset()
    for kept, scale in ((wide.k, cache.k_scale), (wide.v, cache.v_scale)):
        assert scale is not None
        largest = kept.abs().amax(dim=(1, 3, 4)).float()
        scale.copy_((largest * SCALE_MARGIN / E4M3_MAX).clamp(min=1e-6))


def _block_bytes(config: EngineConfig, arch: Architecture, dtype: torch.dtype) -> int:
    itemsize = 1 if config.kv_dtype == "fp8" else dtype.itemsize
    return arch.kv_bytes_per_token * itemsize * config.block_size


def _count_blocks(
    config: EngineConfig,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    step_bytes: int,
) -> int:
    """Return the pool's size in blocks: as asked, or all that is free."""
    block = _block_bytes(config, arch, dtype)
    free = 1 << 30
    if device.type == "cuda":
        left, total = torch.cuda.mem_get_info()
        free = left - int(total * (1 - config.gpu_memory_fraction)) - step_bytes - GRAPH_BYTES
    num_blocks = config.num_blocks or (config.kv_bytes or free) // block
    if num_blocks < 1 or num_blocks * block > free:
        raise MemoryError(
            f"KV pool asked needs {max(num_blocks, 1) * block:,} bytes in blocks of {block:,}; "
            f"{free:,} are left beside weights and steps ({step_bytes:,}), at a "
            f"gpu_memory_fraction of {config.gpu_memory_fraction}: lower kv_bytes, num_blocks or "
            "max_step_tokens, or use a larger GPU"
        )
    return num_blocks


def allocate(
    config: EngineConfig,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    num_blocks: int,
) -> KvCache:
    shape = (arch.num_layers, num_blocks, arch.num_kv_heads, config.block_size, arch.head_dim)
    is_fp8 = config.kv_dtype == "fp8"
    kind = torch.float8_e4m3fn if is_fp8 else dtype
    # Zeros, not empty: what a mask hides must still be numbers.
    k, v = (torch.zeros(shape, dtype=kind, device=device) for _ in range(2))
    if not is_fp8:
        return KvCache(k, v, None, None)
    scales = [torch.ones(arch.num_layers, arch.num_kv_heads, device=device) for _ in range(2)]
    return KvCache(k, v, *scales)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
