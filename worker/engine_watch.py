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
4. Only what the engine had can be blamed for its death (evidence.py says whether it is); a death
   that is blamed on jobs is none of its worker's.
5. Time in which this process itself stood still does not count as the engine's standing still.
6. An engine with work that makes no step for step_timeout_s is dumped, killed and replaced: where
   its threads stood is in the log, whatever held them. One that cannot even be killed ends the
   worker: another on its device would hang as well.
7. READY means sane: the engine has done a job of its own (engine/canary.py). Once one that has
   served is followed by one that dies before it says so, the worker is unsound until one does; it
   takes nothing meanwhile, and starts another after a pause that doubles.

Called by: lifecycle, in the main thread (engine processes end with the thread that started them).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from headrace.contract import log
from headrace.contract.errors import ConfigurationError
from headrace.worker.courier import Courier
from headrace.worker.engine_link import EngineLink
from headrace.worker.evidence import Evidence, OomKills, of_death
from headrace.worker.frames import Stop
from headrace.worker.metrics import Metrics
from headrace.worker.restarts import Restarts
from headrace.worker.room import Room
from headrace.worker.stacks import ThreadStack, kernel_states

#: Seconds the model may take to load.
LOAD_TIMEOUT_S = 900.0
#: Seconds between two turns after which this process stood still itself; a turn takes 0.5 s.
GAP_S = 3.0
#: Seconds between looks at what the kernel killed for lack of memory.
LOOK_S = 1.0


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
        hand_back_dead: Callable[[Evidence, frozenset[str]], None],  # and what the engine had
        next_engine: Callable[[bool], None] = lambda is_sane: None,  # after a death
    ) -> None:
        self._worker = worker
        self._step_timeout_s = step_timeout_s
        self._link = link
        self._courier = courier
        self._room = room
        self._metrics = metrics
        self._hand_back = hand_back
        self._hand_back_dead = hand_back_dead
        self._next_engine = next_engine
        self._is_awaited = False  # READY of the engine that was started last has not been seen
        self._oom_kills = OomKills()
        self._looked_at = self._turned_at = time.monotonic()
        self._restarts = Restarts()
        self._has_served = False
        self.is_unsound = False  # engines of this worker die before they serve
        self.broken: str | None = None  # why no engine is started any more
        self.died_ms = 0  # Unix time of the last death; 0 = none died
        self.gpu = ""  # UUID of the device that engines of this worker run on, once known

    @property
    def num_deaths(self) -> int:
        return self._restarts.num_deaths

    @property
    def step_age_s(self) -> float:
        """Seconds since the engine's last step; 0 while it has no work."""
        if not self._courier.num_jobs or not self._link.is_started:
            return 0.0
        return max(0.0, time.monotonic() - self._link.last_frame_at)

    def start(self) -> None:
        self._link.start()
        self._is_awaited = True
        self._courier.fatal = None
        log.event("engine.started", worker=self._worker, pid=self._link.pid)

    def replace(self) -> None:
        """End the engine in good order and start another; nothing may be in hand."""
        if self._link.is_started:
            pid = self._link.pid
            self._link.send(Stop())
            self._room.closed()
            self._courier.lose_engine()
            self._link.end()
            log.event("engine.ended", worker=self._worker, pid=pid, why="ordered")
        self.start()

    def turn(self, is_alive: bool, *, may_start: bool) -> None:
        """Look after the engine once; `is_alive` is what the courier's turn found."""
        now = time.monotonic()
        self._note_turn(now)
        if not self._link.is_started:
            if self._courier.num_jobs:  # claimed before the engine died, delivered after
                self._hand_back("no engine")
            if not may_start:
                self._next_engine(False)
            elif now >= self._restarts.next_at:
                self.start()
            return
        if (ready := self._link.ready) is not None and self._is_awaited:
            self._is_awaited = self.is_unsound = False
            self._has_served, self.gpu = True, ready.gpu
            self._next_engine(True)
        limit_s = self._step_timeout_s if ready else LOAD_TIMEOUT_S
        if is_alive and not self._courier.num_jobs and ready:
            self._link.last_frame_at = now  # an idle engine is silent
        if not is_alive or now - self._link.last_frame_at > limit_s:
            self._died("stuck" if is_alive else "ended")

    def _note_turn(self, now: float) -> None:
        """Give an engine back the time in which nobody watched it."""
        gap_s = now - self._turned_at
        self._turned_at = now
        if gap_s > GAP_S:
            self._link.last_frame_at = min(now, self._link.last_frame_at + gap_s)
        if now - self._looked_at > LOOK_S:
            self._looked_at = now
            self._oom_kills.look()

    def _died(self, why: str) -> None:
        fatal, was_ready = self._courier.fatal, self._link.ready is not None
        now = time.monotonic()
        served_s = now - self._link.ready_at if was_ready else 0.0
        in_engine = self._courier.lose_engine()
        stacks = self._dump() if why == "stuck" else []
        status = self._link.end(at_once=why == "stuck")
        if why != "stuck":
            stacks = self._link.last_stacks()
            self._tell(stacks, "engine.fell")  # of a signal that C code met
        self._room.closed()
        self.died_ms = int(time.time() * 1000)
        evidence = of_death(
            fatal=fatal,
            status=status,
            is_stalled=why == "stuck",
            num_oom_kills=self._oom_kills.recent(),
            limit_s=self._step_timeout_s,
            stacks=stacks,
        )
        text = fatal.text if fatal else f"status {status}"
        log.event(
            "engine.died",
            level=logging.ERROR,
            worker=self._worker,
            why=why,
            text=text,
            signature=evidence.signature,
            jobs=len(in_engine),
        )
        self._metrics.engine_deaths.labels(
            "certain" if evidence.is_certain and in_engine else "uncertain"
        ).inc()
        if not was_ready:
            self.is_unsound = self._has_served
            self._next_engine(False)
        self._hand_back_dead(evidence, in_engine)
        if self._link.remains is not None:
            self.broken = (
                f"the engine (pid {self._link.remains}) cannot be killed: its device hangs"
            )
            return
        if not self._has_served and self._restarts.num_deaths == 0:
            raise ConfigurationError(f"the engine cannot start: {text}")
        is_of_jobs = evidence.is_certain and bool(in_engine)
        if self._restarts.died(fatal and fatal.code, served_s, now, is_of_jobs=is_of_jobs):
            self._metrics.engine_restarts.inc()
        else:
            self.broken = f"the engine died twice of what a restart does not cure: {text}"

    def _dump(self) -> Sequence[ThreadStack]:
        """Write down where the threads of an engine that stands still are, and return it."""
        pid, age_s = self._link.pid, time.monotonic() - self._link.last_frame_at
        states = [] if pid is None else kernel_states(pid)
        stacks = self._link.ask_stacks()
        log.event(
            "engine.stuck",
            level=logging.ERROR,
            worker=self._worker,
            pid=pid,
            step_age_s=age_s,
            num_jobs=self._courier.num_jobs,
            threads=len(stacks),
            kernel=" ".join(states),
        )
        self._tell(stacks, "engine.stands")
        return stacks

    def _tell(self, stacks: Sequence[ThreadStack], event: str) -> None:
        for stack in stacks:
            log.event(
                event,
                level=logging.ERROR,
                worker=self._worker,
                thread=stack.name,
                frames=str(stack),
            )
