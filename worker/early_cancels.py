"""Cancellations that came before their job did: between its fence and its admission.

A cancel's message goes to every courier of the model at once. One whose intake has fenced the job
and not yet delivered it would let the message pass, and find the flag at its next renewal: a third
of a lease later, in which the sequence is prefilled and decoded for nobody.

Invariants:
1. Only what was really asked is told here (Postgres has it before the message is sent), so to end
   a job by it is right whenever that happens.
2. What is kept is bounded in number and in time: most messages are about other couriers' jobs.

Called by: the courier's loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds between a job's fence and its admission at most: a long prompt's tokenising.
KEEP_S = 10.0
#: Cancellations kept; the oldest goes first.
MAX_KEPT = 10_000


class EarlyCancels:
    """The cancellations of the last seconds whose jobs are not here."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._noted: dict[str, float] = {}  # job -> when, oldest first

    def note(self, job: str) -> None:
        """Remember that a job which is not here was canceled."""
        now = self._clock()
        self._noted.pop(job, None)
        self._noted[job] = now
        while True:  # ends with the newest at the latest; looks at no more than it forgets
            oldest, at = next(iter(self._noted.items()))
            if at > now - KEEP_S and len(self._noted) <= MAX_KEPT:
                return
            del self._noted[oldest]

    def take(self, job: str) -> bool:
        """Say whether the job that has come now was canceled before, and forget it."""
        at = self._noted.pop(job, None)
        return at is not None and at > self._clock() - KEEP_S
