"""Log and publish what running jobs have made: one fenced command a flush, whatever their number.

Invariants:
1. What was appended is marked as logged, nothing else; what was refused is told to the caller.
2. A Redis that is away loses nothing: tokens stay with their jobs and go with the next flush.

Called by: the courier's loop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from headrace.contract import log
from headrace.contract.errors import Unavailable
from headrace.contract.tokens import Append, Overlap, TokenLog
from headrace.worker.metrics import Metrics
from headrace.worker.running import RunningJob

#: Seconds a finished job waits for a Redis that is away before its result is committed anyway.
PATIENCE_S = 5.0


class Emitter:
    """The courier's way to the token logs."""

    def __init__(self, *, model: str, worker: str, tokens: TokenLog, metrics: Metrics) -> None:
        self._model = model
        self._worker = worker
        self._tokens = tokens
        self._metrics = metrics
        self._failing_since: float | None = None  # monotonic s

    @property
    def is_delayed(self) -> bool:
        """True when the last flush failed: another is due."""
        return self._failing_since is not None

    @property
    def is_impatient(self) -> bool:
        """True when Redis has been away for so long that results no longer wait for it."""
        since = self._failing_since
        return since is not None and time.monotonic() - since > PATIENCE_S

    def log(
        self,
        jobs: Iterable[RunningJob],
        made_at: float,  # monotonic s, of the engine's last frame
    ) -> list[tuple[RunningJob, Append | Overlap]]:
        """Append and publish the jobs' new tokens; return those whose log did not take them all."""
        pending = [(job, chunk) for job in jobs if (chunk := job.chunk()) is not None]
        for job, _ in pending:
            job.stamps.made(made_at)
        if not pending:
            self._failing_since = None
            return []
        try:
            with self._metrics.flush_seconds.time():
                pairs = [(job.spec.tenant, chunk) for job, chunk in pending]
                states = self._tokens.append(self._model, pairs)
        except Unavailable as error:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                log.event(
                    "flush.delayed", level=logging.WARNING, worker=self._worker, code=error.code
                )
            return []
        self._failing_since = None
        refused: list[tuple[RunningJob, Append | Overlap]] = []
        for (job, chunk), state in zip(pending, states, strict=True):
            if state in (Append.LOGGED, Append.REPEATED):
                self._logged(job, chunk.next)
                continue
            if isinstance(state, Overlap):
                self._logged(job, state.next)
            elif state is Append.STALE:
                self._metrics.refused("log")
            refused.append((job, state))
        return refused

    def _logged(self, job: RunningJob, next_index: int) -> None:
        self._metrics.tokens.inc(next_index - job.num_logged)
        job.num_logged = next_index
