"""Linear layers of at most 256 rows, each with what its model does before and after it.

The layers of three models, read from HBM: weights rotate among copies that together exceed the L2,
as in a step, where each layer has its own. The peer is cuBLAS (`torch.mm`) with the launches beside
it that ours has within: norm, silu-multiply, addition to the residual stream.

`Layer`, `Buffers` and `candidates` are what bench/tune.py measures.

Called by: bench/kernels.py, bench/tune.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count

import torch

from headrace.bench.kernels import Case
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul
from headrace.kernels.skinny_linear import (
    SkinnyWorkspace,
    skinny_linear,
    skinny_linear_reference,
)
from headrace.kernels.tuning import OPS, Choice, SkinnyConfig, choose, guess

#: bytes that all copies of a weight have together, beyond the 60 MB of an H200's L2.
ROTATED_BYTES = 160 << 20
#: shared memory of one block, less what Triton takes beside the tiles.
MAX_SHARED_BYTES = 220 * 1024
EPS = 1e-6
#: bf16 rounds what is multiplied and the result, to 2 parts in 1,000 each; Triton's interpreter,
#: which truncates, to twice that. One of 16 splits left out would be 25 %.
MAX_ERROR = 1e-2


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer of a model, as a decode step runs it."""

    model: str
    name: str
    op: str  # of kernels.tuning.OPS
    n: int
    k: int
    per_step: int  # times a step runs it

    @property
    def weight_bytes(self) -> int:
        return 2 * self.n * self.k

    def min_bytes(self, m: int) -> int:
        """Count what one call must move: weight, activations, result."""
        prologue, adds = OPS[self.op]
        x_bytes = {"none": 2, "rms_norm": 4, "silu_mul": 4}[prologue] * self.k
        return self.weight_bytes + m * (x_bytes + self.n * (8 if adds else 2))


def layers_of(
    model: str, num_layers: int, hidden: int, inter: int, heads: tuple[int, int, int], vocab: int
) -> list[Layer]:
    num_q_heads, num_kv_heads, head_dim = heads
    q_width = num_q_heads * head_dim
    qkv_width = q_width + 2 * num_kv_heads * head_dim
    shapes = [
        ("qkv", "rms_norm", qkv_width, hidden, num_layers),
        ("o", "add", hidden, q_width, num_layers),
        ("gate_up", "rms_norm", 2 * inter, hidden, num_layers),
        ("down", "silu_mul_add", hidden, inter, num_layers),
        ("lm_head", "rms_norm", vocab, hidden, 1),
    ]
    return [Layer(model, *shape) for shape in shapes]


LAYERS = {
    "qwen3-0.6b": layers_of("qwen3-0.6b", 28, 1024, 3072, (16, 8, 128), 151936),
    "llama-8b": layers_of("llama-8b", 32, 4096, 14336, (32, 8, 128), 128256),
    "smollm2-135m": layers_of("smollm2-135m", 30, 576, 1536, (9, 3, 64), 49152),
}
#: too small to be slow in Triton's interpreter, and no tile divides its sizes.
TINY = [Layer("tiny", "gate_up", "rms_norm", 40, 80, 1), Layer("tiny", "o", "add", 24, 48, 1)]


@lru_cache(maxsize=1)
def weights_of(n: int, k: int, device: str) -> list[torch.Tensor]:
    """Return as many random [n, k] weights as rotate beyond the L2; values of unit products."""
    num_copies = max(2, -(-ROTATED_BYTES // (2 * n * k))) if device == "cuda" else 2
    return [
        torch.empty(n, k, dtype=torch.bfloat16, device=device).normal_(std=k**-0.5)
        for _ in range(min(num_copies, 256))
    ]


@lru_cache(maxsize=1)
def workspace_of(device: str) -> SkinnyWorkspace:
    return SkinnyWorkspace.allocate(torch.device(device))


class Buffers:
    """The tensors of one layer at one row count, and calls that take the next weight each."""

    def __init__(self, layer: Layer, m: int, device: str = "cuda") -> None:
        self.layer, self.m = layer, m
        self.prologue, self.adds = OPS[layer.op]
        self.weights = weights_of(layer.n, layer.k, device)
        self.workspace = workspace_of(device)
        width = layer.k * (2 if self.prologue == "silu_mul" else 1)
        self.activations = torch.randn(m, width, device=device).bfloat16()
        self.stream = torch.randn(m, layer.k, device=device) * 3
        self.norm = torch.randn(layer.k, device=device).bfloat16()
        self.rows = torch.empty(m, layer.k, dtype=torch.bfloat16, device=device)
        self.out = torch.empty(m, layer.n, dtype=torch.bfloat16, device=device)
        self.residual = torch.randn(m, layer.n, device=device)
        self._number = count()

    def next_weight(self) -> torch.Tensor:
        return self.weights[next(self._number) % len(self.weights)]

    def run(self, choice: Choice) -> object:
        """Launch the layer once, on the next weight."""
        weight = self.next_weight()
        return self._cublas(weight) if choice == "cublas" else self._skinny(weight, choice)

    def _skinny(self, weight: torch.Tensor, config: SkinnyConfig) -> torch.Tensor:
        normed = self.prologue == "rms_norm"
        return skinny_linear(
            self.stream if normed else self.activations,
            weight,
            None if self.adds else self.out,
            prologue=self.prologue,
            norm_weight=self.norm if normed else None,
            eps=EPS,
            residual=self.residual if self.adds else None,
            config=config,
            workspace=self.workspace,
        )

    def _cublas(self, weight: torch.Tensor) -> torch.Tensor:
        rows = self.activations
        if self.prologue == "rms_norm":
            # Of bf16 rows: half the bytes of the stream, which at this size are not seen.
            rows = rms_norm(self.activations, self.norm, EPS, out=self.rows)
        elif self.prologue == "silu_mul":
            rows = silu_mul(self.activations, out=self.rows)
        torch.mm(rows, weight.t(), out=self.out)
        return self.residual.add_(self.out) if self.adds else self.out

    def error(self, config: SkinnyConfig) -> float:
        """Return ||out - ref|| / ||ref|| of one call on poisoned outputs."""
        normed = self.prologue == "rms_norm"
        before = self.residual.normal_().double()
        self.out.fill_(float("nan"))
        self.workspace.partials.fill_(float("nan"))
        weight = self.next_weight()
        found = self._skinny(weight, config).double()
        wanted = skinny_linear_reference(
            self.stream if normed else self.activations,
            weight,
            None,
            self.prologue,
            self.norm if normed else None,
            EPS,
            dtype=torch.float32,
        ).double()
        if self.adds:
            found = found - before
        return float((found - wanted).norm() / wanted.norm())


@lru_cache(maxsize=1)
def buffers_of(layer: Layer, m: int, device: str) -> Buffers:
    return Buffers(layer, m, device)


def case(
    layer: Layer, m: int, variant: str, choice: Callable[[], Choice], device: str = "cuda"
) -> Case:
    def run() -> object:
        return buffers_of(layer, m, device).run(choice())

    def check() -> float:
        taken = choice()
        # A table may send a layer to cuBLAS, which needs no check of ours.
        return 0.0 if taken == "cublas" else buffers_of(layer, m, device).error(taken)

    return Case(
        "skinny",
        f"{layer.model} {layer.name} m{m}",
        variant,
        run,
        None if variant.startswith("cublas") else check,
        num_bytes=layer.min_bytes(m),
        flops=2.0 * m * layer.n * layer.k,
        max_error=MAX_ERROR,
    )


def chosen(layer: Layer, m: int) -> Choice:
    return choose(torch.cuda.get_device_name(), layer.op, m, layer.n, layer.k)


def candidates(layer: Layer, m: int) -> list[SkinnyConfig]:
    """List what is worth measuring, the guess first; none that cannot fit."""
    found = [guess(m, layer.n, layer.k)]
    if m <= 4:
        found += rows_candidates(layer, m)
    if m >= 2:
        found += tiles_candidates(layer, m)
    return [config for config in dict.fromkeys(found) if fits(config, layer, m)]


def rows_candidates(layer: Layer, m: int) -> Iterator[SkinnyConfig]:
    whole = 1 << (layer.k - 1).bit_length()
    for block_n in (2, 4, 8, 16):
        # All of k at once: every load of the program in flight before its first product.
        if block_n * whole <= 16384:
            yield SkinnyConfig("rows", block_n, whole)
    yield SkinnyConfig("rows", 8, 1024)
    if m == 1:
        for block_n, block_k, warps, stages in (
            *((4, 1024, 4, 3), (8, 512, 4, 4), (8, 1024, 4, 3)),
            *((16, 512, 4, 1), (4, 2048, 8, 1), (8, 2048, 8, 1), (8, 4096, 8, 1)),
            *((4, 512, 2, 1), (2, 1024, 2, 1)),
        ):
            yield SkinnyConfig("rows", block_n, block_k, 1, warps, stages)


def tiles_candidates(layer: Layer, m: int) -> Iterator[SkinnyConfig]:
    shapes = ((16, 256, 4), (32, 128, 4), (32, 256, 3), (64, 128, 4), (64, 64, 6))
    if m > 16:
        shapes = ((32, 128, 4), (64, 64, 5), (64, 128, 3), (128, 64, 4))
    if m > 64:
        yield from wide_candidates(layer, m)
        return
    for block_n, block_k, stages in shapes:
        tiles = -(-layer.n // block_n)
        num_warps = 8 if block_n == 128 else 4
        for splits in (1, 2, 4, 8, 16):
            # From not quite a program for each of 132 multiprocessors to five.
            is_full = 100 <= tiles * splits <= 700
            if (is_full or (splits == 1 and tiles > 700)) and splits * block_k * 2 <= layer.k:
                yield SkinnyConfig("tiles", block_n, block_k, splits, num_warps, stages)


def wide_candidates(layer: Layer, m: int) -> Iterator[SkinnyConfig]:
    """Of 65 rows and more: products cost as much as the reading, so tiles are as square."""
    for block_m, block_n, block_k, num_warps, stages in (
        (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 3),
        (64, 128, 64, 4, 4),
        (64, 128, 64, 8, 4),
        (128, 64, 64, 4, 4),
        (128, 64, 64, 8, 4),
        (128, 128, 64, 8, 3),
    ):
        tiles = -(-layer.n // block_n) * -(-m // block_m)
        for splits in (1, 2, 4, 8):
            is_full = 60 <= tiles * splits <= 600
            if (is_full or (splits == 1 and tiles > 600)) and splits * block_k * 2 <= layer.k:
                yield SkinnyConfig(
                    "tiles", block_n, block_k, splits, num_warps, stages, block_m=block_m
                )


def fits(config: SkinnyConfig, layer: Layer, m: int) -> bool:
    if config.method == "rows":
        return config.block_k < 2 * layer.k
    x_bytes = {"none": 2, "rms_norm": 4, "silu_mul": 4}[OPS[layer.op][0]]
    stage = config.block_k * (2 * config.block_n + x_bytes * max(16, min(m, config.block_m)))
    return stage * max(1, config.num_stages - 1) <= MAX_SHARED_BYTES


def variants(layer: Layer, m: int) -> list[SkinnyConfig]:
    """List what is worth a look beside the choice; bench/tune.py tries far more, on all models."""
    if layer.model != "qwen3-0.6b" or m == 8:
        return []
    config = guess(m, layer.n, layer.k)
    early = replace(config, uses_pdl=True)
    if config.method == "rows":
        return [early, replace(config, block_k=config.block_k // 2, num_stages=3)]
    return [early, replace(config, num_stages=config.num_stages + 1)]


def cases(quick: bool) -> Iterator[Case]:
    for layers in list(LAYERS.values())[: 2 if quick else 3]:
        for layer in layers:
            for m in (1, 64) if quick else (1, 8, 64, 256):
                choice = lambda layer=layer, m=m: chosen(layer, m)  # noqa: E731
                yield case(layer, m, "default", choice)
                for config in (
                    [] if quick or m == 8 or layer.model != "qwen3-0.6b" else variants(layer, m)
                ):
                    yield case(layer, m, config.text(), lambda config=config: config)
                yield case(layer, m, "cublas", lambda: "cublas")


def tiny_cases() -> Iterator[Case]:
    """What Triton's interpreter can check."""
    for layer in TINY:
        for m in (1, 3):
            config = guess(m, layer.n, layer.k)
            yield case(layer, m, "default", lambda config=config: config, "cpu")
