"""Where an attempt's time went, as its worker tells it with the result: columns of `attempts`.

Milliseconds after the attempt's `started_at`, by the worker's monotonic clock; None = it never came
so far. An attempt whose worker died tells nothing: all its columns stay null.

Called by: worker/stamps (makes them), contract.ledger (stores them with the end they belong to).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    admitted_ms: int | None  # tokenised and given to the engine
    first_token_ms: int | None  # the first that this attempt made itself
    last_token_ms: int | None
    resumed_at: int  # tokens it found in the log
    num_tokens: int  # tokens it made itself
