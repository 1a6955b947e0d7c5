"""Log-probabilities of the chosen token and of the k likeliest, from the raw logits.

    logprob[s, v] = logits[s, v] - logsumexp(logits[s])

Raw: before temperature, penalties and filters, as the API promises. Equal logits are listed by
lower token id first. Numerics: fp32.
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.triton_seam import tl, triton


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


@triton.jit
def _logprobs_kernel(
    logits_ptr,  # in: [num_seqs, vocab]
    tokens_ptr,  # in: [num_seqs] int64
    chosen_ptr,  # out: [num_seqs] fp32
    top_ids_ptr,  # out: [num_seqs, k] int64
    top_logprobs_ptr,  # out: [num_seqs, k] fp32
    vocab,
    k,
    BLOCK: tl.constexpr,
) -> None:
    seq = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + seq * vocab
    lanes = tl.arange(0, BLOCK)

    # logsumexp in one pass: each lane keeps its own running maximum and rescaled sum.
    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        new_max = tl.maximum(lane_max, x)
        # A lane that has seen nothing finite has no maximum to measure from.
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        lane_sum = lane_sum * tl.exp(lane_max - origin) + tl.exp(x - origin)
        lane_max = new_max
    row_max = tl.max(lane_max, axis=0)
    log_sum = row_max + tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0))

    token = tl.load(tokens_ptr + seq)
    tl.store(chosen_ptr + seq, tl.load(row_ptr + token).to(tl.float32) - log_sum)

    # k passes, each for the largest entry after the one before in the order (value, lower id).
    last_value = float("inf")
    last_id = -1
    for rank in range(k):
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        best_id = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        for start in range(0, vocab, BLOCK):
            ids = start + lanes
            x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            is_after = (x < last_value) | ((x == last_value) & (ids > last_id))
            is_better = (x > best) | (best_id == 0x7FFFFFFF)
            is_taken = is_after & is_better & (ids < vocab)
            best = tl.where(is_taken, x, best)
            best_id = tl.where(is_taken, ids, best_id)
        last_value = tl.max(best, axis=0)
        last_id = tl.min(tl.where(best == last_value, best_id, 0x7FFFFFFF), axis=0)
        tl.store(top_ids_ptr + seq * k + rank, last_id.to(tl.int64))
        tl.store(top_logprobs_ptr + seq * k + rank, last_value - log_sum)


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (chosen: [num_seqs] fp32, top ids: [num_seqs, k] int64, their logprobs: fp32).

    Args:
        logits: [num_seqs, vocab], contiguous, raw.
        tokens: [num_seqs] int64, the chosen tokens, each below vocab.
        k: how many alternatives, 0 to vocab; each costs a pass over the row, meant for 20 or so.
    """
    check_leading("logits", logits, 2)
    num_seqs, vocab = logits.shape
    check_tensor("tokens", tokens, (num_seqs,), torch.int64, logits.device)
    if not 0 <= k <= vocab:
        raise ValueError(
            f"k must be from 0 to vocab; found {k} with vocab {vocab}: ask for fewer alternatives"
        )
    chosen = torch.empty(num_seqs, dtype=torch.float32, device=logits.device)
    top_ids = torch.empty((num_seqs, k), dtype=torch.int64, device=logits.device)
    top_logprobs = torch.empty((num_seqs, k), dtype=torch.float32, device=logits.device)
    if num_seqs > 0:
        _logprobs_kernel[(num_seqs,)](
            logits, tokens, chosen, top_ids, top_logprobs, vocab, k, BLOCK=2048, num_warps=8
        )
    return chosen, top_ids, top_logprobs


#: Sums in another order, in fp32, whatever the dtype of the logits.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.bfloat16: 2e-5}
