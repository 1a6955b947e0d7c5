"""A whole decode step of one row against the references of its parts; interpreted without a GPU."""

from dataclasses import dataclass, field, replace

import pytest
import torch

from headrace.kernels.decode_layers import TOLERANCE, decode_layers, decode_layers_reference
from headrace.kernels.layers_work import (
    LayersTuning,
    LayersWork,
    LayerTensors,
    can_run,
    choose_tuning,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
VOCAB, EPS = 64, 1e-5


@dataclass
class Model:
    """A small random model of one family, its cache poisoned where nothing was written."""

    hidden: int = 96
    heads: tuple[int, int, int] = (4, 2, 64)  # (num_q_heads, num_kv_heads, head_dim)
    inter: int = 160
    windows: tuple[int | None, ...] = (None, None)
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_all_biases: bool = False
    block_size: int = 16
    num_blocks: int = 12
    dtype: torch.dtype = torch.bfloat16
    layers: list[LayerTensors] = field(default_factory=list)


ONE_LAYER = (None,)
#: One KV head and one layer: three programs in the interpreter, three shares of the positions.
SMALL = Model(heads=(2, 1, 64), windows=ONE_LAYER)
FAMILIES = {
    "llama": Model(),
    "mistral and full": Model(windows=(None, 17)),
    "qwen2": Model(has_qkv_bias=True, hidden=128, heads=(6, 2, 64), windows=ONE_LAYER),
    "qwen3": Model(has_qk_norm=True, hidden=256, heads=(4, 2, 128), inter=320, windows=ONE_LAYER),
    "every bias": Model(has_qkv_bias=True, has_all_biases=True, windows=ONE_LAYER),
    "smollm2": Model(hidden=576, heads=(9, 3, 64), inter=1536, windows=ONE_LAYER),
}


class Rig:
    """Weights, cache, tables and the two ways through them."""

    def __init__(self, model: Model, device: torch.device, tuning: LayersTuning | None = None):
        self.model, self.device = model, device
        num_q_heads, num_kv_heads, head_dim = model.heads
        q, kv = num_q_heads * head_dim, num_kv_heads * head_dim
        self.layers = [self._layer(q, kv, head_dim) for _ in model.windows]
        self.embedding = self._random(VOCAB, model.hidden, scale=2.0)
        angles = torch.randn(512, head_dim // 2, device=device)
        self.cos, self.sin = angles.cos(), angles.sin()
        shape = (len(model.windows), model.num_blocks, num_kv_heads, model.block_size, head_dim)
        self.k, self.v = (
            torch.full(shape, float("nan"), dtype=model.dtype, device=device) for _ in range(2)
        )
        blocks = torch.randperm(model.num_blocks, device=device).to(torch.int32)
        self.tables = torch.full((3, model.num_blocks + 3), -1, dtype=torch.int32, device=device)
        self.tables[1, : model.num_blocks] = blocks
        if tuning is None:
            tuning = choose_tuning(model.hidden, num_kv_heads, device)
        self.work = LayersWork.allocate(self.layers, model.windows, model.heads, tuning)
        for name in ("residual", "qkv", "mixed", "gated", "partial", "lse"):
            getattr(self.work, name).fill_(float("nan"))

    def _random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(self.model.dtype)

    def _layer(self, q: int, kv: int, head_dim: int) -> LayerTensors:
        model = self.model
        hidden, inter = model.hidden, model.inter

        def linear(n: int, k: int) -> torch.Tensor:
            return self._random(n, k, scale=k**-0.5)

        def bias(n: int, *, is_there: bool) -> torch.Tensor | None:
            return self._random(n, scale=0.5) if is_there else None

        norms = [self._random(head_dim) if model.has_qk_norm else None for _ in range(2)]
        return LayerTensors(
            self._random(hidden), linear(q + 2 * kv, hidden),
            bias(q + 2 * kv, is_there=model.has_qkv_bias), *norms,
            linear(hidden, q), bias(hidden, is_there=model.has_all_biases),
            self._random(hidden), linear(2 * inter, hidden),
            bias(2 * inter, is_there=model.has_all_biases),
            linear(hidden, inter), bias(hidden, is_there=model.has_all_biases),
        )  # fmt: skip

    def fill(self, num_positions: int) -> None:
        """Give the first positions random keys and values."""
        for position in range(num_positions):
            block = int(self.tables[1, position // self.model.block_size])
            at = position % self.model.block_size
            for cache in (self.k, self.v):
                cache[:, block, :, at] = self._random(*cache[:, block, :, at].shape)

    def slot(self, position: int) -> int:
        block_size = self.model.block_size
        return int(self.tables[1, position // block_size]) * block_size + position % block_size

    def step(self, token: int, position: int) -> torch.Tensor:
        def one(number: int) -> torch.Tensor:
            return torch.tensor([number], dtype=torch.int32, device=self.device)

        return decode_layers(
            self.work, self.embedding, one(token), one(position), one(self.slot(position)),
            one(position + 1), one(1), self.tables, self.cos, self.sin, self.k, self.v, EPS,
        )  # fmt: skip

    def reference(self, token: int, position: int, k: torch.Tensor, v: torch.Tensor):
        return decode_layers_reference(
            token, position, self.slot(position), self.tables[1], self.embedding, self.layers,
            self.model.windows, self.cos, self.sin, k, v, EPS,
        )  # fmt: skip

    def check(self, position: int) -> None:
        """One step at a position against the reference, its written keys and values too."""
        k, v = self.k.clone(), self.v.clone()
        token = int(torch.randint(VOCAB, ()))
        expected = self.reference(token, position, k, v)
        found = self.step(token, position)
        bound = TOLERANCE[self.model.dtype]
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
        for cache, wanted in ((self.k, k), (self.v, v)):
            torch.testing.assert_close(
                cache.float(), wanted.float(), atol=bound, rtol=bound, equal_nan=True
            )
        assert not self.work.counters.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_reference(family, device):
    rig = Rig(FAMILIES[family], device)
    rig.fill(37)
    rig.check(37)


@pytest.mark.parametrize("position", [0, 1, 15, 16, 47, 48, 100])
def test_context_lengths_around_blocks_and_shares_equal_the_reference(position, device):
    rig = Rig(SMALL, device)
    rig.fill(position)
    rig.check(position)


@pytest.mark.parametrize("position", [20, 21, 36, 95])
def test_windows_equal_the_reference_and_hide_what_is_behind_them(position, device):
    rig = Rig(replace(SMALL, windows=(21,)), device)
    rig.fill(position)
    for index in range(max(position - 20, 0) // rig.model.block_size):
        block = int(rig.tables[1, index])
        rig.k[:, block] = rig.v[:, block] = float("nan")
        rig.tables[1, index] = -1
    rig.check(position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_equal_the_reference(dtype, device):
    model = replace(FAMILIES["qwen3"], dtype=dtype)
    if not can_run(model.hidden, model.heads, dtype, device):
        pytest.skip("fp32 is for the interpreter")
    rig = Rig(model, device)
    rig.fill(20)
    rig.check(20)


def test_steps_in_a_row_read_what_those_before_them_wrote(device):
    rig = Rig(SMALL, device)
    rig.fill(14)
    for position in range(14, 18):
        rig.check(position)


@pytest.mark.parametrize("tile", [8, 16])
def test_weights_beyond_the_registers_are_taken_in_turns(tile, device):
    model = replace(SMALL, hidden=600, inter=840)
    tuning = LayersTuning(3, 256, wide_tile=tile, wide_held=4, held_bytes=0)
    rig = Rig(model, device, tuning)
    rig.fill(5)
    rig.check(5)


def test_a_padding_row_writes_no_cache(device):
    rig = Rig(SMALL, device)
    rig.fill(3)
    k = rig.k.clone()

    def one(number: int) -> torch.Tensor:
        return torch.tensor([number], dtype=torch.int32, device=device)

    rig.work.mixed.zero_()
    found = decode_layers(
        rig.work, rig.embedding, one(-1), one(0), one(-1), one(0), one(-1), rig.tables, rig.cos,
        rig.sin, rig.k, rig.v, EPS,
    )  # fmt: skip
    assert torch.equal(found, torch.zeros_like(found))
    assert torch.equal(rig.k.nan_to_num(7.0), k.nan_to_num(7.0))
    assert not rig.work.counters.any()
