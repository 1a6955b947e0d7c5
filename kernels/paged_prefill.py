"""Causal attention of ragged prompt chunks over the paged KV cache (prefill).

    out[t, h] = softmax(scale * q[t, h] . K[s]) V[s]        over the positions token t may see

Tokens cu_q_lens[s] .. cu_q_lens[s + 1] - 1 are the chunk of sequence s; its last token is at
position context_lens[s] - 1, and K and V of the chunk are in the cache already. A token at position
p sees positions <= p, with a window only those > p - window; blocks wholly behind the window of the
chunk's first token are never read. A chunk may be empty; one token is a decode.
Rows at or beyond cu_q_lens[num_seqs] are padding and come out zero.
Numerics: scores, softmax and sums in fp32, rounded once to q.dtype.
"""

import math

import torch

from headrace.kernels.checks import check_attention, check_cache, check_leading, check_tensor
from headrace.kernels.paged_decode import NO_WINDOW
from headrace.kernels.triton_seam import is_interpreted, tl, triton


def paged_prefill_reference(
    q: torch.Tensor,  # [num_tokens, num_q_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # like k_cache
    block_tables: torch.Tensor,  # [num_seqs, max_blocks] int32, -1 = unused
    cu_q_lens: torch.Tensor,  # [num_seqs + 1] int32, running sum of chunk lengths from 0
    context_lens: torch.Tensor,  # [num_seqs] int32, tokens in the cache with this chunk
    scale: float,
    window: int | None = None,  # positions seen, the token's own included; None = all
) -> torch.Tensor:
    """Return [num_tokens, num_q_heads, head_dim]."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    out = torch.zeros_like(q)
    starts = cu_q_lens.tolist()
    for seq, context_len in enumerate(context_lens.tolist()):
        start, end = starts[seq], starts[seq + 1]
        if start == end:
            continue
        first_position = context_len - (end - start)
        first = max(0, first_position - window + 1) if window is not None else 0
        first -= first % block_size
        blocks = block_tables[seq, first // block_size : -(-context_len // block_size)].long()
        k = k_cache[blocks].flatten(0, 1)[: context_len - first].permute(1, 2, 0).float()
        v = v_cache[blocks].flatten(0, 1)[: context_len - first].transpose(0, 1).float()
        q_position = torch.arange(first_position, context_len, device=q.device)[:, None]
        k_position = torch.arange(first, context_len, device=q.device)[None, :]
        seen = k_position <= q_position
        if window is not None:
            seen &= k_position > q_position - window
        # One product a KV head for all query heads of its group: [kv, group * chunk, head_dim].
        chunk = q[start:end].view(end - start, num_kv_heads, -1, head_dim).float()
        grouped_q = chunk.permute(1, 2, 0, 3).flatten(1, 2)
        scores = (grouped_q @ k * scale).view(num_kv_heads, -1, end - start, context_len - first)
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        mixed = (weights.flatten(1, 2) @ v).view(num_kv_heads, -1, end - start, head_dim)
        out[start:end] = mixed.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


@triton.jit
def _find_chunk(tile, cu_q_lens_ptr, num_seqs, TOKENS: tl.constexpr) -> tl.tensor:
    """Find which sequence's chunk a tile belongs to; num_seqs means the padding at the end.

    Sequence s owns tiles cu_q_lens[s] // TOKENS + s up to that of s + 1: never fewer than its chunk
    needs, and known without reading lengths on the host.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_q_lens_ptr + middle) // TOKENS + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _paged_prefill_kernel(
    q_ptr,  # in: [num_tokens, num_q_heads, head_dim]
    k_cache_ptr,  # in: [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,  # in: like k_cache
    block_tables_ptr,  # in: [num_seqs, max_blocks] int32
    cu_q_lens_ptr,  # in: [num_seqs + 1] int32
    context_lens_ptr,  # in: [num_seqs] int32
    out_ptr,  # out: [num_tokens, num_q_heads, head_dim]
    num_tokens,
    num_seqs,
    max_blocks,
    window,
    scale_log2,  # scale * log2(e), as exp2 is the cheaper exponential
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    ROWS: tl.constexpr,  # rows a tile: TOKENS tokens times the query heads of a group
    TOKENS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,  # head_dim, up to the next power of two
    TILE: tl.constexpr,  # positions a step; divides block_size, so they lie in one block
    UPCAST: tl.constexpr,  # multiply in fp32: Triton's interpreter multiplies bf16 wrongly
) -> None:
    """One program: up to TOKENS tokens of one chunk, one KV head with its group of query heads."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = _find_chunk(tile, cu_q_lens_ptr, num_seqs, TOKENS)
    chunk_start = tl.load(cu_q_lens_ptr + seq)
    is_padding = seq == num_seqs
    chunk_end = num_tokens
    context_len = 0
    if not is_padding:
        chunk_end = tl.load(cu_q_lens_ptr + seq + 1)
        context_len = tl.load(context_lens_ptr + seq)
    tile_start = chunk_start + (tile - chunk_start // TOKENS - seq) * TOKENS
    if tile_start >= chunk_end:
        return

    group: tl.constexpr = num_q_heads // num_kv_heads
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_BLOCK)
    lanes = tl.arange(0, TILE)
    tokens = tile_start + rows // group
    is_row = (rows < TOKENS * group) & (tokens < chunk_end)
    q_rows = tokens.to(tl.int64) * num_q_heads + kv_head * group + rows % group
    q_offsets = q_rows[:, None] * head_dim + dims[None, :]
    is_q = is_row[:, None] & (dims < head_dim)[None, :]
    dtype = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    q = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0).to(dtype)

    # Padding has context_len 0, so its positions are negative and its range of tiles is empty.
    last_token = tl.minimum(tile_start + TOKENS, chunk_end) - 1
    first_position = context_len - chunk_end + tile_start
    end = tl.where(is_padding, 0, context_len - chunk_end + last_token + 1)
    start = tl.maximum(first_position - window + 1, 0) // TILE * TILE
    positions = context_len - chunk_end + tokens

    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_BLOCK], tl.float32)
    for step in range(start, end, TILE):
        block = tl.load(block_tables_ptr + seq * max_blocks + step // block_size).to(tl.int64)
        kv_rows = (block * block_size + step % block_size + lanes) * num_kv_heads + kv_head
        kv_offsets = kv_rows[:, None] * head_dim + dims[None, :]
        kv_positions = step + lanes
        is_kv = (kv_positions < end)[:, None] & (dims < head_dim)[None, :]
        k = tl.load(k_cache_ptr + kv_offsets, mask=is_kv, other=0.0).to(dtype)
        v = tl.load(v_cache_ptr + kv_offsets, mask=is_kv, other=0.0).to(dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        is_seen = kv_positions[None, :] <= positions[:, None]
        is_seen &= kv_positions[None, :] > positions[:, None] - window
        scores = tl.where(is_seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # With a window a row may see nothing of the first steps: no maximum to measure from yet.
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - origin[:, None])
        decay = tl.exp2(row_max - origin)
        row_sum = row_sum * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
        row_max = new_max

    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
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
) -> torch.Tensor:
    """Attend causally from ragged chunks of prompts to their paged contexts.

    Args:
        q: [num_tokens, num_q_heads, head_dim], contiguous; head_dim 64, 96, 128 or 256.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], dtype of q.
        v_cache: like k_cache.
        block_tables: [num_seqs, max_blocks] int32; entries of unseen blocks are never read through.
        cu_q_lens: [num_seqs + 1] int32, from 0; rows from its last entry on are padding, made zero.
        context_lens: [num_seqs] int32, tokens in the cache with this chunk.
        scale: of the scores, usually head_dim ** -0.5.
        window: positions seen, the token's own included; None = all.
        out: like q. Allocated when None.
    """
    check_leading("q", q, 3)
    num_tokens, num_q_heads, head_dim = q.shape
    check_cache("q", (num_q_heads, head_dim), k_cache, v_cache, q.dtype, q.device)
    block_size, num_kv_heads = k_cache.shape[1:3]
    check_attention(num_q_heads, num_kv_heads, head_dim, block_size, window)
    num_seqs, max_blocks = context_lens.shape[0], block_tables.shape[-1]
    check_tensor("context_lens", context_lens, (num_seqs,), torch.int32, q.device)
    check_tensor("cu_q_lens", cu_q_lens, (num_seqs + 1,), torch.int32, q.device)
    check_tensor("block_tables", block_tables, (num_seqs, max_blocks), torch.int32, q.device)
    if out is None:
        out = torch.empty_like(q)
    check_tensor("out", out, tuple(q.shape), q.dtype, q.device)
    if num_tokens == 0:
        return out
    group = num_q_heads // num_kv_heads
    # fp32 is here to be compared with, not to be fast: small tiles keep its registers in bounds.
    is_wide = head_dim * q.element_size() > 256
    rows = max(16 if q.element_size() == 4 else 64, triton.next_power_of_2(group))
    tokens_a_tile = rows // group
    tile = min(block_size, 32 if is_wide else 64)
    grid = (num_tokens // tokens_a_tile + num_seqs + 1, num_kv_heads)
    _paged_prefill_kernel[grid](
        q, k_cache, v_cache, block_tables, cu_q_lens, context_lens, out, num_tokens, num_seqs,
        max_blocks, window or NO_WINDOW, scale * math.log2(math.e), num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, ROWS=rows,
        TOKENS=tokens_a_tile, DIM_BLOCK=triton.next_power_of_2(head_dim), TILE=tile,
        UPCAST=is_interpreted() and q.dtype == torch.bfloat16, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


#: Sums of products of unit normals in another order; weights are rounded to the dtype before they
#: meet V, and the result once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
