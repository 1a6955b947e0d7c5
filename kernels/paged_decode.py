"""Attention of one new token a sequence over its paged KV cache (decode).

    out[s, h] = softmax(scale * q[s, h] . K[s]) V[s]        over the positions the token may see

K[s], V[s] are the first context_lens[s] positions of sequence s, position p in block
block_tables[s, p // block_size] at offset p % block_size; the new token is the last of them.
With a window only positions > context_len - 1 - window are seen, as in transformers, and blocks
wholly behind the window are never read (their table entries may be -1).
Query head h reads KV head h // (num_q_heads / num_kv_heads).
Numerics: scores, softmax and sums in fp32, rounded once to q.dtype.
"""

import torch


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
