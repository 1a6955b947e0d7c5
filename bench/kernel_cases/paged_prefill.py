"""Prefill attention over paged caches, and torch's flash attention on the same chunks kept dense.

Workloads: prompts from the start, one long prompt, a chunk far into a context, many small chunks,
an fp8 cache, a window, and the planning of a step. Pages hold 128 positions, heads first in memory,
as the engine keeps them; one workload has the other layout, one pages of 64.
Rate: 4 * head_dim * num_q_heads operations a (token, position it may see).

Variants are named by their tiling: m rows a query tile, n positions a step, w warps, s stages, p
programs a multiprocessor; h1 cuts a group's query heads apart, "grid" launches one program a tile.
The peer's tensors are dense, so it is spared the block tables; it reads KV heads repeated where a
chunk begins behind the start of its context.

Called by: bench/kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from headrace.bench.kernels import Case
from headrace.kernels.paged_prefill import paged_prefill, paged_prefill_reference
from headrace.kernels.prefill_work import (
    PrefillTiling,
    PrefillWork,
    choose_tiling,
    make_prefill_work,
    plan_prefill,
    plan_prefill_reference,
)

PART = "paged_prefill"
#: rows of a reference call: its scores are dense, so a long chunk is compared a piece at a time.
REFERENCE_ROWS = 512
#: bytes of the sets of inputs that are rotated: well beyond the 60 MB of L2.
ROTATED_BYTES = 200e6


@dataclass(frozen=True)
class Workload:
    """Equal chunks over a model's heads."""

    model: str
    heads: tuple[int, int, int]  # query, KV, head_dim
    num_chunks: int
    chunk: int  # tokens a chunk
    behind: int = 0  # tokens of its context before the chunk
    window: int | None = None
    is_fp8: bool = False
    block_size: int = 128
    is_heads_first: bool = True  # memory order of a page
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def name(self) -> str:
        parts = [self.model, f"{self.num_chunks}x{self.chunk}"]
        parts += [f"behind {self.behind}"] if self.behind else []
        parts += [f"window {self.window}"] if self.window else []
        parts += ["fp8"] if self.is_fp8 else []
        parts += [f"page {self.block_size}"] if self.block_size != 128 else []
        return " ".join(parts + ([] if self.is_heads_first else ["positions first"]))

    @property
    def context(self) -> int:
        return self.chunk + self.behind

    @property
    def flops(self) -> float:
        num_q_heads, _, head_dim = self.heads
        window = self.window or self.context
        seen = sum(min(position + 1, window) for position in range(self.behind, self.context))
        return 4.0 * head_dim * num_q_heads * self.num_chunks * seen

    @property
    def num_bytes(self) -> float:
        num_q_heads, num_kv_heads, head_dim = self.heads
        kv_bytes = 1 if self.is_fp8 else self.dtype.itemsize
        seen = min(self.context, self.chunk + (self.window or self.context))
        q_bytes = 2 * self.chunk * num_q_heads * self.dtype.itemsize
        return self.num_chunks * head_dim * (q_bytes + 2 * seen * num_kv_heads * kv_bytes)


@dataclass(frozen=True)
class Inputs:
    """One set of a workload's tensors; several are rotated where they would stay in the cache."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    cu_q_lens: torch.Tensor
    context_lens: torch.Tensor
    out: torch.Tensor
    scales: dict[str, torch.Tensor]


def make_pages(load: Workload, num_blocks: int, scale: torch.Tensor | None) -> torch.Tensor:
    """Return a cache of unit normals, as fp8 divided by the scales."""
    _, num_kv_heads, head_dim = load.heads
    shape = (num_blocks, load.block_size, num_kv_heads, head_dim)
    if load.is_heads_first:
        shape = (num_blocks, num_kv_heads, load.block_size, head_dim)
    pages = torch.randn(shape, device=load.device, dtype=load.dtype)
    pages = pages.transpose(1, 2) if load.is_heads_first else pages
    if scale is None:
        return pages
    return (pages.float() / scale[:, None]).to(torch.float8_e4m3fn)


@lru_cache(maxsize=1)
def make_sets(load: Workload) -> list[Inputs]:
    """Return the sets of inputs that a workload rotates."""
    num_sets = 1 if load.device == "cpu" else max(1, round(ROTATED_BYTES / load.num_bytes))
    return [make_inputs(load) for _ in range(min(num_sets, 8))]


def make_inputs(load: Workload) -> Inputs:
    num_q_heads, num_kv_heads, head_dim = load.heads
    blocks_a_chunk = -(-load.context // load.block_size)
    num_blocks = load.num_chunks * blocks_a_chunk
    scale = torch.rand(num_kv_heads, device=load.device) / 64 + 0.01 if load.is_fp8 else None
    q = torch.randn(
        load.num_chunks * load.chunk, num_q_heads, head_dim, device=load.device, dtype=load.dtype
    )
    tables = torch.randperm(num_blocks, device=load.device, dtype=torch.int32)
    starts = torch.arange(load.num_chunks + 1, device=load.device, dtype=torch.int32)
    return Inputs(
        q,
        make_pages(load, num_blocks, scale),
        make_pages(load, num_blocks, scale),
        tables.view(load.num_chunks, blocks_a_chunk),
        starts * load.chunk,
        torch.full_like(starts[1:], load.context),
        torch.empty_like(q),
        {} if scale is None else {"k_scale": scale, "v_scale": scale},
    )


@lru_cache(maxsize=4)
def make_plan(load: Workload, tile_tokens: int) -> PrefillWork:
    inputs = make_sets(load)[0]
    work = make_prefill_work(inputs.q.shape[0], load.num_chunks, tile_tokens, inputs.q.device)
    plan_prefill(work, inputs.cu_q_lens, inputs.context_lens)
    return work


def attend(load: Workload, tiling: PrefillTiling, num_programs: int | None, inputs: Inputs) -> None:
    paged_prefill(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_tables, inputs.cu_q_lens,
        inputs.context_lens, load.heads[2] ** -0.5, load.window, inputs.out, **inputs.scales,
        work=make_plan(load, tiling.tile_tokens), tiling=tiling, num_programs=num_programs,
    )  # fmt: skip


@lru_cache(maxsize=1)
def reference_out(load: Workload) -> torch.Tensor:
    """Return what the first set must come to, in fp32; a piece of a chunk is a chunk by itself."""
    inputs = make_sets(load)[0]
    out = torch.empty_like(inputs.q, dtype=torch.float32)
    int32 = partial(torch.tensor, dtype=torch.int32, device=load.device)
    for chunk in range(load.num_chunks):
        for first in range(0, load.chunk, REFERENCE_ROWS):
            num_rows = min(REFERENCE_ROWS, load.chunk - first)
            rows = slice(chunk * load.chunk + first, chunk * load.chunk + first + num_rows)
            out[rows] = paged_prefill_reference(
                inputs.q[rows].float(), inputs.k_cache, inputs.v_cache, inputs.block_tables,
                int32([0, num_rows]), int32([load.behind + first + num_rows]),
                load.heads[2] ** -0.5, load.window, int32([chunk]), **inputs.scales,
            )  # fmt: skip
    return out


def rotate(load: Workload, call: Callable[[Inputs], object]) -> Callable[[], object]:
    """Return a function whose calls take the workload's sets in turn."""
    turn = 0

    def run() -> object:
        nonlocal turn
        sets = make_sets(load)
        turn += 1
        return call(sets[turn % len(sets)])

    return run


def make_case(
    load: Workload, variant: str, tiling: PrefillTiling, num_programs: int | None = None
) -> Case:
    call = partial(attend, load, tiling, num_programs)

    def check() -> float:
        inputs = make_sets(load)[0]
        inputs.out.fill_(float("nan"))
        call(inputs)
        expected = reference_out(load)
        return float((inputs.out.float() - expected).norm() / expected.norm())

    return Case(
        PART, load.name, variant, rotate(load, call), check,
        num_bytes=load.num_bytes, flops=load.flops,
    )  # fmt: skip


@lru_cache(maxsize=1)
def make_dense(load: Workload) -> list[tuple[torch.Tensor, ...]]:
    """Return (q, k, v) for each set: [num_chunks, heads, tokens, head_dim], tokens outermost."""
    num_q_heads, num_kv_heads, head_dim = load.heads
    make = partial(torch.randn, device=load.device, dtype=load.dtype)
    # flash attention takes fewer KV heads only through enable_gqa, which the bias has no room for.
    kv_heads = num_q_heads if load.behind else num_kv_heads
    sizes = ((load.chunk, num_q_heads), (load.context, kv_heads), (load.context, kv_heads))
    return [
        tuple(make(load.num_chunks, *size, head_dim).transpose(1, 2) for size in sizes)
        for _ in make_sets(load)
    ]


def make_peer(load: Workload) -> Case:
    turn = 0

    def run() -> object:
        nonlocal turn
        sets = make_dense(load)
        turn += 1
        q, k, v = sets[turn % len(sets)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            if load.behind:
                bias = causal_lower_right(load.chunk, load.context)
                return scaled_dot_product_attention(q, k, v, attn_mask=bias)  # pyright: ignore[reportArgumentType]
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return Case(
        PART, load.name, "torch sdpa flash", run, num_bytes=load.num_bytes, flops=load.flops
    )


def make_planning_case(load: Workload) -> Case:
    tile_tokens = default_tiling(load).tile_tokens

    def run() -> object:
        inputs = make_sets(load)[0]
        return plan_prefill(make_plan(load, tile_tokens), inputs.cu_q_lens, inputs.context_lens)

    def check() -> float:
        inputs, work = make_sets(load)[0], make_plan(load, tile_tokens)
        work.tiles.fill_(-1)
        run()
        expected = plan_prefill_reference(inputs.cu_q_lens, inputs.context_lens, tile_tokens)
        listed = [tuple(tile) for tile in work.tiles[: int(work.num_tiles)].tolist()]
        return 0.0 if listed == expected else 1.0

    return Case(PART, f"plan {load.name}", "default", run, check)


LLAMA, QWEN, SMOLLM = (32, 8, 128), (16, 8, 128), (9, 3, 64)
#: the shapes on which a tiling is chosen, and those on which the choice is only measured.
TUNED = (
    Workload("llama-8b", LLAMA, 8, 1024),
    Workload("llama-8b", LLAMA, 1, 8192),
    Workload("qwen3-0.6b", QWEN, 8, 1024),
    Workload("qwen3-0.6b", QWEN, 256, 32),
    Workload("llama-8b", LLAMA, 8, 1024, is_fp8=True),
)
MEASURED = (
    Workload("llama-8b", LLAMA, 1, 2048, behind=16384),
    Workload("llama-8b", LLAMA, 256, 32),
    Workload("qwen3-0.6b", QWEN, 1, 8192),
    Workload("qwen3-0.6b", QWEN, 1, 2048, behind=16384),
)
UNUSUAL = (
    Workload("llama-8b", LLAMA, 8, 1024, is_heads_first=False),
    Workload("llama-8b", LLAMA, 8, 1024, block_size=64),
    Workload("llama-8b", LLAMA, 1, 8192, window=1024),
    Workload("smollm2-135m", SMOLLM, 8, 1024),
)
WIDE = Workload("head_dim 256", (16, 8, 256), 8, 1024)
#: rows, positions a step, warps, stages, programs a multiprocessor
TILINGS = (
    (128, 128, 8, 2, 1),
    (128, 128, 8, 3, 1),
    (128, 64, 8, 2, 1),
    (128, 64, 8, 3, 1),
    (128, 64, 8, 5, 1),
    (64, 64, 4, 3, 2),
    (64, 32, 4, 3, 2),
)
WIDE_TILINGS = ((128, 32, 8, 3, 1), (64, 64, 8, 2, 1), (64, 32, 4, 2, 2))


def default_tiling(load: Workload) -> PrefillTiling:
    num_q_heads, num_kv_heads, head_dim = load.heads
    return choose_tiling(num_q_heads // num_kv_heads, head_dim, load.dtype)


def variants(load: Workload, tilings: tuple[tuple[int, ...], ...]) -> Iterator[Case]:
    default = default_tiling(load)
    for rows, tile, warps, stages, programs in tilings:
        name = f"m{rows} n{tile} w{warps} s{stages} p{programs}"
        tiling = PrefillTiling(rows, default.heads, tile, warps, stages, programs)
        if tiling != default:
            yield make_case(load, name, tiling)
    if load.heads[2] <= 128:
        yield make_case(load, "default h1", replace(default, heads=1))
        # More programs than tiles: each has one, and the device hands them out.
        yield make_case(load, "default grid", default, num_programs=1 << 20)


def cases(quick: bool) -> Iterator[Case]:
    for load in (*TUNED, *MEASURED, *(() if quick else (*UNUSUAL, WIDE))):
        yield make_case(load, "default", default_tiling(load))
        if load in TUNED and not quick:
            yield from variants(load, TILINGS)
        if load is WIDE:
            yield from variants(load, WIDE_TILINGS)
        if not load.is_fp8 and load.window is None and load not in UNUSUAL[:2]:
            yield make_peer(load)
    for load in TUNED[:2] if quick else (*TUNED[:2], TUNED[3]):
        yield make_planning_case(load)


def tiny_cases() -> Iterator[Case]:
    """Yield small cases that Triton's interpreter can check on a CPU."""
    small = Workload("tiny", (4, 2, 64), 2, 9, behind=7, block_size=16, device="cpu")
    for load in (small, replace(small, window=5), replace(small, is_fp8=True)):
        yield make_case(load, "default", default_tiling(load))
    yield make_planning_case(small)
