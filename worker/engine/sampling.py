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

Called by: runner.py; tested against the references of headrace.kernels.sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from headrace.kernels.logprobs import logprobs_reference
from headrace.kernels.noise import noise_at_reference
from headrace.kernels.penalise import penalise_reference
from headrace.kernels.sample import threshold_reference
from headrace.worker.engine.sequence import Sequence, SequenceError
from headrace.worker.frames import SamplingParams

#: largest k of `logprobs`; OpenAI's limit.
MAX_LOGPROBS = 20
#: largest Gumbel noise: its uniform is at most 1 - 2^-24 (kernels/noise.py), rounded up.
MAX_GUMBEL = 17.0
#: leading candidates drawn first, to bound the winner's score from below.
NUM_LEADERS = 32


@dataclass(slots=True)
class Sampled:
    """Results of one step, row by row of `Batch.due`."""

    tokens: np.ndarray  # [num_due] int64
    is_finite: np.ndarray  # [num_due] bool; where False the token means nothing
    #: row -> (the chosen token's logprob, ids, their logprobs), for rows that asked
    logprobs: dict[int, tuple[float, np.ndarray, np.ndarray]] = field(default_factory=dict)


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise SequenceError for parameters that cannot be sampled with."""
    ranges = {
        "temperature": (0.0, math.inf),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "top_k": (0, 2**31 - 1),
        "seed": (-(2**63), 2**64 - 1),
        "presence_penalty": (-math.inf, math.inf),
        "frequency_penalty": (-math.inf, math.inf),
        "repetition_penalty": (1e-6, math.inf),
    }
    for name, (low, high) in ranges.items():
        value = getattr(params, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise _bad(f"{name} is {value}; it must be finite and from {low} to {high}")
    if params.logprobs is not None and not 0 <= params.logprobs <= min(MAX_LOGPROBS, vocab_size):
        raise _bad(f"logprobs is {params.logprobs}; it must be from 0 to {MAX_LOGPROBS}")
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size or not math.isfinite(bias):
            raise _bad(
                f"logit_bias gives {bias} to token {token}; it must be finite and the token "
                f"from 0 to {vocab_size - 1}"
            )


def sample(
    logits: torch.Tensor,  # [num_due, vocab] fp32, changed in place where parameters ask for it
    due: list[Sequence],
) -> Sampled:
    """Choose the next token of each row."""
    asked = [seq.asked.params for seq in due]
    logprob_rows = [row for row, params in enumerate(asked) if params.logprobs is not None]
    raw = logits[logprob_rows] if logprob_rows else logits[:0]
    if penalised := [row for row, params in enumerate(asked) if has_penalties(params)]:
        logits[penalised] = _penalise(logits[penalised], [due[row] for row in penalised])
    for row, params in enumerate(asked):
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias))
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()))
    best, tokens = logits.max(dim=-1)
    is_finite = torch.isfinite(best)
    if drawn := [r for r, params in enumerate(asked) if params.temperature > 0 and is_finite[r]]:
        tokens[drawn] = _draw(logits[drawn], [due[row] for row in drawn])
    sampled = Sampled(tokens.numpy(), is_finite.numpy())
    if logprob_rows:
        _add_logprobs(sampled, raw, logprob_rows, asked)
    return sampled


def has_penalties(params: SamplingParams) -> bool:
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    )


def _penalise(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """Apply the penalties of rows that have any: [num_rows, vocab] fp32."""
    vocab = logits.shape[1]
    counts = torch.zeros(logits.shape, dtype=torch.int32)
    in_prompt = torch.zeros(logits.shape, dtype=torch.bool)
    for row, seq in enumerate(seqs):
        counts[row] = torch.from_numpy(np.bincount(seq.output, minlength=vocab).astype(np.int32))
        in_prompt[row, torch.from_numpy(seq.tokens[: seq.num_prompt]).long()] = True
    params = [seq.asked.params for seq in seqs]
    return penalise_reference(
        logits,
        counts,
        in_prompt,
        torch.tensor([p.presence_penalty for p in params]),
        torch.tensor([p.frequency_penalty for p in params]),
        torch.tensor([p.repetition_penalty for p in params]),
    )


def _draw(logits: torch.Tensor, seqs: list[Sequence]) -> torch.Tensor:
    """Return the tokens that `sample_reference` draws for rows with a temperature above 0."""
    params = [seq.asked.params for seq in seqs]
    scaled = logits / torch.tensor([p.temperature for p in params])[:, None]
    filtered = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1 or p.min_p > 0]
    if filtered:
        threshold = threshold_reference(
            scaled[filtered],
            torch.tensor([params[row].top_k for row in filtered], dtype=torch.int32),
            torch.tensor([params[row].top_p for row in filtered]),
            torch.tensor([params[row].min_p for row in filtered]),
        )
        below = scaled[filtered] < threshold[:, None]
        scaled[filtered] = scaled[filtered].masked_fill(below, -math.inf)
    seeds = torch.tensor([signed_seed(p.seed) for p in params])
    positions = torch.tensor([seq.num_output for seq in seqs])
    leaders = scaled.topk(min(NUM_LEADERS, scaled.shape[1]), dim=-1)
    scores = leaders.values + _gumbel(seeds, positions, leaders.indices)
    # Strictly less than any token that may still win; equal scores go to the lower id below.
    worth = scaled >= (scores.max(dim=-1).values - MAX_GUMBEL)[:, None]
    tokens = torch.empty(len(seqs), dtype=torch.int64)
    for row in range(len(seqs)):
        ids = worth[row].nonzero().squeeze(1)
        noise = _gumbel(seeds[row : row + 1], positions[row : row + 1], ids[None])[0]
        tokens[row] = ids[(scaled[row, ids] + noise).argmax()]
    return tokens


def _gumbel(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return -torch.log(-torch.log(noise_at_reference(seeds, positions, ids)))


def signed_seed(seed: int) -> int:
    """Return the int64 with the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _add_logprobs(
    sampled: Sampled,
    raw: torch.Tensor,  # [num_rows, vocab] logits before anything was done to them
    rows: list[int],
    asked: list[SamplingParams],
) -> None:
    most = max(asked[row].logprobs or 0 for row in rows)
    chosen, ids, values = logprobs_reference(raw, torch.from_numpy(sampled.tokens[rows]), most)
    for i, row in enumerate(rows):
        k = asked[row].logprobs or 0
        sampled.logprobs[row] = (float(chosen[i]), ids[i, :k].numpy(), values[i, :k].numpy())


def _bad(text: str) -> SequenceError:
    return SequenceError("bad_sampling", text + ": correct the request")
