"""What all layers of a model need to run in one launch: addresses, tuning, scratch, counters.

A kernel that runs every layer takes their weights by a table of addresses, a row a layer. Whether a
model can run so, in how many programs, and how each of its products is cut for them is decided
here, from shapes and the device alone.

Invariants:
1. The tensors whose addresses are in a table live as long as it does.
2. A `Product` covers all rows: tile * programs * tiles a program >= n.

Called by decode_layers.py, worker/engine/gpu_model.py and bench/kernel_cases/decode_layers.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headrace.kernels.checks import HEAD_DIMS, check_leading, check_tensor
from headrace.kernels.decode_work import NO_WINDOW
from headrace.kernels.triton_seam import is_interpreted, tl, triton

#: Programs at most: the power of two that an H200's 132 multiprocessors hold.
MAX_PROGRAMS = 128
#: Elements that a merge of an attention head's shares holds in registers, 64 a thread.
MERGE_ELEMENTS = 16384
#: Beyond, a program's weights of a phase do not fit its registers, and a launch an operation is
#: faster (llama-8b on one H200).
MAX_HIDDEN = 1024
#: Columns of the table of addresses, a row a layer; the last two are padding to 128 bytes.
FIELDS = tl.constexpr(16)  # pyright: ignore[reportCallIssue]


class LayerTensors(NamedTuple):
    """A layer's weights, in the order of the table of addresses."""

    attention_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    o: torch.Tensor  # [hidden, num_q_heads * head_dim]
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * inter, hidden], gate first
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, inter]
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Product:
    """How a program takes one of the four products."""

    tile: int  # rows of a unit, a multiple of the warps
    held: int  # units in registers
    units: int  # a program's, all


@dataclass(frozen=True, slots=True)
class LayersTuning:
    """What a measurement decides; the result is the same but for rounding."""

    num_programs: int  # at most the multiprocessors, at least the KV heads
    chunk: int  # columns of a unit, a power of two of at least 256
    wide_tile: int = 16  # rows of a unit where a program's weights do not fit its registers
    wide_held: int = 4
    held_bytes: int = 96 * 1024
    num_warps: int = 8
    is_cooperative: bool = True

    def product(self, n: int, k: int, parts: int, element_bytes: int) -> Product:
        """Return how a product of [parts * n, k] is taken."""
        per_tile = -(-k // self.chunk) * parts
        tile = self.num_warps
        tiles = -(-n // (tile * self.num_programs))
        unit_bytes = tile * self.chunk * element_bytes
        if tiles * per_tile * unit_bytes > self.held_bytes:
            tile = self.wide_tile
            tiles = -(-n // (tile * self.num_programs))
            return Product(tile, self.wide_held, tiles * per_tile)
        if per_tile == 1:
            # One unit of all rows: one sum and one store.
            tile = max(tile, triton.next_power_of_2(-(-n // self.num_programs)))
            return Product(tile, 1, 1)
        return Product(tile, tiles * per_tile, tiles * per_tile)


def choose_tuning(hidden: int, num_kv_heads: int, device: torch.device) -> LayersTuning:
    """Return the tuning for a model, whose layers a power of two of programs cuts evenly."""
    num_programs = 2 * num_kv_heads + 1 if is_interpreted() else MAX_PROGRAMS
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = min(num_sms, MAX_PROGRAMS)
    chunk = min(max(triton.next_power_of_2(hidden), 256), 1024) if hidden <= 1024 else 512
    return LayersTuning(num_programs, chunk)


def can_run(
    hidden: int, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> bool:
    """Say whether `decode_layers` serves a model of (num_q_heads, num_kv_heads, head_dim).

    Its cache must be of dtype too. fp32 is for the interpreter: on a GPU it is there to be compared
    with, an operation at a time.
    """
    num_q_heads, num_kv_heads, head_dim = heads
    served = (torch.float16, torch.bfloat16)
    if is_interpreted():
        served = (*served, torch.float32)
    return (
        dtype in served
        and hidden <= MAX_HIDDEN
        and hidden % 8 == 0
        and head_dim in HEAD_DIMS
        and num_q_heads // num_kv_heads <= 16
        and num_kv_heads <= choose_tuning(hidden, num_kv_heads, device).num_programs
    )


@dataclass(frozen=True, slots=True)
class LayersWork:
    """A model's table of addresses and what programs leave for one another; one a stream."""

    layers: tuple[LayerTensors, ...]  # kept, as the table has their addresses
    heads: tuple[int, int, int]  # (num_q_heads, num_kv_heads, head_dim)
    tuning: LayersTuning
    has_window: bool
    num_splits: int
    table: torch.Tensor  # [num_layers, FIELDS] int64
    residual: torch.Tensor  # [1, hidden] fp32
    qkv: torch.Tensor  # [qkv width]
    mixed: torch.Tensor  # [num_q_heads * head_dim]
    gated: torch.Tensor  # [inter]
    partial: torch.Tensor  # [num_kv_heads, num_splits, group, head_dim] fp32
    lse: torch.Tensor  # [num_kv_heads, num_splits, group] fp32
    counters: torch.Tensor  # [2 + num_kv_heads] int32, zero between launches

    @classmethod
    def allocate(
        cls,
        layers: Sequence[LayerTensors],
        windows: Sequence[int | None],  # of each layer
        heads: tuple[int, int, int],
        tuning: LayersTuning | None = None,
    ) -> "LayersWork":
        """Check a model's weights and lay out its table."""
        num_q_heads, num_kv_heads, head_dim = heads
        leading = layers[0].qkv
        check_leading("qkv", leading, 2)
        device, dtype, hidden = leading.device, leading.dtype, leading.shape[1]
        inter = layers[0].down.shape[1]
        for layer in layers:
            _check_layer(layer, layers[0], heads, hidden, inter)
        tuning = tuning or choose_tuning(hidden, num_kv_heads, device)
        group = num_q_heads // num_kv_heads
        rows = triton.next_power_of_2(group) * triton.next_power_of_2(head_dim)
        num_splits = min(tuning.num_programs // num_kv_heads, max(1, MERGE_ELEMENTS // rows))

        def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tuple(layers), heads, tuning, any(w is not None for w in windows), num_splits,
            _table_of(layers, windows, device),
            scratch(1, hidden),
            scratch(leading.shape[0], dtype=dtype),
            scratch(num_q_heads * head_dim, dtype=dtype),
            scratch(inter, dtype=dtype),
            scratch(num_kv_heads, num_splits, group, head_dim),
            scratch(num_kv_heads, num_splits, group),
            scratch(2 + num_kv_heads, dtype=torch.int32),
        )  # fmt: skip


def _table_of(
    layers: Sequence[LayerTensors], windows: Sequence[int | None], device: torch.device
) -> torch.Tensor:
    rows = []
    for layer, window in zip(layers, windows, strict=True):
        row = [0 if tensor is None else tensor.data_ptr() for tensor in layer]
        row.append(NO_WINDOW if window is None else window)
        rows.append(row + [0] * (FIELDS.value - len(row)))
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _check_layer(
    layer: LayerTensors, like: LayerTensors, heads: tuple[int, int, int], hidden: int, inter: int
) -> None:
    """Raise ValueError unless a layer has its tensors and the same optional ones as the first."""
    num_q_heads, num_kv_heads, head_dim = heads
    width, q = (num_q_heads + 2 * num_kv_heads) * head_dim, num_q_heads * head_dim
    shapes = (
        (hidden,), (width, hidden), (width,), (head_dim,), (head_dim,), (hidden, q), (hidden,),
        (hidden,), (2 * inter, hidden), (2 * inter,), (hidden, inter), (hidden,),
    )  # fmt: skip
    for name, tensor, first, shape in zip(LayerTensors._fields, layer, like, shapes, strict=True):
        if (tensor is None) != (first is None):
            raise ValueError(
                f"{name} must be given for every layer or for none; found both: pass what the "
                "checkpoint has"
            )
        if tensor is not None:
            check_tensor(name, tensor, shape, like.qkv.dtype, like.qkv.device)
            if tensor.data_ptr() % 16 and not is_interpreted():
                raise ValueError(
                    f"{name} must be aligned to 16 bytes; found address {tensor.data_ptr():#x}: "
                    "pass a tensor of its own, not a part of one"
                )
