"""Log-probabilities of the chosen token and of the k likeliest, from the raw logits.

    logprob[s, v] = logits[s, v] - logsumexp(logits[s])

Raw: before temperature, penalties and filters, as the API promises. Equal logits are listed by
lower token id first. Numerics: fp32.
"""

import torch


def logprobs_reference(
    logits: torch.Tensor,  # [num_seqs, vocab]
    tokens: torch.Tensor,  # [num_seqs] int64, the chosen tokens
    k: int,  # how many alternatives; 0 gives empty ones
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (chosen: [num_seqs] fp32, top ids: [num_seqs, k] int64, their logprobs: fp32)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    # A stable sort, not topk: topk leaves open which of two equal logits comes first.
    top_ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices[:, :k]
    return chosen, top_ids, logprobs.gather(1, top_ids)
