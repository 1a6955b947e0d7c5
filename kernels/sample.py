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

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.logprobs import logprobs_reference
from headrace.kernels.noise import (
    CHAIN_A,
    CHAIN_B,
    noise_at,
    noise_at_reference,
    noise_reference,
)
from headrace.kernels.penalise import penalise_reference
from headrace.kernels.triton_seam import tl, triton

__all__ = [
    "logprobs_reference",
    "noise_at_reference",
    "noise_reference",
    "penalise_reference",
    "sample",
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


@triton.jit
def _load_scaled(row_ptr, ids, vocab, temperature) -> tl.tensor:
    """Load some of a row divided by the temperature; outside the vocabulary -inf."""
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
    return x / temperature


@triton.jit
def _key_of(x) -> tl.tensor:
    """Map fp32 to int32 in the same order, so that halving a range of values ends exactly."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(key) -> tl.tensor:
    """Undo _key_of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _top_k_threshold(row_ptr, vocab, temperature, k, row_max, BLOCK: tl.constexpr) -> tl.tensor:
    """Find by halving a value that exactly the k largest reach (more, if equal ones straddle)."""
    lanes = tl.arange(0, BLOCK)
    # int64, so that the middle of two int32 keys never overflows. At least k values are >= low,
    # fewer than k are >= high.
    low = _key_of(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
    high = _key_of(row_max).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, vocab, BLOCK):
            ids = start + lanes
            keys = _key_of(_load_scaled(row_ptr, ids, vocab, temperature))
            counts += ((keys >= middle) & (ids < vocab)).to(tl.int32)
        count = tl.sum(counts, axis=0)
        low = tl.where(count >= k, middle, low)
        # With exactly k above the middle no further halving changes what is kept.
        high = tl.where(count == k, middle + 1, tl.where(count >= k, high, middle))
    return _value_of(low.to(tl.int32))


@triton.jit
def _mass(row_ptr, vocab, temperature, row_max, floor, BLOCK: tl.constexpr) -> tl.tensor:
    """Sum exp(x - row_max) over what is >= floor."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _load_scaled(row_ptr, start + lanes, vocab, temperature)
        sums += tl.where(x >= floor, tl.exp(x - row_max), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _top_p_threshold(
    row_ptr, vocab, temperature, p, row_max, floor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Find by halving the smallest value above which less than p of the mass over floor lies."""
    wanted = p * _mass(row_ptr, vocab, temperature, row_max, floor, BLOCK)
    # The mass strictly above low is >= wanted, that above high is less.
    low = _key_of(floor).to(tl.int64) - 1
    high = _key_of(row_max).to(tl.int64)
    while high - low > 1:
        middle = (low + high) >> 1
        above = _value_of((middle + 1).to(tl.int32))
        mass = _mass(row_ptr, vocab, temperature, row_max, above, BLOCK)
        low = tl.where(mass < wanted, low, middle)
        high = tl.where(mass < wanted, middle, high)
    return _value_of(high.to(tl.int32))


@triton.jit
def _threshold(row_ptr, vocab, temperature, top_k, top_p, min_p, BLOCK: tl.constexpr) -> tl.tensor:
    """Return a value that exactly the tokens kept by all three filters reach."""
    threshold = tl.full([], float("-inf"), tl.float32)
    limits_k = (top_k > 0) & (top_k < vocab)
    if limits_k | (top_p < 1) | (min_p > 0):
        lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, vocab, BLOCK):
            x = _load_scaled(row_ptr, start + tl.arange(0, BLOCK), vocab, temperature)
            lane_max = tl.maximum(lane_max, x)
        row_max = tl.max(lane_max, axis=0)
        # Where every token is masked there is no mass to share out, and nothing to keep.
        if row_max > float("-inf"):
            if limits_k:
                threshold = _top_k_threshold(row_ptr, vocab, temperature, top_k, row_max, BLOCK)
            if top_p < 1:
                threshold = _top_p_threshold(
                    row_ptr, vocab, temperature, top_p, row_max, threshold, BLOCK
                )
            if min_p > 0:
                threshold = tl.maximum(threshold, row_max + tl.log(min_p))
    return threshold


@triton.jit
def _argmax_row(
    row_ptr, vocab, temperature, threshold, noise_scale, seed, position, start_a, start_b,
    BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the token with the largest noisy score among those at or over the threshold."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = tl.zeros([BLOCK], tl.int32) + vocab
    for start in range(0, vocab, BLOCK):
        ids = start + lanes
        x = _load_scaled(row_ptr, ids, vocab, temperature)
        noise = noise_at(seed, position, ids, start_a, start_b)
        score = x - noise_scale * tl.log(-tl.log(noise))
        is_better = (x >= threshold) & (score > best)
        best = tl.where(is_better, score, best)
        best_id = tl.where(is_better, ids, best_id)
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, best_id, vocab), axis=0)
    # A row of nothing but -inf (or NaN) has no best: token 0, never an index out of the table.
    return tl.where(token < vocab, token, 0)


@triton.jit
def _sample_kernel(
    logits_ptr,  # in: [num_seqs, vocab] fp32
    temperature_ptr,  # in: [num_seqs] fp32, 0 = greedy
    top_k_ptr,  # in: [num_seqs] int32, 0 = off
    top_p_ptr,  # in: [num_seqs] fp32, 1 = off
    min_p_ptr,  # in: [num_seqs] fp32, 0 = off
    seeds_ptr,  # in: [num_seqs] int64
    positions_ptr,  # in: [num_seqs] int64
    tokens_ptr,  # out: [num_seqs] int64
    start_a,
    start_b,
    vocab,
    BLOCK: tl.constexpr,
) -> None:
    seq = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + seq * vocab
    asked_temperature = tl.load(temperature_ptr + seq)
    is_greedy = asked_temperature == 0
    temperature = tl.where(is_greedy, 1.0, asked_temperature)
    threshold = tl.full([], float("-inf"), tl.float32)
    if not is_greedy:
        threshold = _threshold(
            row_ptr, vocab, temperature, tl.load(top_k_ptr + seq), tl.load(top_p_ptr + seq),
            tl.load(min_p_ptr + seq), BLOCK,
        )  # fmt: skip
    token = _argmax_row(
        row_ptr, vocab, temperature, threshold, tl.where(is_greedy, 0.0, 1.0),
        tl.load(seeds_ptr + seq), tl.load(positions_ptr + seq), start_a, start_b, BLOCK,
    )  # fmt: skip
    tl.store(tokens_ptr + seq, token.to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token a row: [num_seqs] int64.

    Args:
        logits: [num_seqs, vocab] fp32, contiguous, penalised.
        temperature: [num_seqs] fp32, 0 = greedy.
        top_k: [num_seqs] int32, 0 = off.
        top_p: [num_seqs] fp32, 1 = off.
        min_p: [num_seqs] fp32, 0 = off.
        seeds: [num_seqs] int64.
        positions: [num_seqs] int64, index of the token being drawn.
        out: [num_seqs] int64. Allocated when None.
    """
    check_leading("logits", logits, 2, (torch.float32,))
    num_seqs, vocab = logits.shape
    if vocab == 0:
        raise ValueError(
            "logits must have a vocabulary to draw from; found vocab 0: pass the lm_head's output"
        )
    if out is None:
        out = torch.empty(num_seqs, dtype=torch.int64, device=logits.device)
    for name, values, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
        ("out", out, torch.int64),
    ):
        check_tensor(name, values, (num_seqs,), dtype, logits.device)
    if num_seqs > 0:
        _sample_kernel[(num_seqs,)](
            logits, temperature, top_k, top_p, min_p, seeds, positions, out, CHAIN_A, CHAIN_B,
            vocab, BLOCK=min(4096, max(256, triton.next_power_of_2(vocab))), num_warps=8,
        )  # fmt: skip
    return out


#: Of a score, not of a token: two logarithms and a division, a few units in the last place of
#: values below 32. Where two scores, or a filter's sum and its limit, are closer, either is right.
TOLERANCE = {torch.float32: 1e-4}
