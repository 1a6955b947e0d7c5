"""Attention of one row inside a kernel of several phases: rotate, write, attend, merge.

    out[h] = softmax(scale * q[h] . K) V      over the positions that the token sees, its own too

A program takes one KV head and one of `num_splits` shares of its positions, whole tiles of TILE.
The newest position's key and value are made here, of the row's qkv (QK-norm and RoPE as
qkv_rope_write.py), so nobody reads them from the cache in this launch: the program with the last
tile writes them there and starts its sums with them from registers. Older positions do not depend
on anything in this launch, so `load_tile` sends for a program's first tile before the row is known.
A head in many shares is merged by the last of its programs to arrive, in the order of positions.

Numerics: scores, softmax and sums in fp32, rounded once; q and k are rounded as the launches of
their own do. The weights of V are rounded to the dtype for the product.

Invariants:
1. `arrivals` is zero before and after.
2. Blocks wholly behind the window are never read, nor is a position that no token was written to.

Called by decode_layers.py.
"""

from headrace.kernels.triton_seam import tl, triton


@triton.jit
def load_tile(
    k_ptr,  # in: the KV head's part of the layer's cache
    v_ptr,
    block,
    tile,
    first,  # positions before it are not seen
    end,  # positions from it on are not loaded
    block_stride,
    position_stride,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Load one tile: lower and upper halves of its keys, and its values."""
    lanes, dims = tl.arange(0, TILE), tl.arange(0, DIM_BLOCK)
    half = tl.arange(0, DIM_BLOCK // 2)
    positions = tile * TILE + lanes
    is_seen = ((positions >= first) & (positions < end))[:, None]
    start = block.to(tl.int64) * block_stride + tile * TILE % block_size * position_stride
    is_half, is_dim = is_seen, is_seen
    if head_dim < DIM_BLOCK:
        is_half = is_seen & (half < head_dim // 2)[None, :]
        is_dim = is_seen & (dims < head_dim)[None, :]
    k_at = k_ptr + start + lanes[:, None] * position_stride + half[None, :]
    low = tl.load(k_at, mask=is_half, other=0.0)
    high = tl.load(k_at + head_dim // 2, mask=is_half, other=0.0)
    v_at = v_ptr + start + lanes[:, None] * position_stride + dims[None, :]
    return low, high, tl.load(v_at, mask=is_dim, other=0.0)


@triton.jit
def _load_rotated(
    head_ptr,  # in: the heads' rows of qkv, [.., 1]
    is_head,  # [.., 1]
    norm_low,  # [1, half] fp32, or None
    norm_high,
    cos,  # [1, half] fp32
    sin,
    eps,
    dtype: tl.constexpr,
    head_dim: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Load heads, norm and rotate them: lower and upper halves in dtype."""
    half = tl.arange(0, DIM_BLOCK // 2)[None, :]
    mask = is_head & (half < head_dim // 2)
    at = head_ptr + half
    low = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    high = tl.load(at + head_dim // 2, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    if norm_low is not None:
        mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / head_dim
        inverse_rms = tl.rsqrt(mean_square + eps)[:, None]
        low = ((low * inverse_rms).to(dtype).to(tl.float32) * norm_low).to(dtype).to(tl.float32)
        high = ((high * inverse_rms).to(dtype).to(tl.float32) * norm_high).to(dtype).to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def load_halves(ptr, head_dim: tl.constexpr, DIM_BLOCK: tl.constexpr) -> tuple:
    """Load a row of head_dim in fp32, as two halves of [1, half]."""
    half = tl.arange(0, DIM_BLOCK // 2)[None, :]
    is_half = half < head_dim // 2
    low = tl.load(ptr + half, mask=is_half, other=0.0).to(tl.float32)
    return low, tl.load(ptr + half + head_dim // 2, mask=is_half, other=0.0).to(tl.float32)


@triton.jit
def _merge(
    partial_ptr,  # in: [num_splits, group, head_dim] fp32, the KV head's
    lse_ptr,  # in: [num_splits, group] fp32
    num_live,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    MERGE_GROUP: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return [MERGE_GROUP, DIM_BLOCK] fp32: the live splits, weighted by their sums, in order."""
    in_group = tl.arange(0, MERGE_GROUP)[:, None]
    splits = tl.arange(0, SPLITS_BLOCK)[None, :]
    dims = tl.arange(0, DIM_BLOCK)[None, None, :]
    rows = splits * group + in_group
    is_live = (splits < num_live) & (in_group < group)
    lse = tl.load(lse_ptr + rows, mask=is_live, other=float("-inf"), cache_modifier=".cg")
    partial = tl.load(
        partial_ptr + rows[:, :, None] * head_dim + dims,
        mask=is_live[:, :, None] & (dims < head_dim), other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    # Rows beyond the group have no split: their maximum is made a number.
    best = tl.maximum(tl.max(lse, axis=1), -1e30)[:, None]
    weights = tl.exp2(lse - best)
    total = tl.maximum(tl.sum(weights, axis=1), 1e-30)[:, None]
    return tl.sum(partial * weights[:, :, None], axis=1) / total


@triton.jit
def attend_row(
    k_low,  # of `load_tile`, the program's first tile
    k_high,
    v,
    upcoming,  # block of its second tile
    k_ptr,  # in, out: the KV head's part of the layer's cache
    v_ptr,
    table_ptr,  # in: the sequence's row of block ids
    qkv_ptr,  # in: [(num_q_heads + 2 * num_kv_heads) * head_dim]
    partial_ptr,  # scratch: [num_kv_heads, num_splits, group, head_dim] fp32
    lse_ptr,  # scratch: [num_kv_heads, num_splits, group] fp32
    arrivals_ptr,  # in, out: [num_kv_heads] int32, zero before and after
    out_ptr,  # out: [num_q_heads, head_dim]
    q_norms,  # ([1, half], [1, half]) fp32, or (None, None)
    k_norms,
    cos,  # [1, half] fp32
    sin,
    kv_head,
    split,
    num_live,  # splits that have a tile; this is one of them
    first,
    begin,  # tiles
    end,
    context_len,
    kv_slot,
    block_stride,
    position_stride,
    eps,
    scale_log2,
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
    MERGE_GROUP: tl.constexpr,
    MULTIPLIES_IN: tl.constexpr,
) -> None:
    """Attend with one KV head's query heads over one share of the positions."""
    group: tl.constexpr = num_q_heads // num_kv_heads
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    in_group, dims = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    lanes, half = tl.arange(0, TILE), tl.arange(0, DIM_BLOCK // 2)[None, :]
    heads = kv_head * group + in_group
    is_head = (in_group < group)[:, None]
    newest = context_len - 1
    new_head = num_q_heads + kv_head + tl.zeros([1, 1], tl.int32)
    new_v = tl.load(
        qkv_ptr + (num_q_heads + num_kv_heads + kv_head) * head_dim + dims,
        mask=dims < head_dim, other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    new_low, new_high = _load_rotated(
        qkv_ptr + new_head * head_dim, new_head >= 0, k_norms[0], k_norms[1], cos, sin, eps,
        dtype, head_dim, DIM_BLOCK,
    )  # fmt: skip
    q_low, q_high = _load_rotated(
        qkv_ptr + heads[:, None] * head_dim, is_head, q_norms[0], q_norms[1], cos, sin, eps,
        dtype, head_dim, DIM_BLOCK,
    )  # fmt: skip
    owns_newest = split == num_live - 1
    in_cache = kv_slot // block_size * block_stride + kv_slot % block_size * position_stride
    is_written = owns_newest & (kv_slot >= 0)
    is_half = (half < head_dim // 2) & is_written
    tl.store(k_ptr + in_cache + half, new_low, mask=is_half)
    tl.store(k_ptr + in_cache + half + head_dim // 2, new_high, mask=is_half)
    tl.store(v_ptr + in_cache + dims, new_v, mask=(dims < head_dim) & is_written)

    products = q_low.to(tl.float32) * new_low.to(tl.float32)
    products += q_high.to(tl.float32) * new_high.to(tl.float32)
    new_score = tl.sum(products, axis=1) * scale_log2
    row_max = tl.where(owns_newest, new_score, float("-inf"))
    new_sum = tl.where(owns_newest, 1.0, 0.0) + tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.where(owns_newest, new_v.to(tl.float32), 0.0)[None, :]
    acc = acc + tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    # Summed over a tile's lanes at the end only: a sum across warps costs two barriers.
    sums = tl.zeros([GROUP_BLOCK, TILE], tl.float32)
    q_low, q_high = q_low.to(MULTIPLIES_IN), q_high.to(MULTIPLIES_IN)
    stop = tl.minimum(end * TILE, newest)
    for tile in range(begin, end):
        next_low, next_high, next_v = load_tile(
            k_ptr, v_ptr, upcoming, tile + 1, first, stop, block_stride, position_stride,
            head_dim, block_size, DIM_BLOCK, TILE,
        )  # fmt: skip
        upcoming = tl.load(
            table_ptr + (tile + 2) * TILE // block_size, mask=tile + 2 < end, other=0
        )
        positions = tile * TILE + lanes
        is_seen = (positions >= first) & (positions < stop)
        scores = tl.dot(q_low, tl.trans(k_low.to(MULTIPLIES_IN)), input_precision="ieee")
        scores = tl.dot(q_high, tl.trans(k_high.to(MULTIPLIES_IN)), scores, input_precision="ieee")
        scores = tl.where(is_seen[None, :], scores * scale_log2, float("-inf"))
        # A tile without an older position holds the newest, with which row_max begins: finite.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        sums = sums * decay[:, None] + weights
        new_sum *= decay
        row_max = new_max
        weights = weights.to(dtype).to(MULTIPLIES_IN)
        acc = acc * decay[:, None]
        acc = tl.dot(weights, v.to(MULTIPLIES_IN), acc, input_precision="ieee")
        k_low, k_high, v = next_low, next_high, next_v
    row_sum = tl.sum(sums, axis=1) + new_sum
    mean = acc / row_sum[:, None]
    is_out = is_head & (dims < head_dim)[None, :]
    if num_live == 1:
        tl.store(out_ptr + heads[:, None] * head_dim + dims[None, :], mean.to(dtype), mask=is_out)
    else:
        first_row = kv_head * NUM_SPLITS * group
        rows = first_row + split * group + in_group
        tl.store(partial_ptr + rows[:, None] * head_dim + dims[None, :], mean, mask=is_out)
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=in_group < group)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals_ptr + kv_head, 1, sem="acq_rel", scope="gpu")
        if arrived == num_live - 1:
            tl.store(arrivals_ptr + kv_head, 0)
            merged = _merge(
                partial_ptr + first_row * head_dim, lse_ptr + first_row, num_live,
                group, head_dim, DIM_BLOCK, MERGE_GROUP, SPLITS_BLOCK,
            )  # fmt: skip
            in_merge = tl.arange(0, MERGE_GROUP)[:, None]
            at = out_ptr + (kv_head * group + in_merge) * head_dim + dims[None, :]
            tl.store(at, merged.to(dtype), mask=(in_merge < group) & (dims < head_dim)[None, :])
