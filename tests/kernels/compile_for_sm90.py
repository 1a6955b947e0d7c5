"""Compile every kernel for sm_90 as its launcher would launch it, on a machine without a GPU.

Run as a program, without TRITON_INTERPRET. It calls the launchers on meta tensors (which have
shapes and no values, so a launcher that read a value would fail here), catches each launch at
Triton's JITFunction, and compiles exactly those arguments, tile sizes and warps: what is launched
alike twice once, in as many processes as there are cores. Prints one JSON line a launch: kernel,
dtype, head_dim, bytes of shared memory, and whether its matrix products became tensor-core
instructions.

bf16, the dtype served, is compiled in every form that a launcher has; fp32 and fp16 in one each.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from headrace.kernels.decode_layers import decode_layers
from headrace.kernels.decode_merge import merge_splits
from headrace.kernels.decode_work import DecodeWork
from headrace.kernels.embed import embed_rms_norm
from headrace.kernels.fp8 import FP8, quantise_rows
from headrace.kernels.layers_work import LayersTuning, LayersWork, LayerTensors
from headrace.kernels.lm_head import lm_head_draw, lm_head_work
from headrace.kernels.logprobs import chosen_logprobs, logprobs_rows, logprobs_work
from headrace.kernels.noise import noise
from headrace.kernels.paged_decode import paged_decode
from headrace.kernels.paged_prefill import paged_prefill
from headrace.kernels.penalise import penalise_rows
from headrace.kernels.qkv_rope_write import qkv_rope_write
from headrace.kernels.rms_norm import residual_rms_norm, residual_rms_norm_fp8, rms_norm
from headrace.kernels.sample import sample, sample_work
from headrace.kernels.silu_mul import silu_mul, silu_mul_fp8
from headrace.kernels.skinny_linear import SkinnyWorkspace, skinny_linear
from headrace.kernels.step import commit_step, prepare_step, state_width, write_words
from headrace.kernels.tuning import SkinnyConfig

#: Every head dim in bf16, the dtype served; of fp32, that which takes most shared memory.
COMPILED_HEAD_DIMS = {
    torch.float32: (256,),
    torch.float16: (128,),
    torch.bfloat16: (64, 96, 128, 256),
}
TYPE_NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


def describe(values: dict[str, Any], constexprs: set[str]) -> tuple[dict, dict, dict]:
    """Sort arguments as Triton's launcher would: (signature, constants, alignment)."""
    signature, constants, attrs = {}, {}, {}
    for index, (name, value) in enumerate(values.items()):
        if name in constexprs or value is None or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPE_NAMES[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attrs


@dataclass(frozen=True)
class Build:
    """A kernel and all that Triton would compile it for."""

    kernel: JITFunction
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return repr(
            (self.kernel.__name__, self.signature, self.constants, self.attrs, self.options)
        )


def build_of(kernel: JITFunction, args: tuple, kwargs: dict) -> Build:
    names = ("num_warps", "num_stages", "maxnreg")
    options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    names = [param.name for param in kernel.params]
    values = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    constexprs = {param.name for param in kernel.params if param.is_constexpr}
    described = describe({name: values[name] for name in names}, constexprs)
    return Build(kernel, *described, options)


def compile_build(build: Build) -> dict[str, Any]:
    source = ASTSource(build.kernel, build.signature, build.constants, build.attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=build.options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": build.kernel.__name__,
        "shared_bytes": compiled.metadata.shared,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "has_mma": "mma.sync" in ptx or "wgmma" in ptx,
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def row_launches(dtype: torch.dtype) -> None:
    """Launch what works on rows of hidden states (hidden 576 is SmolLM2's, 4096 an 8B's)."""
    for hidden in (576, 4096) if dtype == torch.bfloat16 else (576,):
        x, weight = meta(64, hidden, dtype=dtype), meta(hidden, dtype=dtype)
        rms_norm(x, weight, 1e-6)
        residual, rows = meta(64, hidden, dtype=torch.float32), meta(64, dtype=torch.int32)
        residual_rms_norm(x, residual, weight, 1e-6)
        residual_rms_norm(x, residual, weight, 1e-6, rows=rows)
        residual_rms_norm_fp8(x, residual, weight, 1e-6)
        embed_rms_norm(rows, meta(1000, hidden, dtype=dtype), weight, 1e-6)
        quantise_rows(x)
    silu_mul(meta(64, 2 * 1536, dtype=dtype))
    silu_mul_fp8(meta(64, 2 * 14336, dtype=dtype))


def head_launches(dtype: torch.dtype, head_dim: int) -> None:
    """Launch what works on heads, with three query heads a KV head as SmolLM2 has."""
    num_q_heads, num_kv_heads, block_size, num_tokens = 9, 3, 64, 48
    cache = meta(8, block_size, num_kv_heads, head_dim, dtype=dtype)
    qkv = meta(num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    table = meta(1024, head_dim // 2, dtype=torch.float32)
    indexes = meta(num_tokens, dtype=torch.int32)
    norm = meta(head_dim, dtype=dtype)
    rope = (qkv, table, table, indexes, indexes, cache, cache, num_q_heads)
    q = qkv_rope_write(*rope, q_norm=norm, k_norm=norm)
    if head_dim == 64:
        qkv_rope_write(*rope)
    scale, fp8_cache = meta(num_kv_heads, dtype=torch.float32), cache.to(FP8)
    fp8_rope = (qkv, table, table, indexes, indexes, fp8_cache, fp8_cache, num_q_heads)
    qkv_rope_write(*fp8_rope, norm, norm, bias=qkv[0], k_scale=scale, v_scale=scale)
    tables = meta(num_tokens, 32, dtype=torch.int32)
    paged_decode(q, cache, cache, tables, indexes, 0.125)
    starts = meta(num_tokens + 1, dtype=torch.int32)
    paged_prefill(q, cache, cache, tables, starts, indexes, 0.125)
    heads = (num_q_heads, num_kv_heads, head_dim)
    merge_splits(DecodeWork.allocate(num_tokens, heads, q.device), q)
    if head_dim == 128 and dtype == torch.bfloat16:
        chosen = {"table_rows": indexes, "k_scale": scale, "v_scale": scale}
        pages = (fp8_cache, fp8_cache, tables)
        paged_decode(q, *pages, indexes, 0.125, **chosen)
        paged_prefill(q, *pages, starts, indexes, 0.125, 1000, **chosen)


def linear_launches(dtype: torch.dtype) -> None:
    """Launch a narrow linear layer in each form and prologue, at the tiles' most rows too."""
    n, k = 1024, 3072
    weight, norm, bias = meta(n, k, dtype=dtype), meta(k, dtype=dtype), meta(n, dtype=dtype)
    scratch = meta(1 << 22, dtype=torch.float32), meta(4096, dtype=torch.int32)
    workspace = SkinnyWorkspace(*scratch)
    tiles = SkinnyConfig("tiles", 32, 64, 4, num_stages=3)
    configs = [(2, SkinnyConfig("rows", 4, 1024, num_stages=3)), (64, tiles)]
    if dtype == torch.bfloat16:
        configs.append((1, SkinnyConfig("rows", 4, 4096, uses_pdl=True)))
        configs.append((16, replace(tiles, uses_pdl=True)))
        wide = SkinnyConfig("tiles", 128, 64, 1, num_warps=8, num_stages=3, block_m=128)
        configs.append((256, wide))
    for m, config in configs:
        stream, residual = meta(m, k, dtype=torch.float32), meta(m, n, dtype=torch.float32)
        options = {"config": config, "workspace": workspace}
        skinny_linear(stream, weight, prologue="rms_norm", norm_weight=norm, **options)
        if dtype == torch.bfloat16:
            gate_up = meta(m, 2 * k, dtype=dtype)
            skinny_linear(gate_up, weight, prologue="silu_mul", residual=residual, **options)
            skinny_linear(meta(m, k, dtype=dtype), weight, bias=bias, **options)


def layers_launches(dtype: torch.dtype) -> None:
    """Launch all layers of a step in one: a narrow model and, in bf16, a wide one with a window."""
    hidden, inter, head_dim = 576, 1536, 64
    kinds = [((9, 3, head_dim), LayersTuning(128, 1024), None)]
    if dtype == torch.bfloat16:
        kinds.append(((12, 4, head_dim), LayersTuning(128, 512, held_bytes=0), 300))
    for heads, tuning, window in kinds:
        q, width = heads[0] * head_dim, (heads[0] + 2 * heads[1]) * head_dim
        row, angles = meta(1, dtype=torch.int32), meta(1024, head_dim // 2, dtype=torch.float32)
        norm, head_norm = meta(hidden, dtype=dtype), meta(head_dim, dtype=dtype)
        layer = LayerTensors(
            norm, meta(width, hidden, dtype=dtype), meta(width, dtype=dtype), head_norm, head_norm,
            meta(hidden, q, dtype=dtype), norm, norm, meta(2 * inter, hidden, dtype=dtype),
            meta(2 * inter, dtype=dtype), meta(hidden, inter, dtype=dtype), norm,
        )  # fmt: skip
        work = LayersWork.allocate([layer, layer], [window, window], heads, tuning)
        cache, tables = (
            meta(2, 8, heads[1], 64, head_dim, dtype=dtype),
            meta(8, 32, dtype=row.dtype),
        )
        embedding = meta(1000, hidden, dtype=dtype)
        decode_layers(
            work, embedding, row, row, row, row, row, tables, angles, angles, cache, cache, 1e-6
        )


def lm_head_launches(dtype: torch.dtype) -> None:
    """Launch what reads the lm_head's weight, in the tile of each batch size."""
    f32, i32 = meta(1024, dtype=torch.float32), meta(1024, dtype=torch.int32)
    seeds, weight = meta(1024, 2, dtype=torch.int32), meta(49152, 576, dtype=dtype)
    for num_rows in (1, 64, 256) if dtype == torch.bfloat16 else (256,):
        x, rows = meta(num_rows, 576, dtype=dtype), meta(num_rows, dtype=torch.int32)
        work = lm_head_work(num_rows, 49152, x.device)
        lm_head_draw(x, weight, rows, f32, seeds, i32, work)
    ids = meta(256, 20, dtype=torch.int32)
    listed = (logprobs_work(256, 49152, x.device), ids, ids.float())
    chosen_logprobs(x, weight, rows, i32, rows, *listed, meta(256, dtype=torch.float32))


def sampling_launches() -> None:
    """Launch what works on logits, with tables that are columns of one state."""
    logits, rows = meta(16, 49152, dtype=torch.float32), meta(16, dtype=torch.int32)
    state = meta(1024, 64, dtype=torch.int32)
    i32, f32, seeds = state[:, 3], state.view(torch.float32)[:, 5], state[:, 6:8]
    sample(logits, rows, f32, i32, f32, f32, seeds, i32, sample_work(16, 49152, logits.device))
    i64 = meta(16, dtype=torch.int64)
    noise(i64, i64, 49152)
    counts = meta(1024, 49152, dtype=torch.int16)
    bias = (i32, state[:, :32], state.view(torch.float32)[:, 32:])
    penalise_rows(logits, rows, f32, f32, f32, counts, *bias)
    ids = meta(16, 20, dtype=torch.int32)
    logprobs_rows(logits, rows, i32, logprobs_work(16, 49152, logits.device), ids, ids.float())


def step_launches() -> None:
    """Launch the two ends of a step, small and large, and what writes the state."""
    state, i32 = meta(1024, state_width(512), dtype=torch.int32), torch.int32
    counts, ring = meta(1024, 49152, dtype=torch.int16), meta(8, 2, 1024, dtype=i32)
    for num_rows in (16, 1024):
        rows, lens = meta(num_rows, dtype=i32), meta(1024, dtype=i32)
        for given in (None, rows):
            prepare_step(state, rows, given, given, rows, rows, rows, lens, block_size=64)
        commit_step(state, rows, rows, rows, rows, counts, meta(1, dtype=i32), ring)
    write_words(state, meta(2, 4096, dtype=i32), 256)


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield {"dtype": name, "head_dim": None}, lambda dtype=dtype: row_launches(dtype)
        yield {"dtype": name, "head_dim": None}, lambda dtype=dtype: linear_launches(dtype)
        yield {"dtype": name, "head_dim": None}, lambda dtype=dtype: lm_head_launches(dtype)
        if dtype != torch.float32:  # in fp32 it is the interpreter's
            yield {"dtype": name, "head_dim": None}, lambda dtype=dtype: layers_launches(dtype)
        for head_dim in COMPILED_HEAD_DIMS[dtype]:
            yield (
                {"dtype": name, "head_dim": head_dim},
                lambda dtype=dtype, head_dim=head_dim: head_launches(dtype, head_dim),
            )
    yield {"dtype": "float32", "head_dim": None}, sampling_launches
    yield {"dtype": "int32", "head_dim": None}, step_launches


#: What is to be compiled, by its key; filled before the processes are forked, which inherit it.
BUILDS: dict[str, Build] = {}


def compile_key(key: str) -> tuple[str, dict[str, Any]]:
    return key, compile_build(BUILDS[key])


def main() -> None:
    launches: list[Build] = []

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(build_of(kernel, args, kwargs))

    JITFunction.run = catch
    labelled: list[tuple[dict[str, Any], str]] = []
    for labels, launch in cases():
        launches.clear()
        launch()
        for build in launches:
            BUILDS[build.key] = build
            labelled.append((labels, build.key))
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        compiled = dict(pool.imap_unordered(compile_key, BUILDS))
    for labels, key in labelled:
        print(json.dumps(labels | compiled[key]))


if __name__ == "__main__":
    main()
