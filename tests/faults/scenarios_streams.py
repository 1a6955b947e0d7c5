"""Scenarios of cancels that race everything, and of subscribers that do not read.

`cancel-race`: each job is drawn a moment at which it is canceled: at once (against its pickup), in
mid-decode, near its last token (against its finish), or while the worker that had it is dead
(against the takeover); some are left alone. The checker asserts one ending that stream and row
agree on. How long a slot stays taken is measured from the cancel's answer to the `canceled` event:
the courier sends the engine its order before it logs the end, and the engine obeys at its next
step, so the slot is free by then. Jobs that a killed worker had, by the rows of their attempts, are
not in the figure: their slot died with it, and their end waits for the lease.

`slow-subscribers`: as many listeners as jobs were asked for, on a few running jobs, in rounds
without and with some that do not read: half hold a stream of a running job, half ask for the whole
output of a job that has ended. The delay of an event is from the frame that Redis published to the
bytes at a listener, both by this process's clock. Listeners are not recorded (the checker follows
each job by one of its own), but each checks that its indexes are contiguous.

Called by: scenario.all_scenarios.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.tests.faults.audience import Audience, memory_bytes
from headrace.tests.faults.clients import Followed
from headrace.tests.faults.figures import quantile
from headrace.tests.faults.heard import Heard, heard
from headrace.tests.faults.record import Asked, now_s
from headrace.tests.faults.scenario import Run, Scenario
from headrace.tests.faults.store_faults import StoreFaults

#: Jobs from which on a figure in seconds is judged, not only noted: a slice in CI is not timed.
JUDGED_JOBS = 1000
#: Seconds in which a slot must be free, p99.
SLOT_FREE_S = 1.0
STEP_S = 0.015
LEASE_S = 2.0


# -- cancel-race -----------------------------------------------------------------------------


@dataclass
class CancelRace:
    """Cancels jobs as they come, and remembers when each cancel was answered."""

    run: Run
    said: Heard
    answered_s: dict[str, float] = field(default_factory=dict)
    disturbed: set[str] = field(default_factory=set)  # their worker was killed, as clients saw it
    kills: list[tuple[str, float]] = field(default_factory=list)  # worker, Unix s
    _met: set[str] = field(default_factory=set)

    async def cancel_jobs(self) -> None:
        """Draw a moment for each job that is accepted, until nothing runs any more."""
        clients = self.run.clients
        async with asyncio.TaskGroup() as group:
            while not clients.is_all_done and now_s() < self.run.deadline_s:
                for job, subscriber in list(clients.followed.items()):
                    if job not in self._met:
                        self._met.add(job)
                        group.create_task(self._race(subscriber))
                await asyncio.sleep(0.005)

    async def _race(self, subscriber: Followed) -> None:
        num_tokens = self.said.num_tokens.get(subscriber.job, 0)
        random = self.run.random
        match random.choice(("pickup", "decode", "finish", "takeover", "none")):
            case "pickup":
                await asyncio.sleep(random.uniform(0, 0.03))
            case "decode":
                await asyncio.sleep(random.uniform(0, num_tokens * STEP_S))
            case "finish":
                last = num_tokens - random.randint(1, 4)
                await self._until(subscriber, lambda: _index(subscriber) >= last)
            case "takeover":
                await self._until(subscriber, lambda: subscriber.job in self.disturbed)
                await asyncio.sleep(random.uniform(0, LEASE_S + 1))
            case _:
                return
        if not subscriber.is_done:
            await self._cancel(subscriber)

    async def _until(self, subscriber: Followed, condition: Callable[[], bool]) -> None:
        while not (subscriber.is_done or condition()) and now_s() < self.run.deadline_s:
            await asyncio.sleep(0.005)

    async def _cancel(self, subscriber: Followed) -> None:
        status = await self.run.clients.cancel(subscriber.job, subscriber.tenant)
        if status in (200, 202):
            self.answered_s[subscriber.job] = now_s()

    async def kill_workers(self) -> None:
        """Kill workers now and then, so that there are takeovers to race."""
        stage = self.run.stage
        async for _ in self.run.faults_due():
            name = self.run.random.choice(stage.ready_workers() or stage.workers)
            followed = self.run.clients.followed
            self.disturbed |= {
                job for job, subscriber in followed.items() if subscriber.worker in ("", name)
            }
            stage.kill_all_of(name)
            self.kills.append((name, time.time()))
            self.run.fault("worker-kill", name)
            await asyncio.sleep(self.run.random.uniform(0, 1))

    async def slot_times_s(self) -> list[float]:
        """Return how long after the cancel's answer the end was told of each job with a slot.

        What clients saw does not say who had one: a worker may die before the first of its jobs'
        events, or before the POST is answered.
        """
        stores, without = StoreFaults(self.run.stage), set[str]()
        for name, at_s in self.kills:
            without.update(await stores.attempted(name, at_s))
        return [
            max(0.0, self.said.canceled_at_s[job] - at_s)
            for job, at_s in self.answered_s.items()
            if job in self.said.canceled_at_s and job not in without
        ]


def _index(subscriber: Followed) -> int:
    return int((subscriber.last_id or "-1").partition(".")[0])


async def cancel_race(run: Run) -> None:
    with heard(run) as said:
        race = CancelRace(run, said)
        await run.beside(run.load(tokens=(5, 80)), race.cancel_jobs(), race.kill_workers())
    times_s = await race.slot_times_s()
    p99_s = quantile(times_s, 0.99)
    run.note("cancels_answered", str(len(race.answered_s)))
    run.note("slots_measured", str(len(times_s)))
    run.note("slot_freed_p99_s", f"{p99_s:.3f}")
    assert race.answered_s, "no cancel was in time: the race was never run"
    assert run.num_jobs < JUDGED_JOBS or p99_s <= SLOT_FREE_S, f"slots were freed in {p99_s:.2f} s"


# -- slow-subscribers ------------------------------------------------------------------------

#: Listeners of one running job.
PER_JOB = 20
#: Share of listeners that do not read.
SLOW_SHARE = 0.02
#: Tokens of the ended job that slow ones ask for: some 400 kB of events.
LONG_TOKENS = 3000
#: How much slower p99 may be with them, and below how many seconds no difference is told.
WORSE = 1.10
RESOLUTION_S = 0.002
#: How much the gateway may grow from the first round with slow ones to the last, bytes.
GROWTH_BYTES = 16 << 20
ROUND_S = (3.0, 75.0)  # a slice's, and a full run's
NUM_ROUNDS = (1, 4)  # pairs of them
#: Seconds a step takes: the listeners are to be measured, not the cores they share with the fleet.
STEPS_S = (0.05, 1.0)
#: Tokens of a running job, in rounds: it outlasts its own, and the coming of its listeners.
ROUND_TOKENS = 4


async def slow_subscribers(run: Run) -> None:
    """Alternate rounds without and with slow subscribers, and compare what the others see."""
    is_full = run.num_jobs >= JUDGED_JOBS
    round_s, num_rounds = ROUND_S[is_full], NUM_ROUNDS[is_full]
    num_slow = max(2, int(run.num_jobs * SLOW_SHARE))
    num_streams = max(1, run.num_jobs // PER_JOB)
    delays: dict[bool, list[float]] = {False: [], True: []}
    memory: list[int] = []
    long, tenant = await one_job(run, LONG_TOKENS)
    step_s = STEPS_S[is_full]
    for name in run.stage.workers:
        run.stage.programs[name].settings["HEADRACE_STUB_STEP_MS"] = str(step_s * 1000)
        await run.stage.restart(name)
    for number in range(2 * num_rounds):
        has_slow = number % 2 == 1
        async with Audience(run, PER_JOB) as audience:
            await audience.begin(num_streams, int(ROUND_TOKENS * round_s / step_s))
            if has_slow:
                run.fault("slow-subscribers", "g0", number=num_slow)
                await audience.add_slow(num_slow, long, tenant)
            delays[has_slow] += await audience.listen(round_s)
            memory.append(memory_bytes(run.stage.processes["g0"].pid))
    judge(run, delays, memory, is_full)


async def one_job(run: Run, num_tokens: int) -> tuple[str, str]:
    """Run one job to its end; return its id and its tenant."""
    asked: list[Asked] = []

    def note(each: Asked) -> Asked:
        asked.append(each)
        return each

    with heard(run) as said:
        await run.load(1, (num_tokens, num_tokens), make=note)
        await run.until_done()
    (job,) = said.num_tokens
    return job, asked[0].tenant


def judge(run: Run, delays: dict[bool, list[float]], memory: list[int], is_full: bool) -> None:
    """Note p99 and memory; fail where they are not what is promised."""
    without_s, with_s = (quantile(delays[has_slow], 0.99) for has_slow in (False, True))
    growth = max(memory[3::2], default=memory[-1]) - memory[1]
    run.note("event_delay_p99_without_s", f"{without_s:.4f}")
    run.note("event_delay_p99_with_s", f"{with_s:.4f}")
    run.note("events_measured", f"{len(delays[False])} + {len(delays[True])}")
    run.note("gateway_mb_after_each_round", " ".join(f"{each / 1e6:.1f}" for each in memory))
    assert delays[False], "no event was measured without slow subscribers"
    assert delays[True], "no event came through beside slow subscribers"
    if is_full:
        assert with_s <= without_s * WORSE + RESOLUTION_S, f"{without_s:.4f} s became {with_s:.4f}"
        assert growth <= GROWTH_BYTES, f"the gateway grew by {growth / 1e6:.1f} MB"


SCENARIOS = [
    Scenario(
        name="cancel-race",
        what="cancels racing pickup, finish and takeover: one ending, slot freed <= 1 s p99",
        jobs=5000,
        faults=60,
        slice_jobs=60,
        slice_faults=2,
        run=cancel_race,
        num_workers=3,
        in_flight=24,
    ),
    Scenario(
        name="slow-subscribers",
        what="2% of subscribers do not read: the others' p99 within 10%, memory flat",
        jobs=5000,
        faults=4,
        slice_jobs=60,
        slice_faults=1,
        run=slow_subscribers,
        settings={"HEADRACE_STUB_STEP_MS": "1", "HEADRACE_MAX_NUM_SEQS": "256"},
        num_workers=1,
    ),
]
