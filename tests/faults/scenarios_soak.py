"""The soak: faults of all kinds, one after another at random, for as long as it is told to.

It ends by time (`--minutes`, or Scenario.minutes), not by jobs, unless it runs as a slice. Memory
of every process is sampled all the while; the slope of those that lived long enough is a figure.

Called by: scenario.all_scenarios.
"""

from __future__ import annotations

import asyncio

from headrace.tests.faults.record import now_s
from headrace.tests.faults.scenario import (
    FaultAction,
    Rules,
    Run,
    Scenario,
    all_fault_actions,
)

#: Seconds between two faults: some strike while the one before is still being healed.
PAUSE_S = (0.5, 6.0)
#: Minutes at full length; the issue asks for an hour at least.
MINUTES = 60.0


async def soak(run: Run) -> None:
    actions = all_fault_actions()
    if run.minutes is None:
        await run.beside(run.load(), _slice_faults(run, actions))
    else:
        end_s = min(now_s() + run.minutes * 60, run.deadline_s)
        await run.beside(run.load_for(run.minutes), _faults_until(run, actions, end_s))
    await run.until_done()


async def _slice_faults(run: Run, actions: dict[str, FaultAction]) -> None:
    async for _ in run.faults_due():
        await _one(run, actions)


async def _faults_until(run: Run, actions: dict[str, FaultAction], end_s: float) -> None:
    while now_s() < end_s:
        await asyncio.sleep(run.random.uniform(*PAUSE_S))
        await _one(run, actions)


async def _one(run: Run, actions: dict[str, FaultAction]) -> None:
    name = run.random.choice(sorted(actions))
    run.note("soak", name)
    await actions[name](run)


SCENARIOS = [
    Scenario(
        name="soak",
        what="faults of all scenarios mixed at random; memory sampled",
        jobs=0,
        faults=0,
        slice_jobs=60,
        slice_faults=4,
        run=soak,
        rules=Rules(),
        num_workers=3,
        num_gateways=2,
        own_doors=True,
        minutes=MINUTES,
        limit_s=900.0,  # beside its minutes: what the last jobs may take
    )
]
