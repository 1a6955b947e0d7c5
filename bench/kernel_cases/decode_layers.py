"""All layers of a decode step for one sequence, in one launch: time by layers, against their bytes.

A few layers of each model, together more than the L2 holds, at a short and a long context. The peer
is the engine's other way, a launch an operation: `python -m bench.engine --workload single`.

Called by: bench/kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from headrace.bench.kernels import Case
from headrace.kernels.decode_layers import decode_layers, decode_layers_reference
from headrace.kernels.layers_work import LayersTuning, LayersWork, LayerTensors, choose_tuning

BLOCK_SIZE, EPS, VOCAB = 64, 1e-6, 512
#: The reference rounds the normed x, the kernel x * norm_weight, and errors add up by layers.
MAX_ERROR = 2e-2


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    hidden: int
    heads: tuple[int, int, int]  # (num_q_heads, num_kv_heads, head_dim)
    inter: int
    has_qk_norm: bool
    num_layers: int  # measured, of more

    @property
    def widths(self) -> tuple[int, int]:
        """Return the widths of q and of qkv."""
        q, kv, head_dim = self.heads
        return q * head_dim, (q + 2 * kv) * head_dim

    def num_bytes(self, context_len: int) -> int:
        q, qkv = self.widths
        products = self.hidden * (qkv + q + 3 * self.inter)
        return 2 * self.num_layers * (products + context_len * (qkv - q))


MODELS = (
    Model("qwen3-0.6b", 1024, (16, 8, 128), 3072, True, 8),
    Model("llama-8b", 4096, (32, 8, 128), 14336, False, 2),
    Model("smollm2-135m", 576, (9, 3, 64), 1536, False, 30),
)
TINY = Model("tiny", 128, (4, 2, 64), 192, True, 2)


class Buffers:
    """A model's layers and one sequence's cache."""

    def __init__(self, model: Model, context_len: int, device: str) -> None:
        self.model, self.device = model, torch.device(device)
        (_, num_kv_heads, head_dim), (q, qkv) = model.heads, model.widths
        hidden, inter = model.hidden, model.inter

        def norm(width: int) -> torch.Tensor:
            return (1 + 0.1 * torch.randn(width, device=device)).bfloat16()

        def linear(n: int, k: int) -> torch.Tensor:
            made = torch.empty(n, k, dtype=torch.bfloat16, device=device)
            return made.normal_(std=k**-0.5)

        def layer() -> LayerTensors:
            q_norm, k_norm = (norm(head_dim) if model.has_qk_norm else None for _ in range(2))
            return LayerTensors(
                norm(hidden), linear(qkv, hidden), None, q_norm, k_norm, linear(hidden, q), None,
                norm(hidden), linear(2 * inter, hidden), None, linear(hidden, inter), None,
            )  # fmt: skip

        self.layers = [layer() for _ in range(model.num_layers)]
        self.embedding = linear(VOCAB, hidden) * hidden**0.5
        angles = torch.randn(context_len, head_dim // 2, device=device)
        self.cos, self.sin = angles.cos(), angles.sin()
        num_blocks = -(-context_len // BLOCK_SIZE)
        shape = (model.num_layers, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
        self.k, self.v = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
        self.tables = torch.randperm(num_blocks, device=device).to(torch.int32)[None]
        self.position = context_len - 1
        at = int(self.tables[0, -1]) * BLOCK_SIZE + self.position % BLOCK_SIZE
        # token, position, slot of the cache, context length, row of the tables
        self.row = tuple(
            torch.tensor([[7], [self.position], [at], [context_len], [0]], device=device).int()
        )
        self.kv_slot = at
        self._work: dict[LayersTuning, LayersWork] = {}

    def run(self, tuning: LayersTuning) -> torch.Tensor:
        model = self.model
        if tuning not in self._work:
            windows = [None] * model.num_layers
            self._work[tuning] = LayersWork.allocate(self.layers, windows, model.heads, tuning)
        token, position, kv_slot, context_len, table_row = self.row
        return decode_layers(
            self._work[tuning], self.embedding, token, position, kv_slot, context_len, table_row,
            self.tables, self.cos, self.sin, self.k,
            self.v, EPS,
        )  # fmt: skip

    def error(self, tuning: LayersTuning) -> float:
        """Return ||out - ref|| / ||ref||, of what the layers added; NaN where counters are left."""
        self.run(tuning)
        work = self._work[tuning]
        for name in ("residual", "qkv", "mixed", "gated", "partial", "lse"):
            getattr(work, name).fill_(float("nan"))
        found = self.run(tuning).double().clone()
        wanted = decode_layers_reference(
            7, self.position, self.kv_slot, self.tables[0], self.embedding, self.layers,
            [None] * self.model.num_layers, self.cos, self.sin, self.k.clone(), self.v.clone(), EPS,
        ).double()  # fmt: skip
        if work.counters.any():
            return float("nan")
        before = self.embedding[7].double()
        return float((found - wanted).norm() / (wanted - before).norm())


@lru_cache(maxsize=1)
def buffers_of(model: Model, context_len: int, device: str) -> Buffers:
    return Buffers(model, context_len, device)


def default_of(model: Model, device: str) -> LayersTuning:
    return choose_tuning(model.hidden, model.heads[1], torch.device(device))


def variants(model: Model) -> dict[str, dict[str, object]]:
    """What is worth a look beside the default, as changes to it."""
    found: dict[str, dict[str, object]] = {
        "plain launch": {"is_cooperative": False},
        "held48k": {"held_bytes": 48 * 1024},
    }
    if model.hidden > 1024:
        found |= {
            f"tile{tile} held{held} chunk{chunk}": {
                "wide_tile": tile, "wide_held": held, "chunk": chunk,
            }
            for tile, held, chunk in ((16, 6, 512), (16, 2, 1024), (32, 2, 512), (8, 4, 1024))
        }  # fmt: skip
    return found


def case(
    model: Model, context_len: int, variant: str, changes: dict[str, object], device: str = "cuda"
) -> Case:
    def tuning() -> LayersTuning:
        return replace(default_of(model, device), **changes)

    return Case(
        "decode_layers",
        f"{model.name} {model.num_layers} layers ctx{context_len}",
        variant,
        lambda: buffers_of(model, context_len, device).run(tuning()),
        lambda: buffers_of(model, context_len, device).error(tuning()),
        num_bytes=model.num_bytes(context_len),
        max_error=MAX_ERROR if device == "cuda" else 2 * MAX_ERROR,
    )


def cases(quick: bool) -> Iterator[Case]:
    for model in MODELS:
        for context_len in (400,) if quick else (1, 64, 400, 4096, 32768):
            yield case(model, context_len, "default", {})
            if not quick and context_len == 400:
                for name, changes in variants(model).items():
                    yield case(model, context_len, name, changes)


def tiny_cases() -> Iterator[Case]:
    """What Triton's interpreter can check."""
    yield case(TINY, 70, "default", {}, "cpu")
