"""Split QKV, norm and rotate Q and K, and write K and V into the paged cache, in one pass.

    q, k, v = split(qkv + bias)                 heads in this order, head_dim values each
    q, k    = rms_norm(q, q_norm), rms_norm(k, k_norm)         only with QK-norm (Qwen3)
    lo', hi' = lo*cos - hi*sin, hi*cos + lo*sin                lo, hi: halves of a head
    k_cache[slot], v_cache[slot] = k, v                        slot = block * block_size + offset
    ... = e4m3(k * (1 / k_scale[head])), e4m3(v * (1 / v_scale[head]))     into an fp8 cache

RoPE pairs element i with i + head_dim/2 ("rotate half", as GPT-NeoX and transformers do).
Numerics: rotation in fp32 with fp32 tables, rounded once at the end. transformers rounds its tables
to the model's dtype first, so in bf16 the two differ by that rounding and in fp32 not at all.
What an fp8 cache gets has been rounded to the model's dtype first, so it is the quantised copy of
what the other cache would hold; fp8.py says how NaN and too large values come out.

The caches are owned by the engine's KV pool; this writes the named slots and nothing else. They may
have any strides but the last, which is 1, and both the same. Bias, QK-norm and scales are pointers
that may be None: what is None is not compiled, and eight kernels would be this one eight times.
On one H200, 8192 rows: 89 % of 4.3 TB/s, into an fp8 cache 80 %; one row 1.9 us.
"""

import torch

from headrace.kernels.cache_checks import check_caches
from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.fp8 import saturate, saturate_reference
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


def write_reference(
    rows: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
    slots: torch.Tensor,  # [num_tokens] int32, -1 = padding, not written
    cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], written in place
    scale: torch.Tensor | None = None,  # [num_kv_heads] fp32 of an fp8 cache
) -> None:
    """Put each row into its slot of the cache, whatever the cache's strides."""
    slots = slots.long()
    blocks, offsets = slots // cache.shape[1], slots % cache.shape[1]
    written = slots >= 0
    if scale is None:
        cache[blocks[written], offsets[written]] = rows[written].to(cache.dtype)
        return
    inverse = torch.ones_like(scale) / scale
    codes = saturate_reference(rows.float() * inverse[:, None]).view(torch.uint8)
    cache.view(torch.uint8)[blocks[written], offsets[written]] = codes[written]


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
    *,
    bias: torch.Tensor | None = None,  # [(num_q_heads + 2 * num_kv_heads) * head_dim]
    k_scale: torch.Tensor | None = None,  # [num_kv_heads] fp32, with an fp8 cache only
    v_scale: torch.Tensor | None = None,  # like k_scale
) -> torch.Tensor:
    """Return q: [num_tokens, num_q_heads, head_dim], rotated; put K and V into their slots."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv if bias is None else qkv + bias
    heads = heads.view(qkv.shape[0], num_q_heads + 2 * num_kv_heads, head_dim)
    q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm_reference(q, q_norm, eps), rms_norm_reference(k, k_norm, eps)
    cos_rows, sin_rows = cos[positions], sin[positions]
    q, k = rotate_reference(q, cos_rows, sin_rows), rotate_reference(k, cos_rows, sin_rows)
    write_reference(k, slots, k_cache, k_scale)
    write_reference(v, slots, v_cache, v_scale)
    return q


@triton.jit
def _load_halves(ptr, offsets, mask, half_dim: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Load the lower halves at the offsets and the upper beside them, in fp32."""
    low = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(ptr + offsets + half_dim, mask=mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _norm_qk(
    low,  # [HEADS, HALF_BLOCK] fp32
    high,
    heads,  # [HEADS]
    q_norm_ptr,  # in: [head_dim]
    k_norm_ptr,  # in: [head_dim]
    eps,
    num_q_heads,
    num_kv_heads,
    dtype: tl.constexpr,
    head_dim: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Norm the query and key heads; rounded to the dtype twice, as the reference."""
    half = tl.arange(0, HALF_BLOCK)[None, :]
    is_half = half < head_dim // 2
    is_q, is_v = (heads < num_q_heads)[:, None], (heads >= num_q_heads + num_kv_heads)[:, None]
    q_low, q_high = _load_halves(q_norm_ptr, half, is_half, head_dim // 2)
    k_low, k_high = _load_halves(k_norm_ptr, half, is_half, head_dim // 2)
    mean_square = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / head_dim
    inverse_rms = tl.rsqrt(mean_square + eps)[:, None]
    normed_low = (low * inverse_rms).to(dtype).to(tl.float32) * tl.where(is_q, q_low, k_low)
    normed_high = (high * inverse_rms).to(dtype).to(tl.float32) * tl.where(is_q, q_high, k_high)
    low = tl.where(is_v, low, normed_low.to(dtype).to(tl.float32))
    high = tl.where(is_v, high, normed_high.to(dtype).to(tl.float32))
    return low, high


@triton.jit
def _write_heads(
    cache_ptr,  # out: [num_blocks, block_size, num_kv_heads, head_dim]
    scale_ptr,  # in: [num_kv_heads] fp32, or None for a cache of the model's dtype
    base,  # where the token's slot starts
    head_stride,
    low,  # [HEADS, HALF_BLOCK] in the model's dtype
    high,
    heads,  # [HEADS] index of KV heads; others are not written
    num_kv_heads,
    is_written,
    head_dim: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """Write those heads of one token that are KV heads into its slot."""
    half = tl.arange(0, HALF_BLOCK)[None, :]
    is_head = (heads >= 0) & (heads < num_kv_heads) & is_written
    mask = is_head[:, None] & (half < head_dim // 2)
    out = cache_ptr + base + heads[:, None] * head_stride + half
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + heads, mask=is_head, other=1.0)
        # One division a head: a correctly rounded one for each value was half of the kernel.
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
        low = saturate(low.to(tl.float32) * inverse)
        high = saturate(high.to(tl.float32) * inverse)
    tl.store(out, low, mask=mask)
    tl.store(out + head_dim // 2, high, mask=mask)


@triton.jit
def _qkv_rope_write_kernel(
    qkv_ptr,  # in: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
    bias_ptr,  # in: one row of qkv, or None
    q_norm_ptr,  # in: [head_dim], or None
    k_norm_ptr,  # in: [head_dim], or None
    cos_ptr,  # in: [max_positions, head_dim // 2] fp32
    sin_ptr,  # in: like cos
    positions_ptr,  # in: [num_tokens] int32
    slots_ptr,  # in: [num_tokens] int32, -1 = padding
    k_cache_ptr,  # out: [num_blocks, block_size, num_kv_heads, head_dim], strides below
    v_cache_ptr,  # out: like k_cache
    k_scale_ptr,  # in: [num_kv_heads] fp32, or None
    v_scale_ptr,  # in: like k_scale
    q_ptr,  # out: [num_tokens, num_q_heads, head_dim]
    eps,
    num_q_heads,
    num_kv_heads,
    block_stride,
    position_stride,
    head_stride,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    HALF_BLOCK: tl.constexpr,  # head_dim / 2, up to the next power of two
    HEADS: tl.constexpr,  # heads a program; grid (num_tokens, all heads / HEADS)
) -> None:
    token = tl.program_id(0).to(tl.int64)
    # These two begin the chains of loads that depend on loads, so they go first.
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    num_heads = num_q_heads + 2 * num_kv_heads
    half = tl.arange(0, HALF_BLOCK)[None, :]
    is_half = half < head_dim // 2
    is_inside = (heads < num_heads)[:, None] & is_half
    in_row = heads[:, None] * head_dim + half
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    row_ptr = qkv_ptr + token * num_heads * head_dim
    low, high = _load_halves(row_ptr, in_row, is_inside, head_dim // 2)
    angles = position * (head_dim // 2) + half
    cos = tl.load(cos_ptr + angles, mask=is_half, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=is_half, other=0.0)
    if bias_ptr is not None:
        bias_low, bias_high = _load_halves(bias_ptr, in_row, is_inside, head_dim // 2)
        low = (low + bias_low).to(dtype).to(tl.float32)
        high = (high + bias_high).to(dtype).to(tl.float32)
    v_low, v_high = low.to(dtype), high.to(dtype)
    if q_norm_ptr is not None:
        low, high = _norm_qk(
            low, high, heads, q_norm_ptr, k_norm_ptr, eps, num_q_heads, num_kv_heads,
            dtype, head_dim, HALF_BLOCK,
        )  # fmt: skip
    rotated_low = (low * cos - high * sin).to(dtype)
    rotated_high = (high * cos + low * sin).to(dtype)

    is_q = (heads < num_q_heads)[:, None] & is_half
    q_out = q_ptr + token * num_q_heads * head_dim + in_row
    tl.store(q_out, rotated_low, mask=is_q)
    tl.store(q_out + head_dim // 2, rotated_high, mask=is_q)
    # Programs of nothing but query heads, half of them or more, have no cache to write.
    if tl.program_id(1) * HEADS + HEADS > num_q_heads:
        base = (slot // block_size) * block_stride + (slot % block_size) * position_stride
        k_heads = heads - num_q_heads
        _write_heads(
            k_cache_ptr, k_scale_ptr, base, head_stride, rotated_low, rotated_high, k_heads,
            num_kv_heads, slot >= 0, head_dim, HALF_BLOCK,
        )  # fmt: skip
        _write_heads(
            v_cache_ptr, v_scale_ptr, base, head_stride, v_low, v_high, k_heads - num_kv_heads,
            num_kv_heads, slot >= 0, head_dim, HALF_BLOCK,
        )  # fmt: skip


#: Up to so many tokens a program takes few heads, so that one token is spread over many SMs.
_SPREAD_TOKENS = 256


def _tile(num_tokens: int, head_dim: int) -> dict[str, int]:
    """Size a program: one warp where tokens are few, four warps of the same where they are many."""
    half_block = triton.next_power_of_2(head_dim // 2)
    num_warps = 1 if num_tokens <= _SPREAD_TOKENS else 4
    # A warp reads 256 values of each half at once: eight a thread, 16 bytes in 16 bits.
    return {"HEADS": num_warps * max(1, 256 // half_block), "num_warps": num_warps}


def _check_optional(
    qkv: torch.Tensor,
    head_dim: int,
    bias: torch.Tensor | None,
    norms: tuple[torch.Tensor | None, torch.Tensor | None],
) -> None:
    """Raise ValueError unless bias and norms each fit and come as they must."""
    if head_dim % 2:
        raise ValueError(
            f"head_dim must be even, RoPE rotates pairs; found {head_dim}: check the model's config"
        )
    if bias is not None:
        check_tensor("bias", bias, (qkv.shape[1],), qkv.dtype, qkv.device)
    if (norms[0] is None) != (norms[1] is None):
        found = "only k_norm" if norms[0] is None else "only q_norm"
        raise ValueError(
            f"q_norm and k_norm must come together; found {found}: pass both or neither"
        )
    for name, norm in zip(("q_norm", "k_norm"), norms, strict=True):
        if norm is not None:
            check_tensor(name, norm, (head_dim,), qkv.dtype, qkv.device)


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
    *,
    bias: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    launch: dict[str, int] | None = None,
) -> torch.Tensor:
    """Return rotated q: [num_tokens, num_q_heads, head_dim]; put K and V into their slots.

    Args:
        qkv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], contiguous.
        cos: [max_positions, head_dim // 2] fp32.
        sin: like cos.
        positions: [num_tokens] int32, each within the tables, padding rows too.
        slots: [num_tokens] int32, block * block_size + offset; -1 = padding, not written.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], dtype of qkv or e4m3, any strides
            but the last, which is 1; written in place.
        v_cache: like k_cache, strides too.
        num_q_heads: query heads in qkv.
        q_norm: [head_dim], dtype of qkv: QK-norm before RoPE (Qwen3). With k_norm or not at all.
        k_norm: like q_norm.
        eps: of the QK-norm.
        bias: [(num_q_heads + 2 * num_kv_heads) * head_dim], dtype of qkv, added first (Qwen2).
        k_scale: [num_kv_heads] fp32 of an e4m3 cache: value = stored * scale.
        v_scale: like k_scale.
        out: like what is returned, dtype of qkv. Allocated when None.
        launch: HEADS and num_warps, to measure others than the default.
    """
    check_leading("qkv", qkv, 2)
    num_tokens, device = qkv.shape[0], qkv.device
    head_dim = k_cache.shape[-1]
    caches, scales = (k_cache, v_cache), (k_scale, v_scale)
    check_caches((num_q_heads, head_dim), qkv.dtype, device, caches, scales)
    num_kv_heads = k_cache.shape[2]
    num_heads = num_q_heads + 2 * num_kv_heads
    check_tensor("qkv", qkv, (num_tokens, num_heads * head_dim), qkv.dtype, device)
    check_tensor("cos", cos, (cos.shape[0], head_dim // 2), torch.float32, device)
    check_tensor("sin", sin, tuple(cos.shape), torch.float32, device)
    check_tensor("positions", positions, (num_tokens,), torch.int32, device)
    check_tensor("slots", slots, (num_tokens,), torch.int32, device)
    _check_optional(qkv, head_dim, bias, (q_norm, k_norm))
    shape = (num_tokens, num_q_heads, head_dim)
    q = qkv.new_empty(shape) if out is None else out
    check_tensor("out", q, shape, qkv.dtype, device)
    if num_tokens == 0:
        return q
    tile = launch or _tile(num_tokens, head_dim)
    grid = (num_tokens, triton.cdiv(num_heads, tile["HEADS"]))
    _qkv_rope_write_kernel[grid](
        qkv, bias, q_norm, k_norm, cos, sin, positions, slots, k_cache, v_cache, k_scale, v_scale,
        q, eps, num_q_heads, num_kv_heads, *k_cache.stride()[:3], k_cache.shape[1], head_dim,
        triton.next_power_of_2(head_dim // 2), **tile,
    )  # fmt: skip
    return q


#: One rounding after the rotation, two more with QK-norm; V is copied and compared exactly.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
