"""What a scenario is, what it is given, and the list of all.

A scenario describes a fleet (settings, how many of what), drives load and faults through a `Run`,
and says by `Rules` what the checker shall allow. It draws everything from `run.random`, so that a
seed repeats its choices (not its timing: that is the machine's).

Called by: campaign, test_campaign, the scenarios_* files.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from headrace.tests.faults.record import Asked, Fault, MayReset, Note, Recorder, now_s

if TYPE_CHECKING:
    from headrace.tests.faults.clients import Clients
    from headrace.tests.faults.stage import Stage

#: What prompts of the stub are made of: no special token, and none that a poison is given.
PROMPT_IDS = range(1000, 30_000)
#: Jobs that are open at least while faults lag behind: a kill needs something to interrupt.
MIN_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class Rules:
    """What the checker allows and measures beside what always holds."""

    may_reset: bool = False  # any stream may say `reset`; else only jobs of a MayReset record
    may_refuse: bool = False  # POSTs may be given up after refusals (503, 429): full disks
    has_other_jobs: bool = False  # jobs that no Asked stands for (fuzzing makes some)
    may_fail: tuple[str, ...] = ()  # error codes that a job may end with
    max_resume_s: float | None = None  # p99 of the silences that faults caused
    max_silence_s: float | None = None  # of a stream that pub/sub faults hit: p99
    min_stale_writes: int = 0  # refused writes that must have been counted in sum
    needs_takeovers: bool = False  # some job must have had a second attempt, or it proved nothing
    vocab_size: int = 49152  # of the model folder whose stub answers


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    what: str  # one line, shown by --list
    jobs: int  # full count of the issue
    faults: int
    slice_jobs: int  # CI
    slice_faults: int
    run: Callable[[Run], Awaitable[None]]
    rules: Rules = field(default_factory=Rules)
    slice_rules: Rules | None = None  # where a loaded CI machine must not be timed
    settings: dict[str, str] = field(default_factory=dict)  # environment of all programs
    num_workers: int = 4
    slice_workers: int = 2  # at most: starting one takes seconds of a core
    num_gateways: int = 1
    in_flight: int = 64  # jobs submitted and not ended at any time
    keeps_load: bool = False  # as many jobs stay open however far the faults lag behind
    own_doors: bool = False  # each worker reaches the stores through a forwarder of its own
    engine: str = "stub"  # stub | model
    limit_s: float = 3600.0  # of the whole run; what has not ended by then is lost
    slice_limit_s: float = 150.0
    wrap: str | None = None  # spec of wrapped.py for the fleet's programs; {seed} is the run's
    wrapped_programs: tuple[str, ...] = ("worker", "gateway", "tasks")
    minutes: float | None = (
        None  # at full length, of a scenario that ends by time; None: by its jobs
    )


@dataclass
class Run:
    """One run of a scenario: all that its code may use."""

    scenario: Scenario
    stage: Stage
    clients: Clients
    recorder: Recorder
    random: random.Random
    num_jobs: int
    num_faults: int
    deadline_s: float  # of now_s()
    minutes: float | None = None
    is_slice: bool = False
    num_faults_done: int = 0
    _num_made: int = 0
    _due: tuple[int, int] | None = None  # the fault that comes next, of how many

    def fault(self, name: str, target: str = "", **detail: str | int | float | bool) -> None:
        """Write down that a fault was done just now."""
        self.num_faults_done += 1
        self.recorder.add(Fault(name, target, now_s(), detail))

    def may_reset(self, jobs: list[str]) -> None:
        for job in jobs:
            self.recorder.add(MayReset(job))

    def note(self, name: str, value: str) -> None:
        self.recorder.add(Note(name, value, now_s()))

    async def load(
        self,
        num_jobs: int | None = None,
        tokens: tuple[int, int] = (5, 80),
        *,
        in_flight: int | None = None,
        make: Callable[[Asked], Asked] = lambda asked: asked,  # changes what is asked
    ) -> None:
        """Submit jobs, `in_flight` at a time, each followed; return when all are accepted."""
        count = self.num_jobs if num_jobs is None else num_jobs
        asked = (make(self.next_asked(tokens)) for _ in range(count))
        places = in_flight or self._usual_places()
        await self.clients.load(asked, lambda: self._places(places))

    def _usual_places(self) -> int:
        # A slice's jobs would all be open at once, and through before its second fault.
        most = self.num_jobs // 4 if self.is_slice else self.num_jobs
        return max(MIN_IN_FLIGHT, min(self.scenario.in_flight, most))

    def _places(self, places: int) -> int:
        """Return how many jobs may be open now: fewer, the further faults lag behind the load.

        A kill waits until a worker is ready again; without this the jobs would be through first.
        """
        if self._due is None or self.scenario.keeps_load:
            return places
        number, count = self._due
        lag = self.clients.num_ended / self.num_jobs * count - number - 1
        return places if lag <= 0 else max(MIN_IN_FLIGHT, int(places / 2 ** (lag + 1)))

    def next_asked(self, tokens: tuple[int, int] = (5, 80)) -> Asked:
        """Draw the next job: its key, tenant, seed and length."""
        self._num_made += 1
        return Asked(
            key=f"{self.scenario.name}-{self._num_made}",
            tenant=self.random.choice(("one", "two")),
            seed=self.random.randrange(1 << 62),
            num_tokens=self.random.randint(*tokens),
            prompt=self.random.choices(PROMPT_IDS, k=self.random.randint(1, 24)),
        )

    async def load_for(self, minutes: float, tokens: tuple[int, int] = (5, 80)) -> None:
        """Submit jobs, as many at a time as the scenario says, until the time is over."""
        end_s = min(now_s() + minutes * 60, self.deadline_s)

        def jobs() -> Iterator[Asked]:
            while now_s() < end_s:
                yield self.next_asked(tokens)

        await self.clients.load(jobs(), lambda: self.scenario.in_flight)

    async def until_done(self) -> None:
        """Wait until every accepted job's stream has ended, or the run's deadline has come."""
        await self.clients.until_done(self.deadline_s)

    async def faults_due(self, num_faults: int | None = None) -> AsyncIterator[int]:
        """Yield once for each fault, spread evenly over the jobs as they end.

        When the load is through, what is left of the faults comes while the last jobs run, and
        ends when none runs: a fault without work proves nothing.
        """
        count = self.num_faults if num_faults is None else num_faults
        try:
            for number in range(count):
                self._due = (number, count)
                due = (number + 0.5) / count * self.num_jobs
                await self.clients.until_ended(due, self.deadline_s)
                if now_s() > self.deadline_s or self.clients.is_all_done:
                    return
                yield number
        finally:
            self._due = None

    async def beside(self, *work: Coroutine[Any, Any, None]) -> None:
        """Run parts side by side (load and faults); the first that fails ends the others."""
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)


#: Does one fault to the fleet of a run and heals it; records it by `run.fault`.
FaultAction = Callable[[Run], Awaitable[None]]


def _files() -> list[ModuleType]:
    """Each file of scenarios has one line here; soak comes last, it uses the others' faults."""
    from headrace.tests.faults import (
        scenarios_input,
        scenarios_model,
        scenarios_soak,
        scenarios_stores,
        scenarios_streams,
        scenarios_wire,
        scenarios_workers,
    )

    return [
        scenarios_workers,
        scenarios_wire,
        scenarios_stores,
        scenarios_streams,
        scenarios_input,
        scenarios_model,
        scenarios_soak,
    ]


def all_scenarios() -> list[Scenario]:
    """Return every scenario: the SCENARIOS of each file."""
    return [each for file in _files() for each in file.SCENARIOS]


def all_fault_actions() -> dict[str, FaultAction]:
    """Return every fault that a soak may mix in: the FAULTS of each file that has some."""
    return {name: action for file in _files() for name, action in _faults(file).items()}


def _faults(file: ModuleType) -> dict[str, FaultAction]:
    return getattr(file, "FAULTS", {})
