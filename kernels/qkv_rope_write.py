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

from headrace.kernels.rms_norm import rms_norm_reference


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
