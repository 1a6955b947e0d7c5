"""From the accepted row to the lane: enqueue at once if Redis is there, else leave it to the relay.

The job is committed with an outbox row before this is called. A successful enqueue is confirmed by
deleting that row, in batches, in the background; whatever is not confirmed within a second is
enqueued again by the relay (gateway/tasks), which is harmless (streams invariant 1).

Invariants:
1. Nothing here fails a request: the job is durable already.
2. While Redis is away, one request every RETRY_S tries it; the others do not wait for its timeout.

Called by: gateway/jobs.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue

from sqlalchemy import RowMapping

from headrace.contract import log
from headrace.contract.errors import DatabaseUnavailable, QueueUnavailable
from headrace.contract.ledger import Ledger
from headrace.contract.specs import spec_of
from headrace.contract.streams import JobStreams
from headrace.gateway.metrics import Metrics

#: Seconds after a failure in which jobs go straight to the relay.
RETRY_S = 1.0
#: Seconds confirmations are gathered for: well under the relay's one second.
GATHER_S = 0.05


class Enqueuer:
    """Enqueues accepted jobs and confirms their outbox rows."""

    def __init__(self, ledger: Ledger, streams: JobStreams, metrics: Metrics) -> None:
        self._ledger = ledger
        self._streams = streams
        self._metrics = metrics
        self._retry_at = 0.0  # monotonic
        self._confirmed: SimpleQueue[str | None] = SimpleQueue()  # None: stop
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, row: RowMapping) -> None:
        """Enqueue an accepted job; never raises for a Redis that is away."""
        job = row["id"]
        if time.monotonic() < self._retry_at:
            self._metrics.enqueue_failures.inc()
            return
        try:
            self._streams.enqueue(spec_of(row), row["cost_tokens"])
        except QueueUnavailable as error:
            self._retry_at = time.monotonic() + RETRY_S
            self._metrics.enqueue_failures.inc()
            log.event("job.left_to_relay", level=logging.WARNING, job=job, why=error.detail)
            return
        self.confirm(job)

    def confirm(self, job: str) -> None:
        """Delete the job's outbox row soon: it is enqueued, or need not be."""
        self._confirmed.put(job)
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._closing.is_set():
                    self._thread = threading.Thread(
                        target=self._confirm_in_batches, name="outbox", daemon=True
                    )
                    self._thread.start()

    def close(self) -> None:
        """Confirm what is gathered, and stop."""
        self._closing.set()
        self._confirmed.put(None)
        if self._thread is not None:
            self._thread.join()

    def _confirm_in_batches(self) -> None:
        job = self._confirmed.get()
        while job is not None:
            self._closing.wait(GATHER_S)
            jobs = [job]
            job = ""
            while job is not None and not self._confirmed.empty():
                job = self._confirmed.get()
                if job is not None:
                    jobs.append(job)
            try:
                self._ledger.outbox_done(jobs)
            except DatabaseUnavailable as error:  # the relay enqueues them again: no harm
                log.event("outbox.left", level=logging.WARNING, num=len(jobs), why=error.detail)
            if job is not None:
                job = self._confirmed.get()
