"""Causal attention of ragged prompt chunks over the paged KV cache (prefill).

    out[t, h] = softmax(scale * q[t, h] . K[s]) V[s]        over the positions token t may see

Rows cu_q_lens[s] .. cu_q_lens[s + 1] - 1 of q are the chunk of sequence s; its last token is at
position context_lens[s] - 1, and K and V of the chunk are in the cache already. A token at position
p sees positions <= p, with a window only those > p - window; blocks wholly behind the window of the
chunk's first token are never read. A chunk may be empty; one token is a decode.
Rows in no chunk, before the first or after the last, are neither read nor written.

A constant number of programs strides over (query tile, block of query heads), the tiles listed
longest first by `plan_prefill`, once a step. A tile holds some tokens times the query heads that
share a KV head, so a page is read once for all of them. Of its context only the first positions
under a window and the last ones, on the diagonal, are masked.
Numerics: scores, softmax and sums in fp32, rounded once to q.dtype. An fp8 cache is multiplied in
fp16, which holds every e4m3 value; its scales meet the scores and the output. fp32 is exact.

A form that left the product with the values in flight over the next tile's softmax was right in the
interpreter and gave NaN on an H200 (Triton 3.6, head_dim 128): it is not used.
Size: three stretches of keys with and without masks call one loop, and what it carries and reads
is a long list of arguments each time; apart, its functions could not be read against each other.
"""

import math

import torch

from headrace.kernels.cache_checks import check_attention, check_block_tables, check_caches
from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.prefill_work import (
    PrefillTiling,
    PrefillWork,
    check_tiling,
    choose_tiling,
    make_prefill_work,
    plan_prefill,
)
from headrace.kernels.triton_seam import is_interpreted, tl, triton


def paged_prefill_reference(
    q: torch.Tensor,  # [num_tokens, num_q_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # like k_cache
    block_tables: torch.Tensor,  # [num_rows, max_blocks] int32, -1 = unused
    cu_q_lens: torch.Tensor,  # [num_chunks + 1] int32, rows where chunks start, and the end
    context_lens: torch.Tensor,  # [num_chunks] int32, tokens in the cache with this chunk
    scale: float,
    window: int | None = None,  # positions seen, the token's own included; None = all
    table_rows: torch.Tensor | None = None,  # [num_chunks] int32; None = row i for chunk i
    k_scale: torch.Tensor | None = None,  # [num_kv_heads] fp32, of an fp8 cache
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [num_tokens, num_q_heads, head_dim]; rows in no chunk are zero."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    out = torch.zeros_like(q)
    starts = cu_q_lens.tolist()
    rows = list(range(len(context_lens))) if table_rows is None else table_rows.tolist()
    for chunk, context_len in enumerate(context_lens.tolist()):
        start, end = starts[chunk], starts[chunk + 1]
        if start == end:
            continue
        first_position = context_len - (end - start)
        first = max(0, first_position - window + 1) if window is not None else 0
        first -= first % block_size
        blocks = block_tables[rows[chunk], first // block_size : -(-context_len // block_size)]
        seen_len = context_len - first
        # [num_kv_heads, seen_len, head_dim]
        k = k_cache[blocks.long()].float().flatten(0, 1)[:seen_len].transpose(0, 1)
        v = v_cache[blocks.long()].float().flatten(0, 1)[:seen_len].transpose(0, 1)
        if k_scale is not None and v_scale is not None:
            k, v = k * k_scale[:, None, None], v * v_scale[:, None, None]
        q_position = torch.arange(first_position, context_len, device=q.device)[:, None]
        k_position = torch.arange(first, context_len, device=q.device)[None, :]
        seen = k_position <= q_position
        if window is not None:
            seen &= k_position > q_position - window
        # One product a KV head for all query heads of its group: [kv, group * chunk, head_dim].
        q_rows = q[start:end].view(end - start, num_kv_heads, -1, head_dim).float()
        grouped_q = q_rows.permute(1, 2, 0, 3).flatten(1, 2)
        scores = (grouped_q @ k.transpose(1, 2) * scale).view(
            num_kv_heads, -1, end - start, seen_len
        )
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        mixed = (weights.flatten(1, 2) @ v).view(num_kv_heads, -1, end - start, head_dim)
        out[start:end] = mixed.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


@triton.jit
def _attend(
    acc,  # [ROWS, DIM_BLOCK] fp32, as are row_max and row_sum: [ROWS]
    row_max,
    row_sum,
    q,  # [ROWS, DIM_BLOCK]
    q_positions,  # [ROWS] int32
    k_ptr,  # in: this KV head at block 0, position 0
    v_ptr,
    table_ptr,  # in: [max_blocks] int32, blocks of this sequence
    start,  # first position, a multiple of TILE
    stop,  # ends the positions of this call
    end,  # ends the positions that any row may see
    window,
    score_scale,
    stride_block,
    stride_position,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    IS_MASKED: tl.constexpr,  # some row may not see some position of these tiles
    HAS_WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add positions [start, stop) to the running softmax, a tile within one block at a time."""
    lanes = tl.arange(0, TILE)
    dims = tl.arange(0, DIM_BLOCK)
    offsets = lanes[:, None] * stride_position + dims[None, :]
    is_dim = (dims < head_dim)[None, :]
    # The block of the next tile is asked for a tile ahead: its load hides behind the products.
    block = tl.load(table_ptr + start // block_size, mask=start < stop, other=0)
    for step in range(start, stop, TILE):
        page = block.to(tl.int64) * stride_block + step % block_size * stride_position
        next_step = step + TILE
        block = tl.load(table_ptr + next_step // block_size, mask=next_step < stop, other=0)
        if IS_MASKED:
            # What lies beyond the end may be NaN, and 0 * NaN would reach the sums.
            is_kv = ((step + lanes) < end)[:, None] & is_dim
            k = tl.load(k_ptr + page + offsets, mask=is_kv, other=0.0).to(q.dtype)
            v = tl.load(v_ptr + page + offsets, mask=is_kv, other=0.0).to(q.dtype)
        elif head_dim != DIM_BLOCK:
            k = tl.load(k_ptr + page + offsets, mask=is_dim, other=0.0).to(q.dtype)
            v = tl.load(v_ptr + page + offsets, mask=is_dim, other=0.0).to(q.dtype)
        else:
            k = tl.load(k_ptr + page + offsets).to(q.dtype)
            v = tl.load(v_ptr + page + offsets).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if IS_MASKED:
            positions = (step + lanes)[None, :]
            is_seen = positions <= q_positions[:, None]
            if HAS_WINDOW:
                is_seen &= positions > q_positions[:, None] - window
            scores = tl.where(is_seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * score_scale)
        origin = new_max
        if HAS_WINDOW:
            # A row may see nothing of the first tiles: no maximum to measure from yet.
            origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * score_scale - origin[:, None])
        decay = tl.exp2(row_max - origin)
        row_sum = row_sum * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _paged_prefill_kernel(
    q_ptr,  # in: [num_tokens, num_q_heads, head_dim]
    k_cache_ptr,  # in: [num_blocks, block_size, num_kv_heads, head_dim], strides below
    v_cache_ptr,  # in: like k_cache
    block_tables_ptr,  # in: [num_rows, max_blocks] int32
    tiles_ptr,  # in: [max_tiles, 4] int32, see prefill_work.py
    num_tiles_ptr,  # in: [1] int32
    k_scale_ptr,  # in: [num_kv_heads] fp32, None unless the cache is fp8
    v_scale_ptr,
    out_ptr,  # out: [num_tokens, num_q_heads, head_dim], rows of listed tiles
    stride_table,
    stride_block,
    stride_position,
    stride_head,
    window,
    scale_log2,  # scale * log2(e), as exp2 is the cheaper exponential
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    ROWS: tl.constexpr,  # rows a tile, at least TOKENS * HEADS
    HEADS: tl.constexpr,  # query heads a tile, all of one KV head
    DIM_BLOCK: tl.constexpr,  # head_dim, up to the next power of two
    TILE: tl.constexpr,  # positions a step; divides block_size, so they lie in one block
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in fp32: Triton's interpreter multiplies bf16 wrongly
) -> None:
    """One program: every num_programs(0)-th query tile and block of HEADS query heads."""
    num_programs = tl.num_programs(0)
    head_blocks: tl.constexpr = num_q_heads // HEADS
    group: tl.constexpr = num_q_heads // num_kv_heads
    num_items = tl.load(num_tiles_ptr) * head_blocks
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_BLOCK)
    for turn in range(tl.cdiv(num_items, num_programs)):
        # Back and forth, so that who has the longest tile of one turn has the shortest of the next.
        place = tl.program_id(0)
        place = tl.where(turn % 2 == 0, place, num_programs - 1 - place)
        item = turn * num_programs + place
        if item < num_items:
            fields = tiles_ptr + item // head_blocks * 4
            first_row = tl.load(fields)
            num_rows = tl.load(fields + 1)
            first_position = tl.load(fields + 2)
            table_row = tl.load(fields + 3).to(tl.int64)
            first_head = item % head_blocks * HEADS
            kv_head = first_head // group
            score_scale = scale_log2
            if k_scale_ptr is not None:
                score_scale = scale_log2 * tl.load(k_scale_ptr + kv_head)

            token = rows // HEADS
            q_rows = (first_row + token).to(tl.int64) * num_q_heads + first_head + rows % HEADS
            q_offsets = q_rows[:, None] * head_dim + dims[None, :]
            is_q = (token < num_rows)[:, None] & (dims < head_dim)[None, :]
            q = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
            if UPCAST:
                q = q.to(tl.float32)
            elif k_scale_ptr is not None and q_ptr.dtype.element_ty != tl.float32:
                # fp16 ends at 65504: beyond, scores are far past anything that softmax tells apart.
                q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
            q_positions = first_position + token

            end = first_position + num_rows
            first = 0
            window_end = 0
            if HAS_WINDOW:
                first = tl.maximum(first_position - window + 1, 0) // TILE * TILE
                window_end = tl.cdiv(tl.maximum(end - window, 0), TILE) * TILE
            # [first, inner) is cut by the window, [diagonal, end) by causality.
            diagonal = (first_position + 1) // TILE * TILE
            inner = tl.minimum(tl.maximum(window_end, first), diagonal)

            k_ptr = k_cache_ptr + kv_head.to(tl.int64) * stride_head
            v_ptr = v_cache_ptr + kv_head.to(tl.int64) * stride_head
            table_ptr = block_tables_ptr + table_row * stride_table
            row_max = tl.full([ROWS], float("-inf"), tl.float32)
            row_sum = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
            if HAS_WINDOW:
                acc, row_max, row_sum = _attend(
                    acc, row_max, row_sum, q, q_positions, k_ptr, v_ptr, table_ptr, first, inner,
                    end, window, score_scale, stride_block, stride_position, head_dim, block_size,
                    DIM_BLOCK, TILE, True, True,
                )  # fmt: skip
            acc, row_max, row_sum = _attend(
                acc, row_max, row_sum, q, q_positions, k_ptr, v_ptr, table_ptr, inner, diagonal,
                end, window, score_scale, stride_block, stride_position, head_dim, block_size,
                DIM_BLOCK, TILE, False, HAS_WINDOW,
            )  # fmt: skip
            acc, row_max, row_sum = _attend(
                acc, row_max, row_sum, q, q_positions, k_ptr, v_ptr, table_ptr, diagonal, end,
                end, window, score_scale, stride_block, stride_position, head_dim, block_size,
                DIM_BLOCK, TILE, True, HAS_WINDOW,
            )  # fmt: skip
            # A row past the tile's last may have seen nothing under a window: zero, not 0 / 0.
            inverse = 1.0 / tl.where(row_sum == 0.0, 1.0, row_sum)
            if v_scale_ptr is not None:
                inverse *= tl.load(v_scale_ptr + kv_head)
            out = acc * inverse[:, None]
            tl.store(out_ptr + q_offsets, out.to(out_ptr.dtype.element_ty), mask=is_q)


def paged_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_q_lens: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
    *,
    table_rows: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    work: PrefillWork | None = None,
    tiling: PrefillTiling | None = None,
    num_programs: int | None = None,
) -> torch.Tensor:
    """Attend causally from ragged chunks of prompts to their paged contexts.

    Args:
        q: [num_tokens, num_q_heads, head_dim], contiguous; head_dim 64, 96, 128 or 256.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], any strides but the last, of
            q's dtype or float8_e4m3fn.
        v_cache: like k_cache, with its strides.
        block_tables: [num_rows, max_blocks] int32, any row stride; entries of unseen blocks are
            never read through.
        cu_q_lens: [num_chunks + 1] int32, rows of q where each chunk starts, and the end.
        context_lens: [num_chunks] int32, tokens in the cache with this chunk.
        scale: of the scores, above zero, usually head_dim ** -0.5.
        window: positions seen, the token's own included; None = all.
        out: like q. Allocated when None; rows in no chunk are left as they are.
        table_rows: [num_chunks] int32, rows of block_tables; None = row i for chunk i.
        k_scale: [num_kv_heads] fp32, of an fp8 cache: value = stored * scale.
        v_scale: like k_scale.
        work: the tiles of these chunks, listed by `plan_prefill` with `tiling.tile_tokens`; None =
            listed here. Where it is given, cu_q_lens, context_lens and table_rows are not read.
        tiling: None = `choose_tiling`.
        num_programs: of the grid; None = by the device's size.
    """
    check_leading("q", q, 3)
    num_tokens, num_q_heads, head_dim = q.shape
    caches, scales = (k_cache, v_cache), (k_scale, v_scale)
    check_caches((num_q_heads, head_dim), q.dtype, q.device, caches, scales)
    block_size, num_kv_heads = k_cache.shape[1:3]
    check_attention(num_q_heads, num_kv_heads, head_dim, block_size, window)
    check_block_tables(block_tables, q.device)
    num_chunks = context_lens.shape[0]
    check_tensor("context_lens", context_lens, (num_chunks,), torch.int32, q.device)
    check_tensor("cu_q_lens", cu_q_lens, (num_chunks + 1,), torch.int32, q.device)
    if not scale > 0:
        raise ValueError(
            f"scale must be above 0; found {scale}: pass head_dim ** -0.5 or the model's own"
        )
    if out is None:
        out = torch.empty_like(q)
    check_tensor("out", out, tuple(q.shape), q.dtype, q.device)
    group = num_q_heads // num_kv_heads
    tiling = tiling or choose_tiling(group, head_dim, q.dtype)
    check_tiling(tiling, group, work, q.device)
    if num_tokens == 0 or num_chunks == 0:
        return out
    if work is None:
        work = make_prefill_work(num_tokens, num_chunks, tiling.tile_tokens, q.device)
        plan_prefill(work, cu_q_lens, context_lens, table_rows)
    max_items = work.tiles.shape[0] * (num_q_heads // tiling.heads)
    num_programs = num_programs or _count_programs(tiling, q.device)
    _paged_prefill_kernel[(max(1, min(num_programs, max_items)),)](
        q, k_cache, v_cache, block_tables, work.tiles, work.num_tiles, k_scale, v_scale, out,
        block_tables.stride(0), *k_cache.stride()[:3], window or 0, scale * math.log2(math.e),
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, ROWS=tiling.rows, HEADS=tiling.heads,
        DIM_BLOCK=triton.next_power_of_2(head_dim), TILE=min(block_size, tiling.tile),
        HAS_WINDOW=window is not None, UPCAST=is_interpreted() and q.dtype != torch.float16,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip
    return out


def _count_programs(tiling: PrefillTiling, device: torch.device) -> int:
    """Return the size of the constant grid: what the device runs at a time."""
    if device.type != "cuda":
        return 4
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return num_sms * tiling.programs_a_sm


#: Sums of products of unit normals in another order; weights are rounded to the dtype before they
#: meet V, and the result once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
