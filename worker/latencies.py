"""How long this worker's jobs waited for tokens, as counts that travel in its beats.

    ttft_ms  a job's first token: from its acceptance (its id tells when) to the engine's frame; by
             the attempt that made that token, so a takeover counts nothing twice
    itl_ms   the gap before a token of a running sequence: the time of its step, which is the time
             since the step before while the engine works. Counted once a frame for all its tokens
             but the first of a job, because a lookup a token would cost the loop too much; so a
             sequence that was preempted, or taken over, counts as if it had gone on
    e2e_ms   a whole job, from its acceptance to the commit of its result; only of succeeded ones

The first and the last take the difference of two machines' clocks; less than nothing counts as 0.

Called by: the courier's loop (tokens), endings (jobs), the keeper (reads, for a beat).
"""

from __future__ import annotations

import threading
import time

import numpy as np

from headrace.contract import latency_bounds
from headrace.contract.ids import made_ms
from headrace.worker.frames import StepFrame


class Latencies:
    """One histogram of each kind, under a lock: three threads use them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {kind: latency_bounds.no_counts() for kind in latency_bounds.KINDS}

    def first_token(self, job: str) -> None:
        self._add("ttft_ms", _age_ms(job), 1)

    def stepped(self, frame: StepFrame) -> None:
        """Count a step's time once for each token of it that followed another."""
        entries = frame.entries
        num_gaps = int(np.count_nonzero((entries["token"] >= 0) & (entries["index"] > 0)))
        if num_gaps:
            self._add("itl_ms", frame.stats.step_us / 1000, num_gaps)

    def succeeded(self, job: str) -> None:
        self._add("e2e_ms", _age_ms(job), 1)

    def counts(self) -> dict[str, tuple[int, ...]]:
        """Return the counts since this worker's start."""
        with self._lock:
            return {kind: tuple(counts) for kind, counts in self._counts.items()}

    def _add(self, kind: str, latency_ms: float, num: int) -> None:
        bucket = latency_bounds.bucket_of(latency_ms)
        with self._lock:
            self._counts[kind][bucket] += num


def _age_ms(job: str) -> float:
    return max(0.0, time.time() * 1000 - made_ms(job))
