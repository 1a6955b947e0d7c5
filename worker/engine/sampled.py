"""What a step comes back with, and which parameters can be sampled with at all.

Apart from sampling.py so that who only hands results on, the loop and the stub, needs no torch: it
is most of the time that an engine without a model takes to start.

Called by: runners (Sampled), loop (check_params), outcome.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from headrace.kernels.limits import MAX_BIAS
from headrace.worker.engine.sequence import SequenceError
from headrace.worker.frames import SamplingParams

#: largest k of `logprobs`; OpenAI's limit.
MAX_LOGPROBS = 20


@dataclass(slots=True)
class Sampled:
    """Results of one step, row by row of `Batch.due_slots`."""

    tokens: np.ndarray  # [num_due] int
    is_finite: np.ndarray  # [num_due] bool; where False the token means nothing
    is_stop: np.ndarray  # [num_due] bool: the token is one of its sequence's stop ids
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
    if len(params.logit_bias) > MAX_BIAS:
        raise _bad(
            f"logit_bias has {len(params.logit_bias)} tokens; at most {MAX_BIAS} may have one"
        )
    for token, bias in params.logit_bias.items():
        if not 0 <= token < vocab_size or not math.isfinite(bias):
            raise _bad(
                f"logit_bias gives {bias} to token {token}; it must be finite and the token "
                f"from 0 to {vocab_size - 1}"
            )


def _bad(text: str) -> SequenceError:
    return SequenceError("bad_sampling", text + ": correct the request")
