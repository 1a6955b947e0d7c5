"""Attention of one new token a sequence over its paged KV cache (decode).

    out[s, h] = softmax(scale * q[s, h] . K[s]) V[s]        over the positions the token may see

K[s], V[s] are the first context_lens[s] positions of sequence s, position p in block
block_tables[s, p // block_size] at offset p % block_size; the new token is the last of them.
With a window only positions > context_len - 1 - window are seen, as in transformers, and blocks
wholly behind the window are never read (their table entries may be -1).
Query head h reads KV head h // (num_q_heads / num_kv_heads).
Numerics: scores, softmax and sums in fp32, rounded once to q.dtype.
"""

import math

import torch

from headrace.kernels.checks import check_attention, check_cache, check_leading, check_tensor
from headrace.kernels.triton_seam import is_interpreted, tl, triton

#: A window that hides nothing: beyond any context, and far from where int32 positions overflow.
NO_WINDOW = 1 << 30


def paged_decode_reference(
    q: torch.Tensor,  # [num_seqs, num_q_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # like k_cache
    block_tables: torch.Tensor,  # [num_seqs, max_blocks] int32, -1 = unused
    context_lens: torch.Tensor,  # [num_seqs] int32 with the new token, 0 = padding row
    scale: float,
    window: int | None = None,  # positions seen, the token's own included; None = all
) -> torch.Tensor:
    """Return [num_seqs, num_q_heads, head_dim]; padding rows are zero."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    out = torch.zeros_like(q)
    for seq, context_len in enumerate(context_lens.tolist()):
        if context_len == 0:
            continue
        first = max(0, context_len - window) if window is not None else 0
        first_block = first // block_size
        blocks = block_tables[seq, first_block : -(-context_len // block_size)].long()
        seen = slice(first - first_block * block_size, context_len - first_block * block_size)
        k = k_cache[blocks].flatten(0, 1)[seen].transpose(0, 1).float()
        v = v_cache[blocks].flatten(0, 1)[seen].transpose(0, 1).float()
        grouped_q = q[seq].view(num_kv_heads, -1, head_dim).float()
        weights = torch.softmax(grouped_q @ k.transpose(1, 2) * scale, dim=-1)
        out[seq] = (weights @ v).reshape(-1, head_dim).to(q.dtype)
    return out


@triton.jit
def _split(
    context_len, window, num_splits, min_split_tokens, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Share a sequence's seen tiles out: (first position, positions a split, live splits).

    A pure function of the sequence's own length, so the work is laid out on the device and the
    host never reads a length. At least one split is live, and each live one has a tile unless the
    sequence is padding.
    """
    first = tl.maximum(context_len - window, 0) // TILE * TILE
    num_tiles = tl.cdiv(context_len - first, TILE)
    most_splits = tl.cdiv(context_len - first, min_split_tokens)
    splits = tl.maximum(tl.minimum(num_splits, most_splits), 1)
    split_tiles = tl.maximum(tl.cdiv(num_tiles, splits), 1)
    live_splits = tl.maximum(tl.cdiv(num_tiles, split_tiles), 1)
    return first, split_tiles * TILE, live_splits


@triton.jit
def _paged_decode_kernel(
    q_ptr,  # in: [num_seqs, num_q_heads, head_dim]
    k_cache_ptr,  # in: [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache_ptr,  # in: like k_cache
    block_tables_ptr,  # in: [num_seqs, max_blocks] int32
    context_lens_ptr,  # in: [num_seqs] int32
    out_ptr,  # out: [num_seqs, num_q_heads, head_dim], rows with one live split
    partial_ptr,  # out: [num_seqs, num_q_heads, num_splits, head_dim] fp32, the other rows
    partial_lse_ptr,  # out: [num_seqs, num_q_heads, num_splits] fp32, log2 of the sum of weights
    max_blocks,
    num_splits,
    min_split_tokens,
    window,
    scale_log2,  # scale * log2(e), as exp2 is the cheaper exponential
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # query heads a KV head, up to the next power of two >= 16
    DIM_BLOCK: tl.constexpr,  # head_dim, up to the next power of two
    TILE: tl.constexpr,  # positions a tile; divides block_size, so a tile lies in one block
    UPCAST: tl.constexpr,  # multiply in fp32: Triton's interpreter multiplies bf16 wrongly
) -> None:
    """One program: one sequence, one KV head with its group of query heads, one split."""
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context_len = tl.load(context_lens_ptr + seq)
    first, split_len, live_splits = _split(context_len, window, num_splits, min_split_tokens, TILE)
    if split >= live_splits:
        return
    start = first + split * split_len
    end = tl.minimum(start + split_len, context_len)

    group: tl.constexpr = num_q_heads // num_kv_heads
    in_group = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    lanes = tl.arange(0, TILE)
    is_q = (in_group < group)[:, None] & (dims < head_dim)[None, :]
    q_rows = seq * num_q_heads + kv_head * group + in_group
    q = tl.load(q_ptr + q_rows[:, None] * head_dim + dims[None, :], mask=is_q, other=0.0)
    dtype = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    q = q.to(dtype)

    row_max = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    for tile in range(start, end, TILE):
        block = tl.load(block_tables_ptr + seq * max_blocks + tile // block_size).to(tl.int64)
        kv_rows = (block * block_size + tile % block_size + lanes) * num_kv_heads + kv_head
        kv_offsets = kv_rows[:, None] * head_dim + dims[None, :]
        is_seen = (tile + lanes < end) & (tile + lanes >= context_len - window)
        is_kv = is_seen[:, None] & (dims < head_dim)[None, :]
        k = tl.load(k_cache_ptr + kv_offsets, mask=is_kv, other=0.0).to(dtype)
        v = tl.load(v_cache_ptr + kv_offsets, mask=is_kv, other=0.0).to(dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        # Every tile of a live split holds a seen position, so the maximum is finite.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None] + tl.dot(weights.to(dtype), v, input_precision="ieee")
        row_max = new_max

    # A padding row has one live split without tiles: zero, not 0 / 0.
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if live_splits == 1:
        out_offsets = q_rows[:, None] * head_dim + dims[None, :]
        tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=is_q)
    else:
        partial_rows = q_rows * num_splits + split
        tl.store(partial_ptr + partial_rows[:, None] * head_dim + dims[None, :], out, mask=is_q)
        lse = row_max + tl.log2(row_sum)
        tl.store(partial_lse_ptr + partial_rows, lse, mask=in_group < group)


@triton.jit
def _merge_splits_kernel(
    partial_ptr,  # in: [num_seqs, num_q_heads, num_splits, head_dim] fp32
    partial_lse_ptr,  # in: [num_seqs, num_q_heads, num_splits] fp32
    context_lens_ptr,  # in: [num_seqs] int32
    out_ptr,  # out: [num_seqs, num_q_heads, head_dim], rows with several live splits
    num_splits,
    min_split_tokens,
    window,
    num_q_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,  # num_splits, up to the next power of two
    TILE: tl.constexpr,  # that of the decode kernel: both must agree on the splits
) -> None:
    """One program: the splits of one query head of one sequence, weighted by their sums."""
    seq = tl.program_id(0).to(tl.int64)
    context_len = tl.load(context_lens_ptr + seq)
    _, _, live_splits = _split(context_len, window, num_splits, min_split_tokens, TILE)
    if live_splits == 1:
        return
    row = seq * num_q_heads + tl.program_id(1)
    splits, dims = tl.arange(0, SPLITS_BLOCK), tl.arange(0, DIM_BLOCK)
    is_live = splits < live_splits
    lse = tl.load(partial_lse_ptr + row * num_splits + splits, mask=is_live, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, axis=0))
    offsets = (row * num_splits + splits)[:, None] * head_dim + dims[None, :]
    is_inside = is_live[:, None] & (dims < head_dim)[None, :]
    partial = tl.load(partial_ptr + offsets, mask=is_inside, other=0.0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * head_dim + dims, out, mask=dims < head_dim)


#: Positions below which splitting a sequence costs more in the merge than it gains.
_MIN_SPLIT_TOKENS = 256
#: Splits at most: what the merge holds in one tile.
_MAX_SPLITS = 64


def choose_num_splits(num_programs: int, max_context: int, device: torch.device) -> int:
    """Return into how many splits the longest sequence is cut at most, without reading lengths.

    Enough that two programs a multiprocessor run even when every sequence is as long as its table;
    shorter sequences use fewer by themselves.
    """
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    splits = min(-(-wanted // num_programs), -(-max_context // _MIN_SPLIT_TOKENS), _MAX_SPLITS)
    return max(splits, 1)


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
    num_splits: int | None = None,
    min_split_tokens: int = _MIN_SPLIT_TOKENS,
) -> torch.Tensor:
    """Attend from one new token a sequence to its paged context.

    Args:
        q: [num_seqs, num_q_heads, head_dim], contiguous; head_dim 64, 96, 128 or 256.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], dtype of q.
        v_cache: like k_cache.
        block_tables: [num_seqs, max_blocks] int32; entries of unseen blocks are never read through.
        context_lens: [num_seqs] int32 with the new token, 0 = padding row, which comes out zero.
        scale: of the scores, usually head_dim ** -0.5.
        window: positions seen, the token's own included; None = all.
        out: like q. Allocated when None.
        num_splits: splits of the longest sequence; None = by the device's size.
        min_split_tokens: positions a split has at least.
    """
    check_leading("q", q, 3)
    num_seqs, num_q_heads, head_dim = q.shape
    check_cache("q", (num_q_heads, head_dim), k_cache, v_cache, q.dtype, q.device)
    block_size, num_kv_heads = k_cache.shape[1:3]
    check_attention(num_q_heads, num_kv_heads, head_dim, block_size, window)
    max_blocks = block_tables.shape[-1]
    check_tensor("block_tables", block_tables, (num_seqs, max_blocks), torch.int32, q.device)
    check_tensor("context_lens", context_lens, (num_seqs,), torch.int32, q.device)
    if out is None:
        out = torch.empty_like(q)
    check_tensor("out", out, tuple(q.shape), q.dtype, q.device)
    if num_splits is None:
        max_context = min(max_blocks * block_size, window or NO_WINDOW)
        num_splits = choose_num_splits(max(num_seqs * num_kv_heads, 1), max_context, q.device)
    if not 1 <= num_splits <= _MAX_SPLITS or min_split_tokens < 1:
        raise ValueError(
            f"num_splits must be from 1 to {_MAX_SPLITS} and min_split_tokens at least 1; found "
            f"{num_splits} and {min_split_tokens}: leave both out to have them chosen"
        )
    if num_seqs == 0:
        return out
    partial_shape = (num_seqs, num_q_heads, num_splits, head_dim) if num_splits > 1 else (1,) * 4
    partial = torch.empty(partial_shape, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial_shape[:3], dtype=torch.float32, device=q.device)
    # 64 KiB a K tile would leave no room for a second one in flight.
    tile = min(block_size, 64 if head_dim * q.element_size() <= 512 else 32)
    splitting = (num_splits, min_split_tokens, window or NO_WINDOW)
    dim_block = triton.next_power_of_2(head_dim)
    _paged_decode_kernel[(num_seqs, num_kv_heads, num_splits)](
        q, k_cache, v_cache, block_tables, context_lens, out, partial, partial_lse, max_blocks,
        *splitting, scale * math.log2(math.e), num_q_heads=num_q_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, block_size=block_size,
        GROUP_BLOCK=max(16, triton.next_power_of_2(num_q_heads // num_kv_heads)),
        DIM_BLOCK=dim_block, TILE=tile,
        UPCAST=is_interpreted() and q.dtype == torch.bfloat16, num_warps=4, num_stages=2,
    )  # fmt: skip
    if num_splits > 1:
        _merge_splits_kernel[(num_seqs, num_q_heads)](
            partial, partial_lse, context_lens, out, *splitting, num_q_heads=num_q_heads,
            head_dim=head_dim, DIM_BLOCK=dim_block,
            SPLITS_BLOCK=triton.next_power_of_2(num_splits), TILE=tile, num_warps=4,
        )  # fmt: skip
    return out


#: Sums of products of unit normals in another order; weights are rounded to the dtype before they
#: meet V, and the result once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
