"""The engine's life as the courier sees it: started, watched, ended, started again.

    (none)  -> loading     [start]
    loading -> serving     READY has come (engine_link)
    loading, serving -> (none)   [turn] it ended, or stands still: its jobs are handed back; another
                                 is started after a pause (restarts.py), or never again
    loading, serving -> loading  [replace] an operator ordered it, and nothing is in hand

Invariants:
1. An engine that cannot start the first time is a ConfigurationError: trying again would hide it.
   Once one has served, another that cannot start is a death like others.
2. An ordered replacement is no death: it counts nowhere and needs no pause.
3. While no engine runs nothing stays in hand.

Called by: lifecycle, in the main thread (engine processes end with the thread that started them).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from headrace.contract import log
from headrace.contract.errors import ConfigurationError
from headrace.worker.courier import Courier
from headrace.worker.engine_link import EngineLink
from headrace.worker.frames import Stop
from headrace.worker.metrics import Metrics
from headrace.worker.restarts import Restarts
from headrace.worker.room import Room

#: Seconds the model may take to load.
LOAD_TIMEOUT_S = 900.0


class EngineWatch:
    """Starts one engine after another."""

    def __init__(
        self,
        *,
        worker: str,
        step_timeout_s: float,
        link: EngineLink,
        courier: Courier,
        room: Room,
        metrics: Metrics,
        hand_back: Callable[[str], None],  # every job in hand, and why
    ) -> None:
        self._worker = worker
        self._step_timeout_s = step_timeout_s
        self._link = link
        self._courier = courier
        self._room = room
        self._metrics = metrics
        self._hand_back = hand_back
        self._restarts = Restarts()
        self._has_served = False
        self.broken: str | None = None  # why no engine is started any more
        self.died_ms = 0  # Unix time of the last death; 0 = none died
        self.gpu = ""  # UUID of the device that engines of this worker run on, once known

    @property
    def num_deaths(self) -> int:
        return self._restarts.num_deaths

    def start(self) -> None:
        self._link.start()
        self._courier.fatal = None
        log.event("engine.started", worker=self._worker, pid=self._link.pid)

    def replace(self) -> None:
        """End the engine in good order and start another; nothing may be in hand."""
        if self._link.is_started:
            pid = self._link.pid
            self._link.send(Stop())
            self._room.closed()
            self._link.end()
            log.event("engine.ended", worker=self._worker, pid=pid, why="ordered")
        self.start()

    def turn(self, is_alive: bool, *, may_start: bool) -> None:
        """Look after the engine once; `is_alive` is what the courier's turn found."""
        now = time.monotonic()
        if not self._link.is_started:
            if self._courier.num_jobs:  # claimed before the engine died, delivered after
                self._hand_back("no engine")
            if now >= self._restarts.next_at and may_start:
                self.start()
            return
        if (ready := self._link.ready) is not None:
            self._has_served, self.gpu = True, ready.gpu
        limit_s = self._step_timeout_s if ready else LOAD_TIMEOUT_S
        if is_alive and not self._courier.num_jobs and ready:
            self._link.last_frame_at = now  # an idle engine is silent
        if not is_alive or now - self._link.last_frame_at > limit_s:
            self._died("stuck" if is_alive else "ended")

    def _died(self, why: str) -> None:
        fatal, was_ready = self._courier.fatal, self._link.ready is not None
        now = time.monotonic()
        served_s = now - self._link.ready_at if was_ready else 0.0
        status = self._link.end()
        self._room.closed()
        self.died_ms = int(time.time() * 1000)
        text = fatal.text if fatal else f"status {status}"
        log.event("engine.died", level=logging.ERROR, worker=self._worker, why=why, text=text)
        self._hand_back("engine died")
        if not self._has_served and self._restarts.num_deaths == 0:
            raise ConfigurationError(f"the engine cannot start: {text}")
        if self._restarts.died(fatal and fatal.code, served_s, now):
            self._metrics.engine_restarts.inc()
        else:
            self.broken = f"the engine died twice of what a restart does not cure: {text}"
