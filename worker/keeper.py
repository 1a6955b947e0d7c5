"""Leases and heartbeat: what must go on whatever the engine and the other threads do.

Every third of the lease the leases of all held jobs are renewed in one call. Its answer also brings
what was missed: a cancellation whose message was lost, a newer attempt elsewhere, a Redis that has
forgotten the job (the loop restores it from memory). Whoever knows that messages may have been
missed lets it happen at once (`renew_now`): a third of a lease is long for a cancellation.

Called by: lifecycle, as a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from headrace.contract import log
from headrace.contract.errors import Unavailable
from headrace.contract.streams import JobStreams, Workers
from headrace.contract.wire import WorkerBeat
from headrace.worker.held import Held

#: Seconds between heartbeats; one lives for three of them.
BEAT_S = 1.0


class Keeper:
    """The renewing thread of a worker."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        lease_s: float,
        streams: JobStreams,
        workers: Workers,
        held: Held,
        beat: Callable[[], WorkerBeat],
        tell: Callable[[str, str, int], None],  # state, job, attempt
        redis_was_away: Callable[[], None],
    ) -> None:
        self._model = model
        self._worker = worker
        self._lease_s = lease_s
        self._streams = streams
        self._workers = workers
        self._held = held
        self._beat = beat
        self._tell = tell
        self._redis_was_away = redis_was_away
        self._is_stopped, self._is_due = False, False
        self._bell = threading.Event()

    def stop(self) -> None:
        self._is_stopped = True
        self._bell.set()

    def renew_now(self) -> None:
        """Renew before it is due."""
        self._is_due = True
        self._bell.set()

    def run(self) -> None:
        """Beat and renew until stopped; then leave the list of workers."""
        renew_at = 0.0
        pause_s = min(BEAT_S, self._lease_s / 3)
        while not self._is_stopped:
            try:
                self._workers.beat(self._beat(), lifetime_ms=int(BEAT_S * 3000))
                if self._is_due or time.monotonic() >= renew_at:
                    self._is_due = False
                    self._renew()
                    renew_at = time.monotonic() + self._lease_s / 3
            except Unavailable as error:
                self._redis_was_away()
                log.event(
                    "lease.delayed", level=logging.WARNING, worker=self._worker, code=error.code
                )
            self._bell.wait(pause_s)
            self._bell.clear()  # before the flags are read, which are set before it rings
        try:
            self._workers.leave(self._worker)
        except Unavailable:
            log.event("worker.left", worker=self._worker, redis="away")

    def _renew(self) -> None:
        held = self._held.pairs()
        states = self._streams.renew(self._model, self._worker, held)
        for (job, attempt), state in zip(held, states, strict=True):
            if state != "held":
                self._tell(state, job, attempt)
