"""Compile every kernel for sm_90 as its launcher would launch it, on a machine without a GPU.

Run as a program, without TRITON_INTERPRET. It calls the launchers on meta tensors (which have
shapes and no values, so a launcher that read a value would fail here), catches each launch at
Triton's JITFunction, and compiles exactly those arguments, tile sizes and warps. Prints one JSON
line a launch: kernel, dtype, head_dim, bytes of shared memory, and whether its matrix products
became tensor-core instructions.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from headrace.kernels.logprobs import logprobs
from headrace.kernels.noise import noise
from headrace.kernels.paged_decode import paged_decode
from headrace.kernels.paged_prefill import paged_prefill
from headrace.kernels.penalise import penalise
from headrace.kernels.qkv_rope_write import qkv_rope_write
from headrace.kernels.rms_norm import residual_rms_norm, rms_norm
from headrace.kernels.sample import sample
from headrace.kernels.silu_mul import silu_mul

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
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def describe(values: dict[str, Any], constexprs: set[str]) -> tuple[dict, dict, dict]:
    """Sort arguments as Triton's launcher would: (signature, constants, alignment)."""
    signature, constants, attrs = {}, {}, {}
    for index, (name, value) in enumerate(values.items()):
        if name in constexprs or (type(value) is int and value == 1):
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


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict) -> dict[str, Any]:
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    names = [param.name for param in kernel.params]
    values = dict(zip(names, args, strict=False)) | {n: kwargs[n] for n in names if n in kwargs}
    constexprs = {param.name for param in kernel.params if param.is_constexpr}
    signature, constants, attrs = describe({name: values[name] for name in names}, constexprs)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "shared_bytes": compiled.metadata.shared,
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "has_mma": "mma.sync" in ptx or "wgmma" in ptx,
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def row_launches(dtype: torch.dtype) -> None:
    """Launch what works on rows of hidden states (hidden 576 is SmolLM2's, 4096 an 8B's)."""
    for hidden in (576, 4096):
        x, weight = meta(64, hidden, dtype=dtype), meta(hidden, dtype=dtype)
        rms_norm(x, weight, 1e-6)
        residual_rms_norm(x, x, weight, 1e-6)
    silu_mul(meta(64, 2 * 1536, dtype=dtype))


def head_launches(dtype: torch.dtype, head_dim: int) -> None:
    """Launch what works on heads, with three query heads a KV head as SmolLM2 has."""
    num_q_heads, num_kv_heads, block_size, num_tokens = 9, 3, 64, 48
    cache = meta(8, block_size, num_kv_heads, head_dim, dtype=dtype)
    qkv = meta(num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    table = meta(1024, head_dim // 2, dtype=torch.float32)
    indexes = meta(num_tokens, dtype=torch.int32)
    norm = meta(head_dim, dtype=dtype)
    rope = (qkv, table, table, indexes, indexes, cache, cache, num_q_heads)
    qkv_rope_write(*rope)
    q = qkv_rope_write(*rope, q_norm=norm, k_norm=norm)
    tables = meta(num_tokens, 32, dtype=torch.int32)
    paged_decode(q, cache, cache, tables, indexes, 0.125, num_splits=8)
    starts = meta(num_tokens + 1, dtype=torch.int32)
    paged_prefill(q, cache, cache, tables, starts, indexes, 0.125)


def sampling_launches() -> None:
    logits = meta(16, 49152, dtype=torch.float32)
    rows = {dtype: meta(16, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int64)}
    f32, i32, i64 = rows.values()
    sample(logits, f32, i32, f32, f32, i64, i64)
    noise(i64, i64, 49152)
    counts, in_prompt = logits.to(torch.int32), logits.to(torch.bool)
    penalise(logits, counts, in_prompt, f32, f32, f32)


def cases() -> Iterator[tuple[dict[str, Any], Callable[[], object]]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        yield {"dtype": name, "head_dim": None}, lambda dtype=dtype: row_launches(dtype)
        logits, tokens = meta(16, 49152, dtype=dtype), meta(16, dtype=torch.int64)
        yield (
            {"dtype": name, "head_dim": None},
            lambda logits=logits, tokens=tokens: logprobs(logits, tokens, 20),
        )
        for head_dim in COMPILED_HEAD_DIMS[dtype]:
            yield (
                {"dtype": name, "head_dim": head_dim},
                lambda dtype=dtype, head_dim=head_dim: head_launches(dtype, head_dim),
            )
    yield {"dtype": "float32", "head_dim": None}, sampling_launches


def main() -> None:
    launches: list[tuple[JITFunction, tuple, dict]] = []

    def catch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    JITFunction.run = catch
    for labels, launch in cases():
        launches.clear()
        launch()
        for kernel, args, kwargs in launches:
            print(json.dumps(labels | compile_launch(kernel, args, kwargs)), flush=True)


if __name__ == "__main__":
    main()
