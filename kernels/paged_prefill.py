"""Causal attention of ragged prompt chunks over the paged KV cache (prefill).

    out[t, h] = softmax(scale * q[t, h] . K[s]) V[s]        over the positions token t may see

Tokens cu_q_lens[s] .. cu_q_lens[s + 1] - 1 are the chunk of sequence s; its last token is at
position context_lens[s] - 1, and K and V of the chunk are in the cache already. A token at position
p sees positions <= p, with a window only those > p - window; blocks wholly behind the window of the
chunk's first token are never read. A chunk may be empty; one token is a decode.
Rows at or beyond cu_q_lens[num_seqs] are padding and come out zero.
Numerics: scores, softmax and sums in fp32, rounded once to q.dtype.
"""

import torch


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
