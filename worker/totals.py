"""What the engine has done since the worker's start, summed over its frames for the beat.

Invariants:
1. Totals never fall while the process lives: what an engine counted itself is added up when the
   next one opens.
2. A beat's means and rates are of exactly the frames since the beat before, so each frame counts
   once; without a frame they are 0.

Called by: the courier's loop (`opened`, `step`), the keeper by way of lifecycle (`since_last`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import numpy as np

from headrace.worker.frames import StepFrame


@dataclass(frozen=True, slots=True)
class Figures:
    """The totals, and the means since they were last asked for."""

    num_preempted: int = 0
    prompt_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    tokens_total: int = 0
    tokens_per_s: float = 0.0
    step_us: int = 0
    batch: float = 0.0


class EngineTotals:
    """Sums over all engines of this worker, under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Counted by the engine, so they begin anew with each: those of the ones before, this one's.
        self._num_preempted = self._prefix_hits = 0
        self._num_preempted_now = self._prefix_hits_now = 0
        self._num_computed = 0  # prompt tokens
        self._num_tokens = 0
        self._num_steps = self._step_us = self._num_decodes = 0  # since the last beat
        self._tokens_then, self._asked_at = 0, time.monotonic()

    def opened(self) -> None:
        """A new engine is ready: its own counts begin at zero."""
        with self._lock:
            self._num_preempted += self._num_preempted_now
            self._prefix_hits += self._prefix_hits_now
            self._num_preempted_now = self._prefix_hits_now = 0

    def step(self, frame: StepFrame) -> None:
        """Add one frame."""
        stats = frame.stats
        num_tokens = int(np.count_nonzero(frame.entries["token"] >= 0))
        with self._lock:
            self._num_preempted_now = stats.num_preempted_total
            self._prefix_hits_now = stats.prefix_hit_tokens_total
            self._num_computed += stats.prefill_tokens
            self._num_tokens += num_tokens
            if stats.step_us:  # 0: a frame of ends alone, nothing was computed
                self._num_steps += 1
                self._step_us += stats.step_us
                self._num_decodes += stats.num_decodes

    def since_last(self) -> Figures:
        """Return the totals, and the means since the call before; for one caller, the beat."""
        with self._lock:
            now = time.monotonic()
            seconds, num_steps = max(1e-3, now - self._asked_at), max(1, self._num_steps)
            hits = self._prefix_hits + self._prefix_hits_now
            figures = Figures(
                num_preempted=self._num_preempted + self._num_preempted_now,
                prompt_tokens_total=hits + self._num_computed,
                prefix_hit_tokens_total=hits,
                tokens_total=self._num_tokens,
                tokens_per_s=round((self._num_tokens - self._tokens_then) / seconds, 1),
                step_us=self._step_us // num_steps,
                batch=round(self._num_decodes / num_steps, 2),
            )
            self._num_steps = self._step_us = self._num_decodes = 0
            self._tokens_then, self._asked_at = self._num_tokens, now
        return figures
