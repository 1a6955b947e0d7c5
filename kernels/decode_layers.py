"""All layers of a decode step for one sequence, in one launch.

    residual = embedding[token]
    each layer:  qkv = linear(rms_norm(residual));  mixed = attention(rotate(qkv)), K and V written
                 residual += o(mixed)
                 gated = silu(gate) * up of linear(rms_norm(residual));  residual += down(gated)

With one row a step is the reading of its weights and 6 launches a layer, each of which waits for
the one before, for its first loads and for its last stores. Here a layer is five phases of one
persistent launch, a program a multiprocessor, with barriers between (grid_barrier.py); and while a
program waits at a barrier the next phase's first weights are on their way into its registers and
those of the phase after it into the L2 (row_products.py), old keys and values too
(row_attention.py).

    qkv | attention, a program a KV head and a share of the positions | o | gate and up | down

Numerics: those of skinny_linear, qkv_rope_write and paged_decode, rounding by rounding; sums are
in another order.

Invariants:
1. The order of every sum depends on shapes, plan and context length alone: no float is added
   atomically.
2. Counters are zero between launches; the last program to leave puts them back.
3. In Triton's interpreter, where programs run one after another, each phase is a launch: the same
   code without the barriers.
4. A row of context length 0 (padding) writes nothing but scratch and the residual.

What it does not take (`can_run`) goes the way of a launch an operation.

Size: a launcher with all tensors of a model, and the reference of a whole layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headrace.kernels.cache_checks import check_attention, check_block_tables
from headrace.kernels.checks import HEAD_DIMS, check_leading, check_tensor
from headrace.kernels.decode_work import NO_WINDOW
from headrace.kernels.grid_barrier import arrive, leave, wait
from headrace.kernels.paged_decode import paged_decode_reference
from headrace.kernels.qkv_rope_write import qkv_rope_write_reference
from headrace.kernels.row_attention import attend_row, load_halves, load_tile
from headrace.kernels.row_products import load_norm, load_units, multiply_row, prefetch_rows
from headrace.kernels.skinny_linear import skinny_linear_reference
from headrace.kernels.triton_seam import is_interpreted, tl, triton

#: Programs at most: the power of two that an H200's 132 multiprocessors hold.
MAX_PROGRAMS = 128
#: Elements that a merge of an attention head's shares holds in registers, 64 a thread.
MERGE_ELEMENTS = 16384
#: Bytes of one phase's weights that a program prefetches into the L2 at most.
PREFETCH_BYTES = 128 * 1024
#: Phases, as `decode_layers` launches them one by one where it must.
QKV, ATTENTION, OUT, GATE_UP, DOWN = (tl.constexpr(1 << phase) for phase in range(5))
ALL = tl.constexpr(31)
#: Columns of the table of addresses, a row a layer; the last two are padding to 128 bytes.
FIELDS = tl.constexpr(16)


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


def decode_layers_reference(
    token: int,
    position: int,
    kv_slot: int,  # block * block_size + offset, where its keys and values go
    table: torch.Tensor,  # [max_blocks] int32
    embedding: torch.Tensor,  # [vocab, hidden]
    layers: Sequence[LayerTensors],
    windows: Sequence[int | None],
    cos: torch.Tensor,  # [max_positions, head_dim // 2] fp32
    sin: torch.Tensor,
    k_cache: torch.Tensor,  # [num_layers, num_blocks, num_kv_heads, block_size, head_dim], written
    v_cache: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Return the residual stream behind the last layer: [1, hidden] fp32."""
    device, head_dim = embedding.device, k_cache.shape[-1]
    num_q_heads = layers[0].o.shape[1] // head_dim
    residual = embedding[token][None].float()
    positions, slots, lens = (
        torch.tensor([n], dtype=torch.int32, device=device)
        for n in (position, kv_slot, position + 1)
    )
    for index, layer in enumerate(layers):
        pages = k_cache[index].transpose(1, 2), v_cache[index].transpose(1, 2)
        qkv = skinny_linear_reference(
            residual, layer.qkv, layer.qkv_bias, "rms_norm", layer.attention_norm, eps
        )
        q = qkv_rope_write_reference(
            qkv, cos, sin, positions, slots, *pages, num_q_heads, layer.q_norm, layer.k_norm, eps
        )
        mixed = paged_decode_reference(
            q, *pages, table[None], lens, head_dim**-0.5, windows[index]
        ).view(1, -1)
        residual = skinny_linear_reference(mixed, layer.o, layer.o_bias, residual=residual)
        gate_up = skinny_linear_reference(
            residual, layer.gate_up, layer.gate_up_bias, "rms_norm", layer.mlp_norm, eps
        )
        residual = skinny_linear_reference(
            gate_up, layer.down, layer.down_bias, "silu_mul", residual=residual
        )
    return residual


@triton.jit
def _pointer(fields_ptr, field: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """Load an address of the table; tensors are aligned to 16 bytes."""
    address = tl.load(fields_ptr + field)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def _decode_layers_kernel(
    table_ptr,  # in: [num_layers, FIELDS] int64: addresses as LayerTensors, then the window
    embedding_ptr,  # in: [vocab, hidden]
    tokens_ptr,  # in: [1] int32, negative = padding
    positions_ptr,  # in: [1] int32
    kv_slots_ptr,  # in: [1] int32, -1 = not written
    context_lens_ptr,  # in: [1] int32, 0 = padding
    rows_ptr,  # in: [1] int32, the row of block_tables
    block_tables_ptr,  # in: [num_slots, max_blocks] int32, stride below
    cos_ptr,  # in: [max_positions, head_dim // 2] fp32
    sin_ptr,  # in: like cos
    k_cache_ptr,  # in, out: [num_layers, num_blocks, num_kv_heads, block_size, head_dim]
    v_cache_ptr,  # in, out: like k_cache
    residual_ptr,  # out: [hidden] fp32
    qkv_ptr,  # scratch: [Q + 2 * KV]
    mixed_ptr,  # scratch: [Q]
    gated_ptr,  # scratch: [INTER]
    partial_ptr,  # scratch: [num_kv_heads, NUM_SPLITS, group, head_dim] fp32
    lse_ptr,  # scratch: [num_kv_heads, NUM_SPLITS, group] fp32
    counters_ptr,  # [2 + num_kv_heads] int32, zero before and after
    table_stride,
    layer_stride,
    block_stride,
    head_stride,
    position_stride,
    first_layer,
    end_layer,
    eps,
    scale_log2,  # scale * log2(e), as exp2 is the cheaper exponential
    PHASES: tl.constexpr,  # the one to run, of one layer; ALL = all with barriers between
    HIDDEN: tl.constexpr,
    INTER: tl.constexpr,
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of a unit
    HIDDEN_BLOCK: tl.constexpr,  # hidden, up to the next power of two
    QKV_TILE: tl.constexpr,  # of each product: rows of a unit, units held, units a program has
    QKV_HELD: tl.constexpr,
    QKV_UNITS: tl.constexpr,
    O_TILE: tl.constexpr,
    O_HELD: tl.constexpr,
    O_UNITS: tl.constexpr,
    MLP_TILE: tl.constexpr,
    MLP_HELD: tl.constexpr,
    MLP_UNITS: tl.constexpr,
    DOWN_TILE: tl.constexpr,
    DOWN_HELD: tl.constexpr,
    DOWN_UNITS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # query heads a KV head, up to the next power of two >= 16
    DIM_BLOCK: tl.constexpr,  # head_dim, up to the next power of two
    TILE: tl.constexpr,  # positions a tile; divides block_size
    NUM_SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    MERGE_GROUP: tl.constexpr,
    HAS_QKV_BIAS: tl.constexpr,
    HAS_QK_NORM: tl.constexpr,
    HAS_O_BIAS: tl.constexpr,
    HAS_MLP_BIAS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HOLDS_O_EARLY: tl.constexpr,  # o's first weights are held through attention
    PREFETCH_QKV: tl.constexpr,  # tiles of each product to prefetch, 0 = none
    PREFETCH_O: tl.constexpr,
    PREFETCH_MLP: tl.constexpr,
    PREFETCH_DOWN: tl.constexpr,
    MULTIPLIES_IN: tl.constexpr,  # dtype of attention's products
) -> None:
    dtype: tl.constexpr = embedding_ptr.dtype.element_ty
    Q: tl.constexpr = num_q_heads * head_dim
    QKV_ROWS: tl.constexpr = Q + 2 * num_kv_heads * head_dim
    num_programs = tl.num_programs(0)
    token = tl.load(tokens_ptr)
    position = tl.load(positions_ptr).to(tl.int64)
    kv_slot = tl.load(kv_slots_ptr).to(tl.int64)
    context_len = tl.load(context_lens_ptr)
    row_table_ptr = block_tables_ptr + tl.maximum(tl.load(rows_ptr), 0).to(tl.int64) * table_stride
    token_ptr = embedding_ptr + token.to(tl.int64) * HIDDEN
    half = tl.arange(0, DIM_BLOCK // 2)[None, :]
    angles = position * (head_dim // 2) + half
    cos = tl.load(cos_ptr + angles, mask=half < head_dim // 2, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=half < head_dim // 2, other=0.0)
    kv_head = tl.program_id(0) // NUM_SPLITS
    split = tl.program_id(0) % NUM_SPLITS
    zero = tl.full([], 0, tl.int64)  # a layer's part of the cache may begin beyond 32 bits
    barriers = 0

    fields = table_ptr + first_layer * FIELDS
    norm_ptr = _pointer(fields, 0, dtype)
    qkv_weight_ptr = _pointer(fields, 1, dtype)
    if QKV & PHASES:
        norm = load_norm(norm_ptr, HIDDEN, CHUNK)
        qkv_units = load_units(
            qkv_weight_ptr, QKV_ROWS, QKV_ROWS, HIDDEN, CHUNK, QKV_TILE, 1, QKV_HELD
        )
    for layer in range(first_layer, end_layer):
        fields = table_ptr + layer * FIELDS
        # The addresses that are needed behind the barriers, all ahead of them.
        qkv_bias_ptr = _pointer(fields, 2, dtype)
        q_norm_ptr = _pointer(fields, 3, dtype)
        k_norm_ptr = _pointer(fields, 4, dtype)
        o_ptr = _pointer(fields, 5, dtype)
        o_bias_ptr = _pointer(fields, 6, dtype)
        mlp_norm_ptr = _pointer(fields, 7, dtype)
        mlp_ptr = _pointer(fields, 8, dtype)
        mlp_bias_ptr = _pointer(fields, 9, dtype)
        down_ptr = _pointer(fields, 10, dtype)
        down_bias_ptr = _pointer(fields, 11, dtype)
        is_last = layer + 1 >= end_layer
        next_fields = fields + tl.where(is_last, 0, FIELDS)
        next_norm_ptr = _pointer(next_fields, 0, dtype)
        next_qkv_ptr = _pointer(next_fields, 1, dtype)
        first = 0
        if HAS_WINDOW:
            first = tl.maximum(context_len - tl.load(fields + 12), 0).to(tl.int32)
        first_tile = first // TILE
        num_tiles = tl.cdiv(context_len, TILE) - first_tile
        per_split = tl.maximum(tl.cdiv(num_tiles, NUM_SPLITS), 1)
        num_live = tl.cdiv(num_tiles, per_split)
        begin = first_tile + split * per_split
        end = tl.minimum(begin + per_split, first_tile + num_tiles)
        if kv_head >= num_kv_heads:  # programs beyond the last head's
            end = begin
        in_cache = (zero + layer) * layer_stride + kv_head * head_stride
        k_ptr, v_ptr = k_cache_ptr + in_cache, v_cache_ptr + in_cache
        block = tl.load(row_table_ptr + begin * TILE // block_size, mask=begin < end, other=0)
        upcoming = tl.load(
            row_table_ptr + (begin + 1) * TILE // block_size, mask=begin + 1 < end, other=0
        )

        if PHASES == ALL and barriers > 0:
            wait(counters_ptr, barriers * num_programs)
        if QKV & PHASES:
            multiply_row(
                qkv_units, norm, qkv_weight_ptr, norm_ptr, qkv_bias_ptr, residual_ptr, token_ptr,
                (layer == 0) & (token >= 0), layer > 0, qkv_ptr, eps,
                QKV_ROWS, HIDDEN, CHUNK, QKV_TILE, 1, QKV_HELD, QKV_UNITS, HIDDEN_BLOCK,
                True, False, HAS_QKV_BIAS,
            )  # fmt: skip
            if (layer == 0) & (tl.program_id(0) == 0):
                columns = tl.arange(0, HIDDEN_BLOCK)
                is_read = (columns < HIDDEN) & (token >= 0)
                stream = tl.load(token_ptr + columns, mask=is_read, other=0.0).to(tl.float32)
                tl.store(residual_ptr + columns, stream, mask=columns < HIDDEN)
        if PHASES == ALL:
            arrive(counters_ptr)
            barriers += 1
        if ATTENTION & PHASES:
            k_low, k_high, v = load_tile(
                k_ptr, v_ptr, block, begin, first, tl.minimum(end * TILE, context_len - 1),
                block_stride, position_stride, head_dim, block_size, DIM_BLOCK, TILE,
            )  # fmt: skip
            q_norms, k_norms = (None, None), (None, None)
            if HAS_QK_NORM:
                q_norms = load_halves(q_norm_ptr, head_dim, DIM_BLOCK)
                k_norms = load_halves(k_norm_ptr, head_dim, DIM_BLOCK)
        if (PHASES == ALL and HOLDS_O_EARLY) or PHASES == OUT:
            o_units = load_units(o_ptr, HIDDEN, HIDDEN, Q, CHUNK, O_TILE, 1, O_HELD)
        if PHASES == ALL:
            if PREFETCH_MLP > 0:
                prefetch_rows(mlp_ptr, PREFETCH_MLP, INTER, HIDDEN, MLP_TILE, 2)
            wait(counters_ptr, barriers * num_programs)
        if (ATTENTION & PHASES) and begin < end:
            attend_row(
                k_low, k_high, v, upcoming, k_ptr, v_ptr, row_table_ptr, qkv_ptr, partial_ptr,
                lse_ptr, counters_ptr + 2, mixed_ptr, q_norms, k_norms, cos, sin, kv_head,
                split, num_live, first, begin, end, context_len, kv_slot, block_stride,
                position_stride, eps, scale_log2, num_q_heads, num_kv_heads, head_dim,
                block_size, GROUP_BLOCK, DIM_BLOCK, TILE, NUM_SPLITS, SPLITS_BLOCK,
                MERGE_GROUP, MULTIPLIES_IN,
            )  # fmt: skip
        if PHASES == ALL:
            arrive(counters_ptr)
            barriers += 1
            if not HOLDS_O_EARLY:
                o_units = load_units(o_ptr, HIDDEN, HIDDEN, Q, CHUNK, O_TILE, 1, O_HELD)
            if PREFETCH_DOWN > 0:
                prefetch_rows(down_ptr, PREFETCH_DOWN, HIDDEN, INTER, DOWN_TILE, 1)
            wait(counters_ptr, barriers * num_programs)
        if OUT & PHASES:
            multiply_row(
                o_units, 0.0, o_ptr, o_ptr, o_bias_ptr, mixed_ptr, token_ptr, False, False,
                residual_ptr, eps, HIDDEN, Q, CHUNK, O_TILE, 1, O_HELD, O_UNITS, HIDDEN_BLOCK,
                False, True, HAS_O_BIAS,
            )  # fmt: skip
        if PHASES == ALL:
            arrive(counters_ptr)
            barriers += 1
        if GATE_UP & PHASES:
            mlp_norm = load_norm(mlp_norm_ptr, HIDDEN, CHUNK)
            mlp_units = load_units(mlp_ptr, INTER, INTER, HIDDEN, CHUNK, MLP_TILE, 2, MLP_HELD)
        if PHASES == ALL:
            if PREFETCH_QKV > 0:
                prefetch_rows(next_qkv_ptr, PREFETCH_QKV, QKV_ROWS, HIDDEN, QKV_TILE, 1)
            wait(counters_ptr, barriers * num_programs)
        if GATE_UP & PHASES:
            multiply_row(
                mlp_units, mlp_norm, mlp_ptr, mlp_norm_ptr, mlp_bias_ptr, residual_ptr, token_ptr,
                False, True, gated_ptr, eps, INTER, HIDDEN, CHUNK, MLP_TILE, 2, MLP_HELD,
                MLP_UNITS, HIDDEN_BLOCK, True, False, HAS_MLP_BIAS,
            )  # fmt: skip
        if PHASES == ALL:
            arrive(counters_ptr)
            barriers += 1
        if DOWN & PHASES:
            down_units = load_units(down_ptr, HIDDEN, HIDDEN, INTER, CHUNK, DOWN_TILE, 1, DOWN_HELD)
        if PHASES == ALL:
            if PREFETCH_O > 0:
                next_o_ptr = _pointer(next_fields, 5, dtype)
                prefetch_rows(next_o_ptr, PREFETCH_O, HIDDEN, Q, O_TILE, 1)
            wait(counters_ptr, barriers * num_programs)
        if DOWN & PHASES:
            multiply_row(
                down_units, 0.0, down_ptr, down_ptr, down_bias_ptr, gated_ptr, token_ptr, False,
                False, residual_ptr, eps, HIDDEN, INTER, CHUNK, DOWN_TILE, 1, DOWN_HELD,
                DOWN_UNITS, HIDDEN_BLOCK, False, True, HAS_MLP_BIAS,
            )  # fmt: skip
        if PHASES == ALL:
            arrive(counters_ptr)
            barriers += 1
            norm_ptr, qkv_weight_ptr = next_norm_ptr, next_qkv_ptr
            norm = load_norm(norm_ptr, HIDDEN, CHUNK)
            qkv_units = load_units(
                qkv_weight_ptr, tl.where(is_last, 0, QKV_ROWS), QKV_ROWS, HIDDEN, CHUNK,
                QKV_TILE, 1, QKV_HELD,
            )  # fmt: skip
    if PHASES == ALL:
        leave(counters_ptr)


@dataclass(frozen=True, slots=True)
class Product:
    """How a program takes one of the four products."""

    tile: int  # rows of a unit, a multiple of the warps
    held: int  # units in registers
    units: int  # a program's, all

    def prefetched(self, k: int, chunk: int, parts: int, element_bytes: int) -> int:
        """Return tiles of a part to prefetch: what is held, or as many as PREFETCH_BYTES hold."""
        per_tile = -(-k // chunk) * parts
        least = max(PREFETCH_BYTES // (self.tile * k * element_bytes * parts), 1)
        return min(-(-self.units // per_tile), least)


@dataclass(frozen=True, slots=True)
class LayersTuning:
    """What a measurement decides; the result is the same but for rounding."""

    num_programs: int  # at most the multiprocessors, at least the KV heads
    chunk: int  # columns of a unit, a power of two of at least 256
    wide_tile: int = 16  # rows of a unit where a program's weights do not fit its registers
    wide_held: int = 4
    held_bytes: int = 96 * 1024
    num_warps: int = 8
    prefetches: bool = True
    holds_o_early: bool = False
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
    shapes = LayerTensors(
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


def decode_layers(
    work: LayersWork,
    embedding: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    context_lens: torch.Tensor,
    rows: torch.Tensor,
    block_tables: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Return the residual stream behind the last layer: [1, hidden] fp32, work's own.

    Args:
        work: of this model.
        embedding: [vocab, hidden], contiguous.
        tokens: [1] int32, negative = padding.
        positions: [1] int32, within the tables of angles.
        kv_slots: [1] int32, block * block_size + offset of the position; -1 = not written.
        context_lens: [1] int32, positions + 1; 0 = padding.
        rows: [1] int32, the row of block_tables; any number for padding.
        block_tables: [num_slots, max_blocks] int32, any row stride.
        cos: [max_positions, head_dim // 2] fp32.
        sin: like cos.
        k_cache: [num_layers, num_blocks, num_kv_heads, block_size, head_dim], dtype of embedding,
            contiguous; the new position is written.
        v_cache: like k_cache.
        eps: of all norms.
    """
    num_q_heads, num_kv_heads, head_dim = work.heads
    check_leading("embedding", embedding, 2)
    device, dtype = embedding.device, embedding.dtype
    hidden, inter = work.residual.shape[1], work.gated.shape[0]
    check_tensor("embedding", embedding, (embedding.shape[0], hidden), work.qkv.dtype, device)
    for name, tensor in (
        ("tokens", tokens), ("positions", positions), ("kv_slots", kv_slots),
        ("context_lens", context_lens), ("rows", rows),
    ):  # fmt: skip
        check_tensor(name, tensor, (1,), torch.int32, device)
    check_block_tables(block_tables, device)
    check_tensor("cos", cos, (cos.shape[0], head_dim // 2), torch.float32, device)
    check_tensor("sin", sin, tuple(cos.shape), torch.float32, device)
    num_blocks, block_size = k_cache.shape[1], k_cache.shape[3]
    shape = (len(work.layers), num_blocks, num_kv_heads, block_size, head_dim)
    check_tensor("k_cache", k_cache, shape, dtype, device)
    check_tensor("v_cache", v_cache, shape, dtype, device)
    check_attention(num_q_heads, num_kv_heads, head_dim, block_size, None)
    tensors = (
        work.table, embedding, tokens, positions, kv_slots, context_lens, rows, block_tables,
        cos, sin, k_cache, v_cache, work.residual.view(-1), work.qkv, work.mixed, work.gated,
        work.partial, work.lse, work.counters,
    )  # fmt: skip
    strides = (block_tables.stride(0), *k_cache.stride()[:4])
    scale = (eps, head_dim**-0.5 * 1.4426950408889634)
    flags = _flags(work, hidden, inter, block_size, dtype)
    grid = (work.tuning.num_programs,)
    if not is_interpreted():
        if work.tuning.is_cooperative:
            flags["launch_cooperative_grid"] = True
        _decode_layers_kernel[grid](
            *tensors, *strides, 0, len(work.layers), *scale, PHASES=ALL.value, **flags
        )
        return work.residual
    for layer in range(len(work.layers)):
        for phase in range(5):
            _decode_layers_kernel[grid](
                *tensors, *strides, layer, layer + 1, *scale, PHASES=1 << phase, **flags
            )
    return work.residual


def _flags(
    work: LayersWork, hidden: int, inter: int, block_size: int, dtype: torch.dtype
) -> dict[str, object]:
    num_q_heads, num_kv_heads, head_dim = work.heads
    tuning, first = work.tuning, work.layers[0]
    group, size = num_q_heads // num_kv_heads, dtype.itemsize
    shapes = {
        "QKV": (work.qkv.shape[0], hidden, 1),
        "O": (hidden, num_q_heads * head_dim, 1),
        "MLP": (inter, hidden, 2),
        "DOWN": (hidden, inter, 1),
    }
    multiplies_in = tl.float16 if dtype is torch.float16 else tl.bfloat16
    if is_interpreted():
        multiplies_in = tl.float32  # it cannot multiply bf16
    flags: dict[str, object] = {}
    for name, (n, k, parts) in shapes.items():
        product = tuning.product(n, k, parts, size)
        tiles = product.prefetched(k, tuning.chunk, parts, size)
        flags |= {
            f"{name}_TILE": product.tile,
            f"{name}_HELD": product.held,
            f"{name}_UNITS": product.units,
            f"PREFETCH_{name}": tiles if tuning.prefetches and not is_interpreted() else 0,
        }
    return flags | {
        "HIDDEN": hidden,
        "INTER": inter,
        "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "CHUNK": tuning.chunk,
        "HIDDEN_BLOCK": max(triton.next_power_of_2(hidden), 256),
        "GROUP_BLOCK": max(16, triton.next_power_of_2(group)),
        "DIM_BLOCK": triton.next_power_of_2(head_dim),
        "TILE": min(64, block_size),
        "NUM_SPLITS": work.num_splits,
        "SPLITS_BLOCK": triton.next_power_of_2(work.num_splits),
        "MERGE_GROUP": triton.next_power_of_2(group),
        "HAS_QKV_BIAS": first.qkv_bias is not None,
        "HAS_QK_NORM": first.q_norm is not None,
        "HAS_O_BIAS": first.o_bias is not None,
        "HAS_MLP_BIAS": first.gate_up_bias is not None,
        "HAS_WINDOW": work.has_window,
        "HOLDS_O_EARLY": tuning.holds_o_early and flags["O_HELD"] == flags["O_UNITS"],
        "MULTIPLIES_IN": multiplies_in,
        "num_warps": tuning.num_warps,
        "num_stages": 1,
    }


#: Two layers of two roundings each way, on a stream of the size of a few units.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
