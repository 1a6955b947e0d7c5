"""Split QKV, norm and rotate Q and K, and write K and V into the paged cache, in one pass.

    q, k, v = split(qkv)                        heads in this order, head_dim values each
    q, k    = rms_norm(q, q_norm), rms_norm(k, k_norm)         only with QK-norm (Qwen3)
    lo', hi' = lo*cos - hi*sin, hi*cos + lo*sin                lo, hi: halves of a head
    k_cache[slot], v_cache[slot] = k, v                        slot = block * block_size + offset

RoPE pairs element i with i + head_dim/2 ("rotate half", as GPT-NeoX and transformers do).
Numerics: rotation in fp32 with fp32 tables, rounded once at the end. transformers rounds its tables
to the model's dtype first, so in bf16 the two differ by that rounding and in fp32 not at all.
The caches are owned by the engine's KV pool; this writes the named slots and nothing else.
"""

import torch

from headrace.kernels.checks import check_cache, check_leading, check_tensor
from headrace.kernels.rms_norm import rms_norm_reference
from headrace.kernels.triton_seam import tl, triton


def rotate_reference(
    x: torch.Tensor,  # [num_tokens, num_heads, head_dim]
    cos: torch.Tensor,  # [num_tokens, head_dim // 2] fp32, already gathered by position
    sin: torch.Tensor,  # [num_tokens, head_dim // 2] fp32
) -> torch.Tensor:
    """Rotate each head's pairs (i, i + head_dim/2) by the token's angles."""
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def qkv_rope_write_reference(
    qkv: torch.Tensor,  # [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
    cos: torch.Tensor,  # [max_positions, head_dim // 2] fp32
    sin: torch.Tensor,  # [max_positions, head_dim // 2] fp32
    positions: torch.Tensor,  # [num_tokens] int32
    slots: torch.Tensor,  # [num_tokens] int32, -1 = padding, not written
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], written in place
    v_cache: torch.Tensor,  # like k_cache
    num_q_heads: int,
    q_norm: torch.Tensor | None = None,  # [head_dim], with k_norm or not at all
    k_norm: torch.Tensor | None = None,  # [head_dim]
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return q: [num_tokens, num_q_heads, head_dim], rotated; put K and V into their slots."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], num_q_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    cos_rows, sin_rows = cos[positions], sin[positions]
    q, k = rotate_reference(q, cos_rows, sin_rows), rotate_reference(k, cos_rows, sin_rows)
    written = slots >= 0
    rows = slots[written].long()
    k_cache.view(-1, num_kv_heads, head_dim)[rows] = k[written].to(k_cache.dtype)
    v_cache.view(-1, num_kv_heads, head_dim)[rows] = v[written].to(v_cache.dtype)
    return q


@triton.jit
def _load_heads(
    qkv_ptr,  # in: [num_tokens, num_heads * head_dim]
    token,
    heads,  # [HEADS] index over query, key and value heads
    num_heads,
    head_dim: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # head_dim / 2, up to the next power of two
) -> tuple[tl.tensor, tl.tensor]:
    """Load both halves of some heads of one token in fp32: 2 x [HEADS, HALF_BLOCK]."""
    half = tl.arange(0, HALF_BLOCK)
    is_inside = (heads < num_heads)[:, None] & (half < head_dim // 2)[None, :]
    offsets = token * num_heads * head_dim + heads[:, None] * head_dim + half[None, :]
    low = tl.load(qkv_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + offsets + head_dim // 2, mask=is_inside, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _rotate_and_write(
    low,  # [HEADS, HALF_BLOCK] fp32
    high,
    heads,  # [HEADS]
    cos_ptr,  # in: [max_positions, head_dim // 2]
    sin_ptr,  # in: like cos
    positions_ptr,  # in: [num_tokens] int32
    slots_ptr,  # in: [num_tokens] int32, -1 = padding
    k_cache_ptr,  # out: [num_slots, num_kv_heads, head_dim]
    v_cache_ptr,  # out: like k_cache
    q_ptr,  # out: [num_tokens, num_q_heads, head_dim]
    token,
    num_q_heads,
    num_kv_heads,
    head_dim: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """Rotate the query and key heads and put each head where it belongs."""
    half = tl.arange(0, HALF_BLOCK)
    is_half = half < head_dim // 2
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * (head_dim // 2) + half, mask=is_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * (head_dim // 2) + half, mask=is_half, other=0.0)[None, :]
    dtype = q_ptr.dtype.element_ty
    rotated_low = (low * cos - high * sin).to(dtype)
    rotated_high = (high * cos + low * sin).to(dtype)

    is_q = (heads < num_q_heads)[:, None] & is_half[None, :]
    q_out = q_ptr + (token * num_q_heads + heads)[:, None] * head_dim + half[None, :]
    tl.store(q_out, rotated_low, mask=is_q)
    tl.store(q_out + head_dim // 2, rotated_high, mask=is_q)

    slot = tl.load(slots_ptr + token).to(tl.int64)
    k_head = heads - num_q_heads
    is_k = ((k_head >= 0) & (k_head < num_kv_heads) & (slot >= 0))[:, None] & is_half[None, :]
    k_out = k_cache_ptr + (slot * num_kv_heads + k_head)[:, None] * head_dim + half[None, :]
    tl.store(k_out, rotated_low, mask=is_k)
    tl.store(k_out + head_dim // 2, rotated_high, mask=is_k)

    v_head = k_head - num_kv_heads
    is_v = ((v_head >= 0) & (v_head < num_kv_heads) & (slot >= 0))[:, None] & is_half[None, :]
    v_out = v_cache_ptr + (slot * num_kv_heads + v_head)[:, None] * head_dim + half[None, :]
    tl.store(v_out, low.to(dtype), mask=is_v)
    tl.store(v_out + head_dim // 2, high.to(dtype), mask=is_v)


@triton.jit
def _qkv_rope_write_kernel(
    qkv_ptr,  # in: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
    cos_ptr,  # in: [max_positions, head_dim // 2]
    sin_ptr,  # in: like cos
    positions_ptr,  # in: [num_tokens] int32
    slots_ptr,  # in: [num_tokens] int32, -1 = padding
    k_cache_ptr,  # out: [num_slots, num_kv_heads, head_dim]
    v_cache_ptr,  # out: like k_cache
    q_ptr,  # out: [num_tokens, num_q_heads, head_dim]
    num_q_heads,
    num_kv_heads,
    head_dim: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # head_dim / 2, up to the next power of two
    HEADS: tl.constexpr,  # heads a program; grid (num_tokens, all heads / HEADS)
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    num_heads = num_q_heads + 2 * num_kv_heads
    low, high = _load_heads(qkv_ptr, token, heads, num_heads, head_dim, HALF_BLOCK)
    _rotate_and_write(
        low, high, heads, cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr,
        q_ptr, token, num_q_heads, num_kv_heads, head_dim, HALF_BLOCK,
    )  # fmt: skip


@triton.jit
def _qkv_norm_rope_write_kernel(
    qkv_ptr,  # in: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
    cos_ptr,  # in: [max_positions, head_dim // 2]
    sin_ptr,  # in: like cos
    positions_ptr,  # in: [num_tokens] int32
    slots_ptr,  # in: [num_tokens] int32, -1 = padding
    k_cache_ptr,  # out: [num_slots, num_kv_heads, head_dim]
    v_cache_ptr,  # out: like k_cache
    q_ptr,  # out: [num_tokens, num_q_heads, head_dim]
    q_norm_ptr,  # in: [head_dim]
    k_norm_ptr,  # in: [head_dim]
    eps,
    num_q_heads,
    num_kv_heads,
    head_dim: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # head_dim / 2, up to the next power of two
    HEADS: tl.constexpr,  # heads a program; grid (num_tokens, all heads / HEADS)
) -> None:
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    num_heads = num_q_heads + 2 * num_kv_heads
    low, high = _load_heads(qkv_ptr, token, heads, num_heads, head_dim, HALF_BLOCK)

    half = tl.arange(0, HALF_BLOCK)
    is_half = half < head_dim // 2
    is_q, is_v = (heads < num_q_heads)[:, None], (heads >= num_q_heads + num_kv_heads)[:, None]
    q_low = tl.load(q_norm_ptr + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
    k_low = tl.load(k_norm_ptr + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
    high_half = half + head_dim // 2
    q_high = tl.load(q_norm_ptr + high_half, mask=is_half, other=0.0).to(tl.float32)[None, :]
    k_high = tl.load(k_norm_ptr + high_half, mask=is_half, other=0.0).to(tl.float32)[None, :]
    mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / head_dim
    inverse_rms = tl.rsqrt(mean_square + eps)[:, None]
    # Rounded to the dtype twice, as the reference: the quotient, then its product with the weight.
    dtype = q_ptr.dtype.element_ty
    normed_low = (low * inverse_rms).to(dtype).to(tl.float32) * tl.where(is_q, q_low, k_low)
    normed_high = (high * inverse_rms).to(dtype).to(tl.float32) * tl.where(is_q, q_high, k_high)
    low = tl.where(is_v, low, normed_low.to(dtype).to(tl.float32))
    high = tl.where(is_v, high, normed_high.to(dtype).to(tl.float32))

    _rotate_and_write(
        low, high, heads, cos_ptr, sin_ptr, positions_ptr, slots_ptr, k_cache_ptr, v_cache_ptr,
        q_ptr, token, num_q_heads, num_kv_heads, head_dim, HALF_BLOCK,
    )  # fmt: skip


#: Heads a program: enough to fill four warps at head_dim 128, few enough to spread one token.
_HEADS_A_PROGRAM = 16


def qkv_rope_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_q_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return rotated q: [num_tokens, num_q_heads, head_dim]; put K and V into their slots.

    Args:
        qkv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], contiguous.
        cos: [max_positions, head_dim // 2] fp32.
        sin: like cos.
        positions: [num_tokens] int32, each within the tables.
        slots: [num_tokens] int32, block * block_size + offset; -1 = padding, not written.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], dtype of qkv, written in place.
        v_cache: like k_cache.
        num_q_heads: query heads in qkv.
        q_norm: [head_dim], dtype of qkv: QK-norm before RoPE (Qwen3). With k_norm or not at all.
        k_norm: like q_norm.
        eps: of the QK-norm.
    """
    check_leading("qkv", qkv, 2)
    num_tokens, device = qkv.shape[0], qkv.device
    head_dim = k_cache.shape[-1]
    check_cache("qkv", (num_q_heads, head_dim), k_cache, v_cache, qkv.dtype, device)
    num_kv_heads = k_cache.shape[2]
    num_heads = num_q_heads + 2 * num_kv_heads
    check_tensor("qkv", qkv, (num_tokens, num_heads * head_dim), qkv.dtype, device)
    if head_dim % 2:
        raise ValueError(
            f"head_dim must be even, RoPE rotates pairs; found {head_dim}: check the model's config"
        )
    check_tensor("cos", cos, (cos.shape[0], head_dim // 2), torch.float32, device)
    check_tensor("sin", sin, tuple(cos.shape), torch.float32, device)
    check_tensor("positions", positions, (num_tokens,), torch.int32, device)
    check_tensor("slots", slots, (num_tokens,), torch.int32, device)
    if (q_norm is None) != (k_norm is None):
        found = "only k_norm" if q_norm is None else "only q_norm"
        raise ValueError(
            f"q_norm and k_norm must come together; found {found}: pass both or neither"
        )
    q = qkv.new_empty((num_tokens, num_q_heads, head_dim))
    if num_tokens == 0:
        return q
    grid = (num_tokens, triton.cdiv(num_heads, _HEADS_A_PROGRAM))
    tile = {
        "head_dim": head_dim,
        "HALF_BLOCK": triton.next_power_of_2(head_dim // 2),
        "HEADS": _HEADS_A_PROGRAM,
        "num_warps": 4,
    }
    written = (qkv, cos, sin, positions, slots, k_cache, v_cache, q)
    if q_norm is None or k_norm is None:
        _qkv_rope_write_kernel[grid](*written, num_q_heads, num_kv_heads, **tile)
        return q
    check_tensor("q_norm", q_norm, (head_dim,), qkv.dtype, device)
    check_tensor("k_norm", k_norm, (head_dim,), qkv.dtype, device)
    _qkv_norm_rope_write_kernel[grid](
        *written, q_norm, k_norm, eps, num_q_heads, num_kv_heads, **tile
    )
    return q


#: One rounding after the rotation, two more with QK-norm; V is copied and compared exactly.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
