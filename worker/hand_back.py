"""Return all jobs in hand to the queue, so that any worker goes on with them at once.

The row first, then the entry: between the two the job is queued by its row and still leased, and
whoever claims it when the lease runs out picks it up as usual. What the engine made is logged
before (courier.take_all), so the next attempt goes on after it and no stream has a gap.

Called by: lifecycle (stop, an order), engine_watch (the engine died), in the main thread.
"""

from __future__ import annotations

import logging
import time

from headrace.contract import log
from headrace.contract.errors import Unavailable
from headrace.contract.ledger import Ledger
from headrace.contract.streams import JobStreams
from headrace.worker.courier import Courier
from headrace.worker.held import Held
from headrace.worker.spans import JobSpans


class HandBack:
    """The way back of one worker's jobs."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        courier: Courier,
        ledger: Ledger,
        streams: JobStreams,
        held: Held,
        spans: JobSpans,
    ) -> None:
        self._model = model
        self._worker = worker
        self._courier = courier
        self._ledger = ledger
        self._streams = streams
        self._held = held
        self._spans = spans

    def all(self, why: str) -> None:
        """Hand every running job back; the next claim of any worker takes it first.

        Once a store is found away the leases of the rest run out instead: the loop must not wait
        for it job by job.
        """
        away: Unavailable | None = None
        for job in self._courier.take_all():
            try:
                if away is None and self._ledger.hand_back(job.job, job.attempt, job.timings()):
                    job.stamps.committed_at = time.monotonic()
                    self._spans.ended(job, "handed_back")
                    self._streams.hand_back(self._model, job.job, job.attempt)
            except Unavailable as error:
                away = error
            if away is None:
                log.event("job.handed_back", job=job.job, worker=self._worker, reason=why)
            else:
                log.event(
                    "handback.failed",
                    level=logging.WARNING,
                    job=job.job,
                    worker=self._worker,
                    code=away.code,
                )
            self._held.remove(job.job, job.attempt)
