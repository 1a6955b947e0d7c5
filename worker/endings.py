"""Commit how jobs ended, then tell: result row first, then end record and publish, then ack.

The order is the guarantee. A worker that dies before the commit leaves a leased entry: the job is
taken over. One that dies after it leaves an entry whose job has ended: whoever claims it sees that
in Postgres and drops it; the sweeper adds the end record. Each step may be repeated.

Called by: the courier's loop (`put`), lifecycle (as a thread of its own).
"""

from __future__ import annotations

import logging
import queue
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from headrace.contract import log
from headrace.contract.errors import Unavailable
from headrace.contract.ledger import Finish, Ledger
from headrace.contract.streams import JobStreams
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import JobStatus
from headrace.worker.held import Held
from headrace.worker.latencies import Latencies
from headrace.worker.metrics import Metrics
from headrace.worker.running import RunningJob
from headrace.worker.spans import JobSpans

#: Error code of a job whose result Postgres refuses for what it holds.
UNSTORABLE = "result_unstorable"
#: Seconds between attempts while Postgres or Redis is away; the lease is renewed meanwhile.
RETRY_S = 0.25


class Endings:
    """The thread that commits endings, in the order they came."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        ledger: Ledger,
        tokens: TokenLog,
        streams: JobStreams,
        held: Held,
        metrics: Metrics,
        latencies: Latencies,
        spans: JobSpans,
    ) -> None:
        self._model = model
        self._worker = worker
        self._ledger = ledger
        self._tokens = tokens
        self._streams = streams
        self._held = held
        self._metrics = metrics
        self._latencies = latencies
        self._spans = spans
        self._queue: queue.SimpleQueue[RunningJob | None] = queue.SimpleQueue()
        self._give_up = threading.Event()
        self._num_open = 0
        self._lock = threading.Lock()

    def put(self, job: RunningJob) -> None:
        """Hand over a job whose `ending` is decided and whose tokens are logged."""
        with self._lock:
            self._num_open += 1
        self._queue.put(job)

    @property
    def num_open(self) -> int:
        return self._num_open

    def stop(self) -> None:
        """Let `run` return after what it has in hand; what cannot be committed is left leased."""
        self._give_up.set()
        self._queue.put(None)

    def run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._end(job)
            finally:
                self._held.remove(job.job, job.attempt)
                with self._lock:
                    self._num_open -= 1

    def _end(self, job: RunningJob) -> None:
        ending = job.ending
        if ending is None:
            raise RuntimeError(f"{job.job} was handed over without an ending")
        finish: Finish | None = None
        while finish is None:
            try:
                finish = self._ledger.finish(job.job, job.attempt, ending, job.timings())
                job.stamps.committed_at = time.monotonic()
            except Unavailable as error:
                if self._wait(job, error):
                    return
            except SQLAlchemyError as error:
                # Postgres refuses this very result: the job fails, the worker and the others go on.
                log.failure("result.unstorable", error, job=job.job, worker=self._worker)
                if ending.error_code == UNSTORABLE:
                    return
                ending = job.fail(UNSTORABLE, "the result could not be stored: report this job")
        if finish is Finish.STALE:
            self._metrics.refused("result")
            log.event("result.refused", job=job.job, worker=self._worker, attempt=job.attempt)
            return
        log.event(
            "job.ended",
            job=job.job,
            worker=self._worker,
            attempt=job.attempt,
            status=ending.status,
            reason=ending.finish_reason,
            tokens=len(ending.token_ids),
            code=ending.error_code,
        )
        self._metrics.ended(job, ending.status, ending.finish_reason)
        self._spans.ended(job, ending.status, ending.error_code)
        if ending.status is JobStatus.SUCCEEDED:
            self._latencies.succeeded(job.job)
        while True:
            try:
                self._tokens.end(self._model, [job.end_record()])
                self._streams.finish(self._model, [(job.job, "")])  # restored ones have a new entry
                break
            except Unavailable as error:
                if self._wait(job, error):
                    break

    def _wait(self, job: RunningJob, error: Unavailable) -> bool:
        """Wait before the next try; True when the worker is stopping and gives up."""
        log.event(
            "ending.delayed",
            level=logging.WARNING,
            job=job.job,
            worker=self._worker,
            code=error.code,
        )
        return self._give_up.wait(RETRY_S)
