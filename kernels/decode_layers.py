"""All layers of a decode step for one sequence, in one launch.

    residual = embedding[token]
    each layer:  qkv = linear(rms_norm(residual));  mixed = attention(rotate(qkv)), K and V written
                 residual += o(mixed)
                 gated = silu(gate) * up of linear(rms_norm(residual));  residual += down(gated)

With one row a step is the reading of its weights and 6 launches a layer, each of which waits for
the one before, for its first loads and for its last stores. Here a layer is five phases of one
persistent launch, a program a multiprocessor, with barriers between (grid_barrier.py); and while a
program waits at a barrier the next phase's first weights are on their way into its registers
(row_products.py), old keys and values too (row_attention.py).

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

What it does not take (`layers_work.can_run`) goes the way of a launch an operation.

Size: one kernel of five phases, whose launcher takes all tensors of a model.
"""

from collections.abc import Sequence

import torch

from headrace.kernels.cache_checks import check_attention, check_block_tables
from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.grid_barrier import arrive, leave, wait
from headrace.kernels.layers_work import FIELDS, LayersWork, LayerTensors
from headrace.kernels.paged_decode import paged_decode_reference
from headrace.kernels.qkv_rope_write import qkv_rope_write_reference
from headrace.kernels.row_attention import attend_row, load_halves, load_tile
from headrace.kernels.row_products import load_norm, load_units, multiply_row
from headrace.kernels.skinny_linear import skinny_linear_reference
from headrace.kernels.triton_seam import is_interpreted, tl, triton

# What a constexpr condition binds, the same condition reads.
# pyright: reportPossiblyUnboundVariable=false

#: Phases, as `decode_layers` launches them one by one where it must.
QKV, ATTENTION, OUT, GATE_UP, DOWN = (
    tl.constexpr(1 << phase)  # pyright: ignore[reportCallIssue]
    for phase in range(5)
)
ALL = tl.constexpr(31)  # pyright: ignore[reportCallIssue]


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


# Of these a value that happens to be 1 or divisible by 16 makes no variant.
@triton.jit(do_not_specialize=["num_blocks", "first_layer", "end_layer"])
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
    num_blocks,
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
    MULTIPLIES_IN: tl.constexpr,  # dtype of attention's products
) -> None:
    dtype: tl.constexpr = embedding_ptr.dtype.element_ty
    Q: tl.constexpr = num_q_heads * head_dim
    QKV_ROWS: tl.constexpr = Q + 2 * num_kv_heads * head_dim
    position_stride: tl.constexpr = head_dim
    head_stride: tl.constexpr = block_size * head_dim
    block_stride: tl.constexpr = num_kv_heads * head_stride
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
    # In 64 bits: a layer's part of the cache may begin beyond 32.
    layer_stride = tl.full([], block_stride, tl.int64) * num_blocks
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
        in_cache = layer_stride * layer + kv_head * head_stride
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
        if PHASES == ALL:
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
        if OUT & PHASES:
            o_units = load_units(o_ptr, HIDDEN, HIDDEN, Q, CHUNK, O_TILE, 1, O_HELD)
        if PHASES == ALL:
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
    sizes = (block_tables.stride(0), num_blocks)
    scale = (eps, head_dim**-0.5 * 1.4426950408889634)
    flags = _flags(work, hidden, inter, block_size, dtype)
    grid = (work.tuning.num_programs,)
    if not is_interpreted():
        if work.tuning.is_cooperative:
            flags["launch_cooperative_grid"] = True
        _decode_layers_kernel[grid](
            *tensors, *sizes, 0, len(work.layers), *scale, PHASES=ALL.value, **flags
        )
        return work.residual
    for layer in range(len(work.layers)):
        for phase in range(5):
            _decode_layers_kernel[grid](
                *tensors, *sizes, layer, layer + 1, *scale, PHASES=1 << phase, **flags
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
        flags |= {
            f"{name}_TILE": product.tile,
            f"{name}_HELD": product.held,
            f"{name}_UNITS": product.units,
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
        "MULTIPLIES_IN": multiplies_in,
        "num_warps": tuning.num_warps,
        "num_stages": 1,
    }


#: Two layers of two roundings each way, on a stream of the size of a few units.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
