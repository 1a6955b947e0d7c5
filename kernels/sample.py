"""Draw one token a row: greedy, or Gumbel-max over what top-k, top-p and min-p keep.

    x     = logits / temperature
    top-k keeps x >= (the k-th largest x)
    top-p keeps x for which the probability of everything strictly above it is < top_p,
          probabilities being those of what top-k kept
    min-p keeps x whose probability is >= min_p * (the largest probability)
    token = argmax over kept of x - log(-log(noise(seed, position, token)))

Each filter is "x is at least some value", so the three together are one threshold a row, and no
sort is needed to apply them. Order as in vLLM: temperature, top-k, top-p, min-p.

Invariants:
1. A row's token depends on that row alone, never on the batch around it.
2. Values equal to a threshold are all kept; equal scores go to the lower token id. So the result
   is deterministic, and top_k = 1 is greedy but for exactly equal logits.
3. temperature 0 is argmax, whatever the filters and the seed say.
4. The largest value is always kept: top_p = 0 and min_p = 1 leave a token to draw.

Numerics: fp32. `noise`, `penalise` and `logprobs` have their own files and are named here too.
"""

import torch

from headrace.kernels.logprobs import logprobs_reference
from headrace.kernels.noise import noise_at_reference, noise_reference
from headrace.kernels.penalise import penalise_reference

__all__ = [
    "logprobs_reference",
    "noise_at_reference",
    "noise_reference",
    "penalise_reference",
    "sample_reference",
]


def threshold_reference(
    scaled: torch.Tensor,  # [num_seqs, vocab] fp32, logits / temperature
    top_k: torch.Tensor,  # [num_seqs] int32, 0 = off
    top_p: torch.Tensor,  # [num_seqs] fp32, 1 = off
    min_p: torch.Tensor,  # [num_seqs] fp32, 0 = off
) -> torch.Tensor:
    """Return the smallest value that every filter keeps: [num_seqs] fp32."""
    vocab = scaled.shape[1]
    ordered = scaled.sort(dim=-1, descending=True).values
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()
    kth = ordered.gather(1, k[:, None] - 1)
    probs = torch.softmax(ordered.masked_fill(ordered < kth, float("-inf")), dim=-1)
    mass_above = probs.cumsum(-1) - probs
    # >= 1 of the sorted values is kept; with top-p off, rounding in the sum must drop nothing.
    is_kept = (mass_above < top_p[:, None]) | (top_p[:, None] >= 1)
    num_kept = is_kept.sum(-1, keepdim=True).clamp(min=1)
    top_p_threshold = torch.maximum(ordered.gather(1, num_kept - 1), kth)
    min_p_threshold = ordered[:, :1] + min_p[:, None].log()
    return torch.maximum(top_p_threshold, min_p_threshold).squeeze(1)


def sample_reference(
    logits: torch.Tensor,  # [num_seqs, vocab] fp32
    temperature: torch.Tensor,  # [num_seqs] fp32, 0 = greedy
    top_k: torch.Tensor,  # [num_seqs] int32, 0 = off
    top_p: torch.Tensor,  # [num_seqs] fp32, 1 = off
    min_p: torch.Tensor,  # [num_seqs] fp32, 0 = off
    seeds: torch.Tensor,  # [num_seqs] int64
    positions: torch.Tensor,  # [num_seqs] int64, index of the token being drawn
) -> torch.Tensor:
    """Return tokens: [num_seqs] int64."""
    greedy = logits.argmax(dim=-1)
    is_greedy = temperature == 0
    if bool(is_greedy.all()):
        return greedy
    scaled = logits / torch.where(is_greedy, 1.0, temperature)[:, None]
    threshold = threshold_reference(scaled, top_k, top_p, min_p)
    gumbel = -torch.log(-torch.log(noise_reference(seeds, positions, logits.shape[1])))
    scores = (scaled + gumbel).masked_fill(scaled < threshold[:, None], float("-inf"))
    return torch.where(is_greedy, greedy, scores.argmax(dim=-1))
