"""Paged decode attention: bytes of KV a second, at every batch and length.

The shapes of one layer of a model, caches of random normals in scattered blocks, one head's page in
one piece as the engine keeps it. Short workloads rotate through as many copies of their KV as do
not fit the L2 cache. The work list is planned outside, as it is once a step; its own time is the
case "plan". The peer is torch's attention over a dense cache: the same bytes, in order.

Called by: bench/kernels.py.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count

import torch

from headrace.bench.kernels import Case
from headrace.kernels.decode_work import DecodeWork, choose_num_shares, plan_decode
from headrace.kernels.paged_decode import DecodeTuning, paged_decode, paged_decode_reference

PART = "paged_decode"
#: (num_q_heads, num_kv_heads, head_dim)
HEADS = {"qwen3-0.6b": (16, 8, 128), "llama-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}
#: bytes that the caches of one workload have at least, so that the L2 (60 MB) holds little of it.
MIN_POOL_BYTES = 240e6
UNEQUAL = (*(random.Random(3).randint(100, 1000) for _ in range(62)), 32768, 32768)
#: Context of each sequence; "tiny" is for a machine without a GPU.
WORKLOADS = {
    "b1 ctx1k": (1024,),
    "b1 ctx32k": (32768,),
    "b8 ctx4k": (4096,) * 8,
    "b64 ctx1.1k": (1100,) * 64,
    "b256 ctx1.5k": (1536,) * 256,
    "b1024 ctx600": (600,) * 1024,
    "b64 unequal": UNEQUAL,
    "tiny": (70, 3, 130),
}


@dataclass(frozen=True, slots=True)
class Workload:
    model: str
    name: str
    is_fp8: bool = False
    block_size: int = 64
    window: int | None = None
    device: str = "cuda"

    @property
    def lens(self) -> tuple[int, ...]:
        return WORKLOADS[self.name]

    @property
    def kv_bytes(self) -> int:
        _, num_kv_heads, head_dim = HEADS[self.model]
        seen = sum(min(length, self.window or length) for length in self.lens)
        return 2 * seen * num_kv_heads * head_dim * (1 if self.is_fp8 else 2)

    @property
    def label(self) -> str:
        return f"{self.model} {self.name}{' fp8' if self.is_fp8 else ''}" + (
            f" window{self.window}" if self.window else ""
        )


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    tuning: DecodeTuning | None = None  # None = what the launcher chooses
    programs_per_sm: int = 2
    block_size: int = 64
    min_share: int = 4  # units of 16 positions
    overhead: int = 2  # like min_share


def tuned(tile: int, warps: int, stages: int, programs: int, **changes: int) -> Variant:
    name = f"tile{tile} w{warps} s{stages} p{programs}"
    # As many registers a thread as let so many programs be resident at once.
    max_registers = min(65536 // (programs * warps * 32) // 8 * 8, 255)
    tuning = DecodeTuning(tile, warps, stages, max_registers=max_registers)
    made = Variant(name, tuning, programs)
    suffix = "".join(f" {field}{value}" for field, value in changes.items())
    return replace(made, name=name + suffix, **changes)


DEFAULT = Variant("default")
SECOND_LAUNCH = Variant(
    "tile64 w4 s3 p2 merged in a second launch", DecodeTuning(64, merges_inside=False)
)
#: Two or three programs a multiprocessor are what registers and shared memory allow: more would
#: wait for the first to end, and every share is as long as the others.
BF16_VARIANTS = (
    DEFAULT,
    SECOND_LAUNCH,
    tuned(64, 4, 3, 1),
    tuned(64, 4, 3, 3),
    tuned(64, 4, 4, 2),
    tuned(64, 8, 3, 2),
    tuned(64, 2, 3, 3),
    tuned(32, 4, 4, 4),
    tuned(32, 2, 4, 3),
    tuned(64, 4, 3, 2, min_share=8),
    tuned(64, 4, 3, 2, min_share=2),
    tuned(64, 4, 3, 2, overhead=5),
    tuned(128, 8, 3, 1, block_size=128),
)
FP8_VARIANTS = (
    DEFAULT,
    tuned(64, 4, 3, 3),
    tuned(64, 4, 4, 2),
    tuned(64, 8, 4, 2),
    tuned(32, 4, 4, 4),
    tuned(128, 8, 3, 2, block_size=128),
    tuned(128, 4, 3, 2, block_size=128),
)


class Layer:
    """One layer's tensors for a workload, and its table for each copy of the KV."""

    def __init__(self, workload: Workload) -> None:
        num_q_heads, num_kv_heads, head_dim = HEADS[workload.model]
        size, device = workload.block_size, workload.device
        counts = [-(-length // size) for length in workload.lens]
        copies = int(-(-MIN_POOL_BYTES // workload.kv_bytes)) if device == "cuda" else 1
        num_blocks = copies * sum(counts)
        shape = (num_blocks, num_kv_heads, size, head_dim)
        self.k, self.v = (_random_cache(shape, workload).transpose(1, 2) for _ in range(2))
        rows = torch.randperm(len(counts))
        self.tables = _tables(counts, rows.tolist(), num_blocks, copies).to(device)
        self.context_lens = torch.tensor(workload.lens, dtype=torch.int32, device=device)
        num_seqs = len(counts)
        self.q = torch.randn(num_seqs, num_q_heads, head_dim, device=device).bfloat16()
        self.out = torch.empty_like(self.q)
        self.rows = rows.to(device, torch.int32)
        scales = (
            torch.rand(2, num_kv_heads, device=device) + 0.5 if workload.is_fp8 else (None, None)
        )
        self.works: dict[Variant, DecodeWork] = {}
        self.workload = workload
        self.scales = {"k_scale": scales[0], "v_scale": scales[1]}

    def arguments(
        self, copy: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        scale = self.q.shape[-1] ** -0.5
        return (self.q, self.k, self.v, self.tables[copy], self.context_lens, scale)

    def work(self, variant: Variant) -> DecodeWork:
        if variant not in self.works:
            heads, device = HEADS[self.workload.model], self.q.device
            self.works[variant] = DecodeWork.allocate(
                len(self.context_lens),
                heads,
                device,
                self.workload.window,
                num_shares=choose_num_shares(heads[1], device, variant.programs_per_sm),
                min_share=variant.min_share,
                overhead=variant.overhead,
            )
            plan_decode(self.works[variant], self.context_lens, self.rows)
        return self.works[variant]


def _random_cache(shape: tuple[int, ...], workload: Workload) -> torch.Tensor:
    dtype = torch.float8_e4m3fn if workload.is_fp8 else torch.bfloat16
    cache = torch.empty(shape, dtype=dtype, device=workload.device)
    for part in cache.split(4096):
        part.copy_(torch.randn(part.shape, device=workload.device))
    return cache


def _tables(counts: list[int], rows: list[int], num_blocks: int, copies: int) -> torch.Tensor:
    """Return [copies, num_slots, max_blocks] int32, a view into a wider state as the engine's."""
    width = -(-max(counts) // 16) * 16
    state = torch.full((copies, len(counts), 16 + width), -1, dtype=torch.int32)
    blocks = torch.randperm(num_blocks).int().split(counts * copies)
    for index, owned in enumerate(blocks):
        copy, seq = divmod(index, len(counts))
        state[copy, rows[seq], 16 : 16 + len(owned)] = owned
    return state[:, :, 16:]


@lru_cache(maxsize=1)
def _layer(workload: Workload) -> Layer:
    return Layer(workload)


def _case(workload: Workload, variant: Variant) -> Case:
    workload = replace(workload, block_size=variant.block_size)
    turns = count()

    def launch(copy: int) -> torch.Tensor:
        layer = _layer(workload)
        work = layer.work(variant)
        return paged_decode(
            *layer.arguments(copy),
            workload.window,
            layer.out,
            work=work,
            tuning=variant.tuning,
            **layer.scales,
        )

    def run() -> object:
        return launch(next(turns) % len(_layer(workload).tables))

    def check() -> float:
        layer = _layer(workload)
        work = layer.work(variant)
        layer.q.normal_()
        wanted = paged_decode_reference(
            layer.q.float(),
            layer.k,
            layer.v,
            *layer.arguments(0)[3:],
            workload.window,
            table_rows=layer.rows,
            **layer.scales,
        )
        worst = 0.0
        for _ in range(3):  # counters must be zero again, and no race may show
            layer.out.fill_(float("nan"))
            work.partial.fill_(float("nan"))
            work.partial_lse.fill_(float("nan"))
            error = float((launch(0).float() - wanted).norm() / wanted.norm())
            worst = error if error != error else max(worst, error)
            if worst != worst:
                break
        return worst

    num_q_heads, _, head_dim = HEADS[workload.model]
    flops = 4 * num_q_heads * head_dim * sum(workload.lens)
    return Case(PART, workload.label, variant.name, run, check, workload.kv_bytes, flops)


def _plan_case(num_seqs: int) -> Case:
    heads = HEADS["qwen3-0.6b"]

    @lru_cache
    def tensors() -> tuple[DecodeWork, torch.Tensor]:
        lens = torch.randint(1, 4096, (num_seqs,), dtype=torch.int32, device="cuda")
        return DecodeWork.allocate(num_seqs, heads, lens.device), lens

    def run() -> object:
        return plan_decode(*tensors())

    return Case(PART, f"plan b{num_seqs}", "default", run, num_bytes=4 * num_seqs)


def _sdpa_case(workload: Workload) -> Case:
    """Torch's attention on a dense cache of equal lengths, copies enough to miss the L2."""
    num_q_heads, num_kv_heads, head_dim = HEADS[workload.model]
    copies = max(1, int(-(-MIN_POOL_BYTES // workload.kv_bytes)))
    shape = (copies, len(workload.lens), num_kv_heads, workload.lens[0], head_dim)
    turns = count()

    @lru_cache
    def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = torch.randn(len(workload.lens), num_q_heads, 1, head_dim, device="cuda").bfloat16()
        make = partial(torch.empty, shape, dtype=torch.bfloat16, device="cuda")
        return q, make().normal_(), make().normal_()

    def run() -> object:
        q, k, v = tensors()
        copy = next(turns) % copies
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k[copy], v[copy], enable_gqa=True)

    return Case(PART, workload.label, "torch sdpa dense", run, num_bytes=workload.kv_bytes)


def cases(quick: bool) -> Iterator[Case]:
    """Yield all workloads of a shape one after another, so that one cache is held at a time."""
    for model in ("qwen3-0.6b", "llama-8b"):
        for name in [name for name in WORKLOADS if name != "tiny"]:
            workload = Workload(model, name)
            is_full = not quick and name != "b1024 ctx600"
            for tried in BF16_VARIANTS if is_full else (DEFAULT,):
                yield _case(workload, tried)
            if name in ("b8 ctx4k", "b64 ctx1.1k") and not quick:
                yield _sdpa_case(workload)
    for model, name in (("qwen3-0.6b", "b256 ctx1.5k"), ("llama-8b", "b64 ctx1.1k")):
        for tried in (DEFAULT,) if quick else FP8_VARIANTS:
            yield _case(Workload(model, name, is_fp8=True), tried)
    smollm = Workload("smollm2-135m", "b256 ctx1.5k")
    for tried in (DEFAULT,) if quick else (DEFAULT, tuned(64, 4, 4, 3), tuned(64, 4, 3, 4)):
        yield _case(smollm, tried)
    yield _case(Workload("llama-8b", "b8 ctx4k", window=1024), DEFAULT)
    yield _plan_case(1024)


def tiny_cases() -> Iterator[Case]:
    """Yield what Triton's interpreter can check."""
    for is_fp8 in (False, True):
        yield _case(Workload("smollm2-135m", "tiny", is_fp8, device="cpu"), DEFAULT)
