"""From logits to tokens: bias, penalties, filters, noise, log-probabilities.

Order: raw logits -> penalties (repetition, frequency, presence) -> logit_bias -> temperature,
top-k, top-p, min-p, Gumbel noise by (seed, position). Log-probabilities are of the raw logits. The
position is the index of the output token, so a resumed sequence draws what the uninterrupted one
would have.

Rows are handled in groups by what they ask for, and greedy rows without penalties pay for one
argmax. For drawn rows the CPU does not compute noise for the whole vocabulary: noise is bounded, so
a token whose scaled logit is further below the best score than the largest possible noise cannot
win. This gives exactly the token of `sample_reference`.

Invariants:
 1. A row's result depends on its logits, its own tokens and its parameters only, not on the batch.
 2. A row whose logits hold a NaN or whose largest is infinite is reported, never drawn from.

Called by: cpu_runner.py; tested against the references of headrace.kernels.sample.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from headrace.kernels.noise import noise_at_reference
from headrace.kernels.penalise import penalise_reference
from headrace.kernels.sample import threshold_reference
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.sequence import Sequence
from headrace.worker.frames import SamplingParams

#: largest Gumbel noise: its uniform is at most 1 - 2^-24 (kernels/noise.py), rounded up.
MAX_GUMBEL = 17.0
#: leading values looked at first: they bound the winner's score from below, and mostly hold all
#: that the filters keep. Of 49,152 values topk finds 256 in 0.18 ms, a sort takes 4.5 ms (one
#: EPYC core, torch 2.13).
NUM_LEADERS = 256


def sample(
    logits: torch.Tensor,  # [num_due, vocab] fp32, changed in place where parameters ask for it
    due: list[Sequence],
) -> Sampled:
    """Choose the next token of each row."""
    asked = [seq.asked.params for seq in due]
    # Kept aside, as what follows writes into the rows.
    raw = {row: logits[row].clone() for row, p in enumerate(asked) if p.logprobs is not None}
    for row, params in enumerate(asked):
        if has_penalties(params):
            _penalise(logits[row], due[row])
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias))
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()))
    best, tokens = logits.max(dim=-1)
    is_finite = torch.isfinite(best)
    if drawn := [r for r, params in enumerate(asked) if params.temperature > 0 and is_finite[r]]:
        tokens[drawn] = _draw(logits[drawn], [due[row] for row in drawn])
    chosen = zip(tokens.tolist(), due, strict=True)
    is_stop = np.array([token in seq.asked.stop_token_ids for token, seq in chosen], bool)
    sampled = Sampled(tokens.numpy(), is_finite.numpy(), is_stop)
    for row, row_logits in raw.items():
        if is_finite[row]:
            k = asked[row].logprobs or 0
            sampled.logprobs[row] = _logprobs(row_logits, int(tokens[row]), k)
    return sampled


def has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


def _penalise(logits: torch.Tensor, seq: Sequence) -> None:
    """Apply a sequence's penalties to its row: [vocab] fp32; only tokens it holds can change."""
    params = seq.asked.params
    ids, places = np.unique(seq.tokens[: seq.num_received], return_inverse=True)
    counts = np.bincount(places[seq.num_prompt :], minlength=len(ids)).astype(np.int32)
    in_prompt = np.bincount(places[: seq.num_prompt], minlength=len(ids)) > 0
    held = torch.from_numpy(ids).long()
    logits[held] = penalise_reference(
        logits[held][None],
        torch.from_numpy(counts)[None],
        torch.from_numpy(in_prompt)[None],
        torch.tensor([params.presence_penalty]),
        torch.tensor([params.frequency_penalty]),
        torch.tensor([params.repetition_penalty]),
    )[0]


def _draw(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """Return the tokens that `sample_reference` draws for rows with a temperature above 0."""
    params = [seq.asked.params for seq in seqs]
    scaled = logits / torch.tensor([p.temperature for p in params])[:, None]
    seeds = torch.tensor([signed_seed(p.seed) for p in params])
    positions = torch.tensor([seq.num_output for seq in seqs])
    leaders = scaled.topk(min(NUM_LEADERS, scaled.shape[1]), dim=-1)
    threshold = _thresholds(scaled, leaders.values, params)
    scores = leaders.values + _gumbel(seeds, positions, leaders.indices)
    scores = scores.masked_fill(leaders.values < threshold[:, None], -math.inf)
    # What lies below cannot win even with the largest noise, or was filtered out.
    worth = scaled >= torch.maximum(threshold, scores.max(dim=-1).values - MAX_GUMBEL)[:, None]
    tokens = torch.empty(len(seqs), dtype=torch.int64)
    for row in range(len(seqs)):
        ids = worth[row].nonzero().squeeze(1)
        noise = _gumbel(seeds[row : row + 1], positions[row : row + 1], ids[None])[0]
        tokens[row] = ids[(scaled[row, ids] + noise).argmax()]  # of equals the lowest id
    return tokens


def _thresholds(
    scaled: torch.Tensor,  # [num_rows, vocab] fp32
    leaders: torch.Tensor,  # [num_rows, num_leaders] fp32, the largest of each row in order
    params: list[SamplingParams],
) -> torch.Tensor:  # [num_rows] fp32
    """Return the least value that top-k, top-p and min-p keep; sort a row only if it must be."""
    threshold = torch.full((len(params),), -math.inf)
    for row, p in enumerate(params):
        if p.top_k or p.top_p < 1:
            found = _from_leaders(scaled[row], leaders[row], p)
            threshold[row] = _from_all(scaled[row], p) if found is None else found
        if p.min_p > 0:
            threshold[row] = max(threshold[row], leaders[row, 0] + math.log(p.min_p))
    return threshold


def _from_leaders(
    scaled: torch.Tensor,  # [vocab]
    leaders: torch.Tensor,  # [num_leaders]
    params: SamplingParams,
) -> torch.Tensor | None:  # scalar
    """Apply top-k and top-p to the leading values; None if others may be kept too."""
    kept, lse = leaders, None
    if params.top_k:
        if params.top_k >= len(leaders) or leaders[params.top_k - 1] == leaders[-1]:
            return None
        kept = leaders[leaders >= leaders[params.top_k - 1]]
        lse = kept.logsumexp(0)
    if params.top_p < 1:
        probs = torch.exp(kept - (scaled.logsumexp(0) if lse is None else lse))
        num_kept = int((probs.cumsum(0) - probs < params.top_p).sum())
        if num_kept == len(leaders):
            return None
        kept = kept[: max(num_kept, 1)]
    return kept[-1]


def _from_all(scaled: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    return threshold_reference(
        scaled[None],
        torch.tensor([params.top_k], dtype=torch.int32),
        torch.tensor([params.top_p]),
        torch.zeros(1),
    )[0]


def _gumbel(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return -torch.log(-torch.log(noise_at_reference(seeds, positions, ids)))


def signed_seed(seed: int) -> int:
    """Return the int64 with the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _logprobs(
    raw: torch.Tensor,  # [vocab] fp32, the logits before anything was done to them
    token: int,
    k: int,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return (the token's logprob, the k likeliest ids, theirs); of equals the lower id first."""
    lse = raw.logsumexp(0)
    chosen = float(raw[token] - lse)
    if k == 0:
        return chosen, np.empty(0, np.int64), np.empty(0, np.float32)
    ids = (raw >= raw.topk(k).values[-1]).nonzero().squeeze(1)
    ids = ids[torch.sort(raw[ids], descending=True, stable=True).indices[:k]]
    return chosen, ids.numpy(), (raw[ids] - lse).numpy()
