"""The fused elementwise kernels and the fp8 linear layers, from one row to 8,192.

What is to be seen: at one row the latency of a launch (nothing there fills the GPU), at 8,192 rows
the share of the bandwidth. The fp8 products stand beside the same products in bf16.

A workload is a function that makes one set of tensors, the call on it, and its reference in fp32.
Sets are made on first use and rotated, as many as fill the L2 cache three times over, up to 64 (the
calls of one captured graph). Outputs are poisoned before each check.

Size: nine workloads, each of them its tensors, its call, its reference and its bytes; they are read
one at a time, and share what stands on top.

Called by: bench/kernels.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch

from headrace.bench.kernels import Case
from headrace.kernels import embed, fp8, qkv_rope_write, rms_norm, silu_mul

EPS = 1e-6
ROWS = (1, 64, 256, 2048, 8192)
#: three times the L2 cache of an H200.
ROTATED_BYTES = 180e6
MAX_SETS = 64
BLOCK_SIZE = 64
VOCAB = 32768  # of the embedding looked up: 67 MB at hidden 1024, more than the cache
MAX_POSITIONS = 4096

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """The widths that these kernels see."""

    name: str
    hidden: int
    inter: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    has_qk_norm: bool

    @property
    def qkv_width(self) -> int:
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Return name -> (inputs, outputs) of the four products of a layer."""
        return {
            "qkv": (self.hidden, self.qkv_width),
            "o": (self.num_q_heads * self.head_dim, self.hidden),
            "gate_up": (self.hidden, 2 * self.inter),
            "down": (self.inter, self.hidden),
        }


MODELS = (
    Model("qwen3-0.6b", 1024, 3072, 16, 8, 128, has_qk_norm=True),
    Model("llama-8b", 4096, 14336, 32, 8, 128, has_qk_norm=False),
)
TINY = Model("tiny", 96, 160, 6, 2, 64, has_qk_norm=True)


@dataclass(frozen=True)
class Work:
    """One workload: all variants of it run on the same sets of tensors."""

    name: str
    make: Callable[[], Tensors]
    outputs: tuple[str, ...]  # compared with the reference's, in this order
    reference: Callable[[Tensors], tuple[torch.Tensor, ...]]  # in fp32, from untouched tensors
    num_bytes: float
    flops: float = 0
    max_error: float = 1e-2
    variants: dict[str, Callable[[Tensors], object]] = field(default_factory=dict, hash=False)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device()).bfloat16()


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, dtype=torch.int32, device=device())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device())


def poison(tensor: torch.Tensor) -> None:
    """Fill with NaN, in fp8 too."""
    if tensor.dtype == fp8.FP8:
        tensor.view(torch.uint8).fill_(0x7F)
    else:
        tensor.fill_(float("nan"))


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def error_of(work: Work, call: Callable[[Tensors], object]) -> float:
    """Run on a fresh set with poisoned outputs; return the largest ||out - ref|| / ||ref||."""
    tensors = work.make()
    expected = work.reference({name: wide(tensor) for name, tensor in tensors.items()})
    for name in work.outputs:
        # What is updated in place is an input too; the reference has its own copy by now.
        if name not in ("residual", "k_cache", "v_cache") or "embedding" in tensors:
            poison(tensors[name])
    call(tensors)
    errors = []
    for name, reference in zip(work.outputs, expected, strict=True):
        found = tensors[name].float()
        if name == "out" and "scale" in tensors:
            found = found * tensors["scale"]
        errors.append(float((found - reference).norm() / reference.norm()))
    return max(errors, key=lambda error: (error != error, error))


@lru_cache(maxsize=2)
def _sets(work: Work) -> Iterator[Tensors]:
    first = work.make()
    # Whole tensors count, though of an embedding or a cache only some rows are used.
    set_bytes = sum(tensor.nbytes for tensor in first.values())
    num_more = min(MAX_SETS, int(ROTATED_BYTES / set_bytes))
    return itertools.cycle([first, *(work.make() for _ in range(num_more))])


def cases_of(work: Work, names: tuple[str, ...] | None = None) -> Iterator[Case]:
    """Yield the work's variants, or only those named; a name with "torch" is not checked."""
    for variant, call in work.variants.items():
        if names is None or variant in names:
            is_peer = variant.startswith("torch")
            yield Case(
                part="fused",
                name=work.name,
                variant=variant,
                run=lambda call=call: call(next(_sets(work))),
                check=None if is_peer else partial(error_of, work, call),
                num_bytes=work.num_bytes,
                flops=work.flops,
                max_error=work.max_error,
            )


# -- rows of the residual stream -------------------------------------------------------------


def _stream(model: Model, num_rows: int, out: Callable[..., Tensors]) -> Tensors:
    return {
        "x": bf16(num_rows, model.hidden),
        "residual": torch.randn(num_rows, model.hidden, device=device()),
        "weight": bf16(model.hidden),
        **out(num_rows, model.hidden),
    }


def _plain(num_rows: int, width: int) -> Tensors:
    return {"out": empty(num_rows, width)}


def _fp8(num_rows: int, width: int) -> Tensors:
    scale = empty(num_rows, 1, dtype=torch.float32)
    return {"out": empty(num_rows, width, dtype=fp8.FP8), "scale": scale}


def _norm_reference(t: Tensors) -> tuple[torch.Tensor, ...]:
    return rms_norm.residual_rms_norm_reference(t["x"], t["residual"], t["weight"], EPS)


def _norm(t: Tensors, **tuning: Any) -> object:
    return rms_norm.residual_rms_norm(
        t["x"], t["residual"], t["weight"], EPS, t["out"], rows=t.get("rows"), **tuning
    )


def _norm_fp8(t: Tensors, **tuning: Any) -> object:
    return rms_norm.residual_rms_norm_fp8(
        t["x"], t["residual"], t["weight"], EPS, t["out"], t["scale"], **tuning
    )


def _torch_norm(t: Tensors) -> object:
    t["residual"].add_(t["x"])
    normed = torch.rms_norm(t["residual"], t["weight"].shape, t["weight"].float(), EPS)
    return t["out"].copy_(normed)


def residual_norm(model: Model, num_rows: int) -> Work:
    num_bytes = num_rows * model.hidden * (2 + 4 + 4 + 2) + model.hidden * 2
    work = Work(
        f"residual_rms_norm {model.name} {num_rows}",
        partial(_stream, model, num_rows, _plain),
        ("out", "residual"),
        _norm_reference,
        num_bytes,
    )
    work.variants["default"] = _norm
    for num_warps in (4, 8, 16):
        if fits(model.hidden, num_warps):
            work.variants[f"w{num_warps}"] = partial(_norm, num_warps=num_warps)
    # Programs that take several rows each: 8 and 16 a multiprocessor of 132.
    for num_programs in (1056, 2112):
        if num_rows > num_programs:
            call = partial(_norm, num_warps=4, max_programs=num_programs)
            work.variants[f"w4 programs{num_programs}"] = call
    work.variants["torch add, rms_norm, copy"] = _torch_norm
    return work


def fits(width: int, num_warps: int) -> bool:
    """Say whether that many warps have four to thirty-two values a thread."""
    return 4 <= width / (32 * num_warps) <= 32


def residual_norm_fp8(model: Model, num_rows: int) -> Work:
    num_bytes = num_rows * (model.hidden * (2 + 4 + 4 + 1) + 4) + model.hidden * 2
    work = Work(
        f"residual_rms_norm_fp8 {model.name} {num_rows}",
        partial(_stream, model, num_rows, _fp8),
        ("out", "residual"),
        _norm_reference,
        num_bytes,
        max_error=0.03,
    )
    work.variants["default"] = _norm_fp8
    work.variants["w4"] = partial(_norm_fp8, num_warps=4)
    return work


def chosen_norm(model: Model, num_rows: int) -> Work:
    """Norm that many rows out of 2,048, as before lm_head."""

    def make() -> Tensors:
        rows = torch.randperm(2048, device=device())[:num_rows].to(torch.int32)
        return _stream(model, 2048, lambda _, width: _plain(num_rows, width)) | {"rows": rows}

    def reference(t: Tensors) -> tuple[torch.Tensor, ...]:
        return (_norm_reference(t)[0][t["rows"].long()],)

    num_bytes = num_rows * (model.hidden * (2 + 4 + 2) + 4) + model.hidden * 2
    name = f"chosen rows {model.name} {num_rows}"
    work = Work(name, make, ("out",), reference, num_bytes)
    work.variants["default"] = _norm
    return work


def embed_norm(model: Model, num_rows: int) -> Work:
    def make() -> Tensors:
        return {
            "tokens": ints(VOCAB, num_rows),
            "embedding": bf16(VOCAB, model.hidden),
            "weight": bf16(model.hidden),
            "residual": empty(num_rows, model.hidden, dtype=torch.float32),
            **_plain(num_rows, model.hidden),
        }

    def reference(t: Tensors) -> tuple[torch.Tensor, ...]:
        return embed.embed_rms_norm_reference(t["tokens"], t["embedding"], t["weight"], EPS)

    def call(t: Tensors) -> object:
        return embed.embed_rms_norm(
            t["tokens"], t["embedding"], t["weight"], EPS, t["out"], t["residual"]
        )

    num_bytes = num_rows * (4 + model.hidden * (2 + 4 + 2)) + model.hidden * 2
    name = f"embed_rms_norm {model.name} {num_rows}"
    work = Work(name, make, ("out", "residual"), reference, num_bytes)
    work.variants["default"] = call
    return work


# -- heads -----------------------------------------------------------------------------------


def _qkv_tensors(model: Model, num_rows: int, cache_dtype: torch.dtype) -> Tensors:
    num_blocks = -(-num_rows // BLOCK_SIZE) + 64
    angles = torch.rand(MAX_POSITIONS, model.head_dim // 2, device=device()) * 6.3
    # Zeros where nothing is written, in the reference's copy too, so that all can be compared.
    in_memory = (num_blocks, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    caches = [torch.zeros(in_memory, device=device()).to(cache_dtype) for _ in range(2)]
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device())[:num_rows]
    tensors = {
        "qkv": bf16(num_rows, model.qkv_width),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": ints(MAX_POSITIONS, num_rows),
        "slots": slots.to(torch.int32),
        "k_cache": caches[0].transpose(1, 2),
        "v_cache": caches[1].transpose(1, 2),
        "out": empty(num_rows, model.num_q_heads, model.head_dim),
    }
    if model.has_qk_norm:
        tensors |= {"q_norm": bf16(model.head_dim), "k_norm": bf16(model.head_dim)}
    if cache_dtype == fp8.FP8:
        scale = torch.rand(2, model.num_kv_heads, device=device()) / 64 + 1 / 64
        tensors |= {"k_scale": scale[0].contiguous(), "v_scale": scale[1].contiguous()}
    return tensors


def _qkv_call(model: Model, t: Tensors, **tuning: Any) -> object:
    return qkv_rope_write.qkv_rope_write(**t, num_q_heads=model.num_q_heads, eps=EPS, **tuning)  # pyright: ignore[reportArgumentType]


def qkv_write(model: Model, num_rows: int, cache_dtype: torch.dtype) -> Work:
    is_fp8 = cache_dtype == fp8.FP8
    head_scales = ("k_scale", "v_scale")

    def reference(t: Tensors) -> tuple[torch.Tensor, ...]:
        inputs = {n: tensor for n, tensor in t.items() if n not in ("out", *head_scales)}
        q = qkv_rope_write.qkv_rope_write_reference(
            **inputs, num_q_heads=model.num_q_heads, eps=EPS
        )
        scales = [t[name][:, None] if is_fp8 else 1.0 for name in head_scales]
        return q, t["k_cache"] / scales[0], t["v_cache"] / scales[1]

    head_bytes = 1 if is_fp8 else 2
    kv_width = 2 * model.num_kv_heads * model.head_dim
    q_width = model.num_q_heads * model.head_dim
    row_bytes = model.qkv_width * 2 + q_width * 2 + kv_width * head_bytes + model.head_dim * 4 + 8
    work = Work(
        f"qkv_rope_write{' fp8' if is_fp8 else ''} {model.name} {num_rows}",
        partial(_qkv_tensors, model, num_rows, cache_dtype),
        ("out", "k_cache", "v_cache"),
        reference,
        num_rows * row_bytes,
        max_error=0.035 if is_fp8 else 1e-2,
    )
    work.variants["default"] = partial(_qkv_call, model)
    for heads, num_warps in ((2, 1), (4, 1), (8, 1), (8, 2), (16, 4)):
        launch = {"HEADS": heads, "num_warps": num_warps}
        work.variants[f"heads{heads} w{num_warps}"] = partial(_qkv_call, model, launch=launch)
    return work


# -- the MLP's activation, quantisation, fp8 products ----------------------------------------


def _silu_tensors(model: Model, num_rows: int, out: Callable[..., Tensors]) -> Tensors:
    return {"gate_up": bf16(num_rows, 2 * model.inter), **out(num_rows, model.inter)}


def _silu_reference(t: Tensors) -> tuple[torch.Tensor, ...]:
    return (silu_mul.silu_mul_reference(t["gate_up"]),)


def _silu(t: Tensors, **tuning: Any) -> object:
    return silu_mul.silu_mul(t["gate_up"], t["out"], **tuning)


def _torch_silu(t: Tensors) -> object:
    gate, up = t["gate_up"].chunk(2, dim=1)
    return torch.mul(torch.nn.functional.silu(gate), up, out=t["out"])


def silu(model: Model, num_rows: int) -> Work:
    num_bytes = num_rows * model.inter * 6
    make = partial(_silu_tensors, model, num_rows, _plain)
    name = f"silu_mul {model.name} {num_rows}"
    work = Work(name, make, ("out",), _silu_reference, num_bytes)
    work.variants["default"] = _silu
    for block, num_warps in ((512, 2), (2048, 4), (2048, 8), (4096, 8)):
        launch = {"BLOCK": block, "num_warps": num_warps}
        work.variants[f"block{block} w{num_warps}"] = partial(_silu, launch=launch)
    work.variants["torch silu, mul"] = _torch_silu
    return work


def _silu_fp8(t: Tensors, **tuning: Any) -> object:
    return silu_mul.silu_mul_fp8(t["gate_up"], t["out"], t["scale"], **tuning)


def silu_fp8(model: Model, num_rows: int) -> Work:
    num_bytes = num_rows * (model.inter * 5 + 4)
    make = partial(_silu_tensors, model, num_rows, _fp8)
    name = f"silu_mul_fp8 {model.name} {num_rows}"
    work = Work(name, make, ("out",), _silu_reference, num_bytes, max_error=0.03)
    work.variants["default"] = _silu_fp8
    for num_warps in (8, 16):
        work.variants[f"w{num_warps}"] = partial(_silu_fp8, num_warps=num_warps)
    return work


def quantise(model: Model, num_rows: int) -> Work:
    def make() -> Tensors:
        return {"x": bf16(num_rows, model.hidden), **_fp8(num_rows, model.hidden)}

    num_bytes = num_rows * (model.hidden * 3 + 4)
    name = f"quantise_rows {model.name} {num_rows}"
    work = Work(name, make, ("out",), lambda t: (t["x"],), num_bytes, max_error=0.03)
    work.variants["default"] = lambda t: fp8.quantise_rows(t["x"], t["out"], t["scale"])
    return work


def _linear_tensors(num_rows: int, width: int, num_outputs: int) -> Tensors:
    w = bf16(num_outputs, width)
    x, x_scale = fp8.quantise_rows_reference(bf16(num_rows, width))
    w_fp8, w_scale = fp8.quantise_weight(w)
    out = empty(num_rows, num_outputs)
    return {"x": x, "x_scale": x_scale, "w": w_fp8, "w_scale": w_scale, "out": out}


def _bf16_tensors(num_rows: int, width: int, num_outputs: int) -> Tensors:
    out = empty(num_rows, num_outputs)
    return {"x": bf16(num_rows, width), "w": bf16(num_outputs, width), "out": out}


def _fp8_linear(t: Tensors, **tuning: Any) -> object:
    x, w = (t["x"], t["x_scale"]), (t["w"], t["w_scale"])
    return fp8.fp8_linear(*x, *w, out=t["out"], **tuning)


def linear(model: Model, layer: str, num_rows: int) -> tuple[Work, Work]:
    """Return the product in fp8 and in bf16: one workload, but tensors of their own each."""
    width, num_outputs = model.linears[layer]
    name = f"linear {model.name} {layer} {num_rows}"
    flops = 2 * num_rows * width * num_outputs
    num_factors, num_products = (num_rows + num_outputs) * width, num_rows * num_outputs

    def reference(t: Tensors) -> tuple[torch.Tensor, ...]:
        return ((t["x"] * t["x_scale"]) @ (t["w"] * t["w_scale"]).t(),)

    make = partial(_linear_tensors, num_rows, width, num_outputs)
    num_bytes = num_factors + 2 * num_products + 4 * (num_rows + num_outputs)
    work = Work(name, make, ("out",), reference, num_bytes, flops)
    work.variants["default"] = _fp8_linear
    work.variants["exact accumulation"] = partial(_fp8_linear, use_fast_accum=False)
    make = partial(_bf16_tensors, num_rows, width, num_outputs)
    peer = Work(name, make, ("out",), reference, 2 * (num_factors + num_products), flops)
    peer.variants["torch bf16 mm"] = lambda t: torch.mm(t["x"], t["w"].t(), out=t["out"])
    return work, peer


# -- what is run -----------------------------------------------------------------------------


def _elementwise(model: Model, num_rows: int) -> Iterator[Work]:
    yield residual_norm(model, num_rows)
    yield residual_norm_fp8(model, num_rows)
    if num_rows <= 256:
        yield chosen_norm(model, num_rows)
    yield embed_norm(model, num_rows)
    yield qkv_write(model, num_rows, torch.bfloat16)
    yield qkv_write(model, num_rows, fp8.FP8)
    yield silu(model, num_rows)
    yield silu_fp8(model, num_rows)
    yield quantise(model, num_rows)


def cases(quick: bool) -> Iterator[Case]:
    """Yield all workloads; quick: the defaults on the smallest, a usual and the largest size."""
    names = ("default",) if quick else None
    for model, num_rows in itertools.product(MODELS, (1, 256, 8192) if quick else ROWS):
        for work in _elementwise(model, num_rows):
            # An fp8 cache is opt-in: two of its tiles, to keep the compiles few.
            is_fp8_write = work.name.startswith("qkv_rope_write fp8")
            yield from cases_of(work, ("default", "heads8 w1") if is_fp8_write else names)
    for model, layer in itertools.product(MODELS, MODELS[0].linears):
        for num_rows in (64, 2048) if quick else (16, 64, 256, 2048):
            ours, peer = linear(model, layer, num_rows)
            yield from cases_of(ours, names)
            yield from cases_of(peer)


def tiny_cases() -> Iterator[Case]:
    """Yield every workload on a few rows, to be checked without a GPU."""
    for num_rows in (1, 3):
        for work in (*_elementwise(TINY, num_rows), linear(TINY, "gate_up", num_rows)[0]):
            yield from cases_of(work, ("default", "heads4 w1", "block512 w2", "exact accumulation"))
