"""Deaths of the engine that are not written down yet: kept in memory until they can be judged.

    open -> written   at once; or later, when what it waited for has come:
                      Postgres, which was away
                      the next engine's own job (worker/engine/canary.py), where a job would be dead

Whether an engine is broken in itself shows at the next one's start: it does its own job before it
serves. So a job that died alone for the last time stays here until then. If the next engine dies
too, before it serves, the death proves nothing against the job: it is a loss, as of a worker.

Invariants:
1. A job is dead only after an engine died of it alone, and the next one of that worker was sane.
2. While a death is open its jobs stay leased (`Held`), so no one runs them before it is written.
3. Deaths are written in the order in which they happened.
4. What is here is lost with the courier, and with `close`: then the leases run out, and the jobs
   are found lost, which blames nobody.

Called by: hand_back (opens), engine_watch (says how the next engine does), lifecycle (runs it as a
thread, so that no store that is away holds up the loop).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from headrace.contract import log
from headrace.contract.crashes import ALONE, Judged
from headrace.contract.errors import Unavailable
from headrace.worker.evidence import Evidence
from headrace.worker.running import RunningJob
from headrace.worker.suspicion import Suspicion

#: Seconds between two tries to write a death down.
RETRY_S = 0.25


@dataclass(slots=True)
class Death:
    """An engine's, and the jobs that it had."""

    jobs: tuple[RunningJob, ...]
    evidence: Evidence
    was_alone: bool  # one job was in the engine, and nothing else still on its way out
    awaits_engine: bool = False  # it may make a job dead: the next engine must be sane


class Inquests:
    """The open deaths of one worker."""

    def __init__(
        self,
        *,
        worker: str,
        suspicion: Suspicion,
        settle: Callable[[Death, Mapping[str, Judged]], None],  # do with the jobs as was judged
        give_up: Callable[[Death, Unavailable], None],  # nobody was told
    ) -> None:
        self._worker = worker
        self._suspicion = suspicion
        self._settle = settle
        self._give_up = give_up
        self._open: deque[Death] = deque()
        self._lock = threading.Lock()  # of the writing: one death after the other
        self._bell = threading.Event()
        self._is_closed = False

    @property
    def num_open(self) -> int:
        return len(self._open)

    def open(self, death: Death) -> None:
        """Write a death down now if that can be, else when it can."""
        job = death.jobs[0]
        death.awaits_engine = (
            death.evidence.is_certain and death.was_alone and job.claim.suspect >= ALONE
        )
        self._open.append(death)
        self.turn()
        self._bell.set()

    def next_engine(self, *, is_sane: bool) -> None:
        """Say how the engine does that was started after the last death (or that none will be)."""
        for death in list(self._open):
            if death.awaits_engine and not is_sane:
                death.evidence = replace(death.evidence, is_certain=False)
            death.awaits_engine = False
        self._bell.set()

    def turn(self) -> None:
        """Write down what can be, oldest first; returns at once where another thread does so."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            while self._open and not self._open[0].awaits_engine:
                if not self._write(self._open[0]):
                    return
                self._open.popleft()
        finally:
            self._lock.release()

    def run(self) -> None:
        """Write deaths down as soon as can be, until closed."""
        while not self._is_closed:
            self._bell.wait(RETRY_S if self._open else None)
            self._bell.clear()
            self.turn()

    def close(self) -> None:
        """Try for the last time; no engine comes any more."""
        self._is_closed = True
        self.next_engine(is_sane=False)
        self.turn()

    def _write(self, death: Death) -> bool:
        try:
            verdicts = self._suspicion.judge(death.jobs, death.evidence, was_alone=death.was_alone)
        except Unavailable as error:
            log.event(
                "death.delayed",
                level=logging.WARNING,
                worker=self._worker,
                jobs=len(death.jobs),
                code=error.code,
            )
            if not self._is_closed:
                return False
            self._give_up(death, error)
        else:
            self._settle(death, verdicts)
        return True
