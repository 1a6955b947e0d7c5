"""Latency histograms that processes exchange: their bounds, and how to subtract and read them.

A worker counts each latency into one bucket and sends the counts since its start in every beat; who
wants the latencies of the last minute takes the difference of two beats, adds up workers, and reads
quantiles from that. So nothing is averaged that must not be, and a lost beat loses nothing.

Invariants:
1. A histogram is NUM_BUCKETS counts that only grow: `counts[i]` is how many were at most
   BOUNDS_MS[i] and above the bound before it; the last counts what is above all bounds.
2. A worker that started anew counts from zero; `difference` sees that and takes the whole.

Called by: worker/latencies (counting), gateway/dashboard/sampler (reading).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

#: What is measured, under the names that beats and samples use: first token after the job was
#: accepted, gap between two tokens, whole job.
KINDS = ("ttft_ms", "itl_ms", "e2e_ms")

_LEAST_MS, _MOST_MS, _NUM_BOUNDS = 1.0, 600_000.0, 32
_RATIO = (_MOST_MS / _LEAST_MS) ** (1 / (_NUM_BOUNDS - 1))

#: Upper bounds of the buckets, ms: evenly spaced in the logarithm from 1 ms to 10 min, each 1.54
#: times the one before, so a quantile is known to about a fifth.
BOUNDS_MS = (
    *(float(f"{_LEAST_MS * _RATIO**number:.3g}") for number in range(_NUM_BOUNDS - 1)),
    _MOST_MS,
)
#: One more than bounds: the last bucket is open.
NUM_BUCKETS = len(BOUNDS_MS) + 1


def bucket_of(latency_ms: float) -> int:
    """Return the index of the bucket that counts this latency."""
    return bisect_left(BOUNDS_MS, latency_ms)


def no_counts() -> list[int]:
    return [0] * NUM_BUCKETS


def difference(newer: Sequence[int], older: Sequence[int] | None) -> list[int]:
    """Return what was counted between two readings; all of `newer` if its source began anew."""
    if older is None or len(older) != len(newer):
        return list(newer)
    found = [new - old for new, old in zip(newer, older, strict=True)]
    return list(newer) if any(count < 0 for count in found) else found


def total(histograms: Sequence[Sequence[int]]) -> list[int]:
    """Add histograms up, bucket by bucket."""
    return [sum(counts) for counts in zip(*histograms, strict=True)] or no_counts()


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Return the latency, ms, that `share` of the counted ones do not exceed; None of none.

    Within a bucket latencies count as evenly spread; above the last bound all are that bound.
    """
    wanted = share * sum(counts)
    if not any(counts):
        return None
    below = 0
    for number, count in enumerate(counts[: len(BOUNDS_MS)]):
        if count and below + count >= wanted:
            least = BOUNDS_MS[number - 1] if number else 0.0
            part = max(0.0, wanted - below) / count
            return least + (BOUNDS_MS[number] - least) * part
        below += count
    return BOUNDS_MS[-1]


def p50_p99(counts: Sequence[int]) -> dict[str, float] | None:
    """Return both quantiles as samples show them, or None when nothing was counted."""
    p50, p99 = quantile(counts, 0.5), quantile(counts, 0.99)
    if p50 is None or p99 is None:
        return None
    return {"p50": _rounded(p50), "p99": _rounded(p99)}


def _rounded(latency_ms: float) -> float:
    """Keep three digits: the buckets know no more."""
    digits = 2 - math.floor(math.log10(latency_ms)) if latency_ms > 0 else 0
    return round(latency_ms, max(0, digits)) if digits > 0 else float(round(latency_ms, digits))
