"""Whether a job read from Redis is one that a gateway could have put there.

The gateway checks what clients send; this is for what came another way (another version, a hand in
Redis or Postgres): such a job fails, and its worker goes on. Bounds are those of the frames to the
engine, which checks the rest against its model (worker/engine/loop).

Invariants:
1. What passes can be written into a frame: its numbers fit, and it is the job that was claimed.
2. Refusals quote a field's name and no more.

Called by: worker/intake.
"""

from __future__ import annotations

import math

from headrace.contract.errors import EngineRefused
from headrace.contract.wire import JobSpec, Sampling, WireError

MAX_TOKEN_ID = (1 << 31) - 1
#: Inclusive bounds of the numbers of a sampling, as gateway/schemas has them.
BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1 << 20),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (0, 1 << 31),
    "min_p": (0, 1),
    "seed": (0, (1 << 63) - 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 10),
    "logprobs": (0, 20),
}


def check_spec(spec: JobSpec, job: str) -> None:
    """Raise WireError for another job's spec, EngineRefused for one that no engine can be sent."""
    if spec.job != job:
        raise WireError("the entry of this job holds another job's spec: it was not written by us")
    _check_sampling(spec.sampling)
    given = [spec.prompt, spec.prompt_token_ids, spec.messages]
    if sum(one is not None for one in given) != 1:
        raise _refused("prompt, prompt_token_ids, messages")
    ids = spec.prompt_token_ids or ()
    if any(not 0 <= token_id <= MAX_TOKEN_ID for token_id in ids):
        raise _refused("prompt_token_ids")


def _check_sampling(sampling: Sampling) -> None:
    for name, (low, high) in BOUNDS.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:  # NaN lies nowhere
            raise _refused(name)
    for token_id, bias in sampling.logit_bias.items():
        if not (0 <= token_id <= MAX_TOKEN_ID and math.isfinite(bias)):
            raise _refused("logit_bias")
    if not all(sampling.stop):
        raise _refused("stop")


def _refused(name: str) -> EngineRefused:
    return EngineRefused(f"{name} of this job is nothing a gateway accepts: send the job again")
