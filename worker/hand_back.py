"""Return all jobs in hand to the queue, so that any worker goes on with them at once.

When the engine died of itself, the jobs it had are judged first (inquests.py): they go among the
suspects, or are dead and go to the endings.

The row first, then the entry: between the two the job is queued by its row and still leased, and
whoever claims it when the lease runs out picks it up as usual. What the engine made is logged
before (courier.take_all), so the next attempt goes on after it and no stream has a gap.

Called by: lifecycle (stop, an order), engine_watch (the engine died), in the main thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from headrace.contract import log
from headrace.contract.crashes import Judged, Verdict
from headrace.contract.errors import Unavailable
from headrace.contract.ledger import Ledger
from headrace.contract.streams import JobStreams
from headrace.worker.courier import Courier
from headrace.worker.endings import Endings
from headrace.worker.evidence import Evidence
from headrace.worker.held import Held
from headrace.worker.inquests import Death, Inquests
from headrace.worker.running import RunningJob
from headrace.worker.spans import JobSpans
from headrace.worker.suspicion import Suspicion


class HandBack:
    """The way back of one worker's jobs."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        courier: Courier,
        endings: Endings,
        suspicion: Suspicion,
        ledger: Ledger,
        streams: JobStreams,
        held: Held,
        spans: JobSpans,
    ) -> None:
        self._model = model
        self._worker = worker
        self._courier = courier
        self._endings = endings
        self._suspicion = suspicion
        self._ledger = ledger
        self._streams = streams
        self._held = held
        self._spans = spans
        self.inquests = Inquests(
            worker=worker, suspicion=suspicion, settle=self._settle_all, give_up=self._give_up
        )

    def all(self, why: str) -> None:
        """Hand every running job back; the next claim of any worker takes it first."""
        self._return(self._courier.take_all(), why)

    def after_death(self, evidence: Evidence, in_engine: frozenset[str]) -> None:
        """Hand every running job back; those that the engine had are judged by its death."""
        jobs = self._courier.take_all()
        judged = tuple(job for job in jobs if job.job in in_engine)
        self._return([job for job in jobs if job.job not in in_engine], "engine died")
        if judged:
            self.inquests.open(Death(judged, evidence, was_alone=len(in_engine) == 1))

    def _settle_all(self, death: Death, verdicts: Mapping[str, Judged]) -> None:
        for job in death.jobs:
            self._settle(job, verdicts[job.job], death.evidence)

    def _give_up(self, death: Death, error: Unavailable) -> None:
        for job in death.jobs:  # their leases run out: a loss, of which nobody is to blame
            self._failed(job, error)

    def _settle(self, job: RunningJob, judged: Judged, evidence: Evidence) -> None:
        """Do with one job as it was judged."""
        if judged.verdict is Verdict.DEAD:
            self._suspicion.is_dead(job, judged, evidence.signature)
            self._endings.put(job)  # which tells of it, and lets the lease go
            return
        job.stamps.committed_at = time.monotonic()
        self._spans.ended(job, "crashed" if evidence.is_certain else "lost", evidence.signature)
        try:
            self._suspicion.put_back(job, judged)
        except Unavailable as error:  # its row is queued: the next pickup finds what it is
            self._failed(job, error)
        self._held.remove(job.job, job.attempt)

    def _return(self, jobs: Sequence[RunningJob], why: str) -> None:
        """Hand jobs back in good order.

        Once a store is found away the leases of the rest run out instead: the loop must not wait
        for it job by job.
        """
        away: Unavailable | None = None
        for job in jobs:
            try:
                if away is None and self._ledger.hand_back(job.job, job.attempt, job.timings()):
                    job.stamps.committed_at = time.monotonic()
                    self._spans.ended(job, "handed_back")
                    self._streams.hand_back(self._model, job.job, job.attempt)
            except Unavailable as error:
                away = error
            if away is None:
                log.event("job.handed_back", job=job.job, worker=self._worker, reason=why)
                self._held.remove(job.job, job.attempt)
            else:
                self._failed(job, away)

    def _failed(self, job: RunningJob, away: Unavailable) -> None:
        log.event(
            "handback.failed",
            level=logging.WARNING,
            job=job.job,
            worker=self._worker,
            code=away.code,
        )
        self._held.remove(job.job, job.attempt)
