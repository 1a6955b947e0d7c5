"""What happened in one run of an engine, and the figures that follow from it.

All times are of CLOCK_MONOTONIC, in seconds, taken where tokens are received: in the benchmark's
process for our engine, in the peer's own process for a peer.

Invariants:
1. A run counts only if every request got exactly the tokens it asked for: `figures` refuses others.
2. A gap is between two successive tokens of one request as they were received; tokens received at
   once have a gap of zero between them.

Called by: engine.py, engine_ours.py, the peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bench.roofline import Request


class RunError(Exception):
    """A run that measured nothing: the engine ended, was too slow, or made the wrong tokens."""


def _empty() -> np.ndarray:
    return np.empty(0)


@dataclass(frozen=True, slots=True)
class RunLog:
    """One run; the arrays over steps are empty where an engine does not tell."""

    started_s: float  # before the first request was handed over
    ended_s: float  # after the last token was received
    requests: np.ndarray  # [num_tokens] index of the token's request, in order of arrival
    times_s: np.ndarray  # [num_tokens] when it was received
    steps: np.ndarray = field(default_factory=_empty)  # [num_tokens] number of the step it is of
    submitted_s: np.ndarray = field(default_factory=_empty)  # [num_steps]
    step_us: np.ndarray = field(default_factory=_empty)  # [num_steps]
    host_us: np.ndarray = field(default_factory=_empty)  # [num_steps] of it, host not waiting
    num_decodes: np.ndarray = field(default_factory=_empty)  # [num_steps]
    num_prefill_tokens: np.ndarray = field(default_factory=_empty)  # [num_steps]

    def save(self, path: Path) -> None:
        """Write it as an npz file."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        np.savez(path, **values)

    @classmethod
    def load(cls, path: Path) -> RunLog:
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            values = {name: arrays[name] for name in arrays.files}
        started_s, ended_s = (float(values.pop(name)) for name in ("started_s", "ended_s"))
        return cls(started_s, ended_s, **values)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a row says of a run; None where it is not known."""

    seconds: float
    output_tokens_per_s: float
    inter_token_p50_ms: float | None = None
    inter_token_p99_ms: float | None = None
    first_token_p50_ms: float | None = None
    first_token_p99_ms: float | None = None
    step_us_p50: float | None = None
    host_us_p50: float | None = None
    host_us_mean: float | None = None
    num_steps: int | None = None
    num_prefill_tokens: int | None = None  # computed: prompt tokens less those of the prefix cache

    def values(self) -> dict[str, float | int | None]:
        """Give all fields, floats to six digits."""
        return {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def figures(log: RunLog, requests: Sequence[Request]) -> Figures:
    """Summarise a run; raise RunError unless every request got exactly its tokens."""
    check_counts(np.bincount(log.requests.astype(np.int64), minlength=len(requests)), requests)
    gaps_ms, first_ms = latencies_ms(log)
    inter = np.percentile(gaps_ms, (50, 99)) if len(gaps_ms) else (None, None)
    first = np.percentile(first_ms, (50, 99))
    return Figures(
        seconds=log.ended_s - log.started_s,
        output_tokens_per_s=len(log.requests) / (log.ended_s - log.started_s),
        inter_token_p50_ms=_number(inter[0]),
        inter_token_p99_ms=_number(inter[1]),
        first_token_p50_ms=_number(first[0]),
        first_token_p99_ms=_number(first[1]),
        step_us_p50=float(np.median(log.step_us)) if len(log.step_us) else None,
        host_us_p50=float(np.median(log.host_us)) if len(log.host_us) else None,
        host_us_mean=float(log.host_us.mean()) if len(log.host_us) else None,
        num_steps=len(log.submitted_s) or None,
        num_prefill_tokens=int(log.num_prefill_tokens.sum()) if len(log.submitted_s) else None,
    )


def check_counts(
    found: np.ndarray,  # [num_requests] tokens made
    requests: Sequence[Request],
) -> None:
    """Raise RunError unless each request has exactly the tokens it asked for."""
    asked = np.array([num_output for _, num_output in requests])
    if len(found) != len(asked) or (found != asked).any():
        wrong = [] if len(found) != len(asked) else np.flatnonzero(found != asked).tolist()
        example = f"; request {wrong[0]}: {asked[wrong[0]]} and {found[wrong[0]]}" if wrong else ""
        raise RunError(
            f"{asked.sum()} tokens of {len(asked)} requests asked; {found.sum()} of {len(found)} "
            f"made{example}: nothing of this run counts, look for an end token or a refusal"
        )


def latencies_ms(log: RunLog) -> tuple[np.ndarray, np.ndarray]:
    """Return [num gaps] between tokens of one request, and [num_requests] until its first."""
    order = np.lexsort((log.times_s, log.requests))
    times_s, requests = log.times_s[order], log.requests[order]
    is_first = np.diff(requests, prepend=-1) != 0
    gaps_s = np.diff(times_s, prepend=log.started_s)[~is_first]
    return gaps_s * 1e3, (times_s[is_first] - log.started_s) * 1e3


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
