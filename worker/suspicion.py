"""What a worker does about jobs that may have killed an engine: two ways into contract/crashes.py.

- A job that was picked up (`may_run`). Its row may know of a suspicion that its entry does not,
  because Redis was away when it was handed back: then it goes among the suspects, and is not run
  here. And the attempt before may have ended in silence, with its whole worker: a loss is noted,
  and after the third without a token it goes there too, or is dead.
- All jobs in hand when the engine died (`judge`, for inquests).

In the common path, an entry and a row that agree and an attempt that ended well, this costs
nothing.

Invariants:
1. What Postgres could not be told of (inquests.py keeps it while the worker lives) is a death that
   blames nobody: the jobs run again as before.
2. A job that is dead here still has to be told of: whoever has it gives it to `endings`, whose
   result Postgres knows already.

Called by: intake (may_run), inquests (judge), hand_back (put_back, is_dead).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from headrace.contract import log
from headrace.contract.crashes import WORKER_LOST, Crashes, InHand, Judged, Verdict
from headrace.contract.errors import Unavailable
from headrace.contract.ledger import Ledger, PickUp
from headrace.contract.streams import JobStreams
from headrace.contract.wire import FinishReason, JobStatus
from headrace.worker.evidence import Evidence
from headrace.worker.metrics import Metrics
from headrace.worker.running import RunningJob


class Suspicion:
    """One worker's side of the crashes."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        crashes: Crashes,
        ledger: Ledger,
        streams: JobStreams,
        metrics: Metrics,
    ) -> None:
        self._model = model
        self._worker = worker
        self._crashes = crashes
        self._ledger = ledger
        self._streams = streams
        self._metrics = metrics

    def may_run(self, job: RunningJob, pickup: PickUp) -> bool:
        """Say whether a job that was picked up runs here; if not it was put back, or is lost.

        A job that is dead may be delivered: it has an ending.
        """
        is_among_others = pickup.suspect > job.claim.suspect
        if not pickup.was_lost and not is_among_others:
            return True
        try:
            if pickup.was_lost:
                judged = self._crashes.found_lost(_in_hand(job), self._worker)
                if judged.verdict is Verdict.DEAD:
                    self.is_dead(job, judged, WORKER_LOST)
                    return True
                if judged.verdict is not Verdict.RELEASED:
                    self.put_back(job, judged)
                    return False
            if is_among_others and self._ledger.hand_back(job.job, job.attempt):
                self.put_back(job, Judged(Verdict.SUSPECTED, pickup.suspect))
        except Unavailable as error:
            log.event(
                "suspicion.delayed",
                level=logging.WARNING,
                job=job.job,
                worker=self._worker,
                code=error.code,
            )
        return not is_among_others

    def judge(
        self, jobs: Sequence[RunningJob], evidence: Evidence, *, was_alone: bool
    ) -> dict[str, Judged]:
        """Write down a death with these jobs in hand; raises Unavailable."""
        return self._crashes.record(
            [_in_hand(job) for job in jobs],
            self._worker,
            evidence.signature,
            evidence.detail,
            is_certain=evidence.is_certain,
            was_alone=was_alone,
        )

    def put_back(self, job: RunningJob, judged: Judged) -> None:
        """Let a job wait for its next run, among the suspects where it is one."""
        if judged.verdict is not Verdict.STALE:
            self._streams.hand_back(self._model, job.job, job.attempt, suspect=judged.suspect)
        log.event(
            "job.suspected" if judged.suspect else "job.handed_back",
            job=job.job,
            worker=self._worker,
            verdict=judged.verdict,
            suspect=judged.suspect,
        )

    def is_dead(self, job: RunningJob, judged: Judged, signature: str) -> None:
        """Give a dead job its ending, as Postgres has it."""
        job.ending = judged.ending
        self._metrics.dead_letters.inc()
        log.event(
            "job.dead_lettered",
            level=logging.ERROR,
            job=job.job,
            worker=self._worker,
            attempt=job.attempt,
            signature=signature,
        )


def _in_hand(job: RunningJob) -> InHand:
    return InHand(
        job=job.job,
        attempt=job.attempt,
        num_logged=job.num_logged,
        if_dead=job.ending_now(JobStatus.FAILED, FinishReason.ERROR),
        timings=job.timings(),
    )
