"""Scenarios in which our own programs die or are restarted: workers, engines, gateways.

A kill waits for a target that is ready and, for a worker, has jobs in its hands, as `started`
events say: a kill of something idle proves nothing. What was killed is started again by the stage
at once, in the background, so that several are down at a time when kills come fast.

Called by: scenario.all_scenarios, scenarios_soak (FAULTS).
"""

from __future__ import annotations

import itertools
import signal

import msgspec

from headrace.tests.faults.record import Asked, now_s
from headrace.tests.faults.scenario import FaultAction, Rules, Run, Scenario
from headrace.worker.engine.stub import Poison

LEASE_S = 2.0
#: Streams that are open when a gateway is killed, in a run of many jobs.
NUM_STREAMS = 1000
#: Seconds a kill waits for a worker that is ready and busy, before it takes any that is ready.
BUSY_S = 10.0


async def calm(run: Run) -> None:
    """Run the load and nothing else: what a checker says of a fleet that nobody hurts."""
    await run.load()
    await run.until_done()


# -- workers ---------------------------------------------------------------------------------


async def busy_worker(run: Run) -> str:
    """Wait for a worker that is ready and works on a job, and another ready one; return its name.

    One that can take over is there when the fault strikes: what is measured is how long that takes,
    not how long a worker takes to start on this machine.
    """
    stage, clients = run.stage, run.clients
    wanted = min(2, len(stage.workers))

    def busy() -> list[str]:
        at_work = {each.worker for each in clients.followed.values()}
        return [name for name in stage.ready_workers() if name in at_work]

    def has_choice() -> bool:
        return len(stage.ready_workers()) >= wanted

    await stage.until(has_choice, "another worker is ready")
    deadline_s = min(now_s() + BUSY_S, run.deadline_s)
    if await clients.until(lambda: has_choice() and bool(busy()), deadline_s):
        return run.random.choice(busy())
    await stage.until(has_choice, "another worker is ready")
    return run.random.choice(stage.ready_workers())


async def kill_courier(run: Run) -> None:
    name = await busy_worker(run)
    run.stage.kill(name)
    run.fault("kill-courier", name)


async def kill_engine(run: Run) -> None:
    name = await busy_worker(run)
    if run.stage.kill_engine(name):
        run.fault("kill-engine", name)


async def kill_both(run: Run) -> None:
    name = await busy_worker(run)
    run.stage.kill_all_of(name)
    run.fault("kill-worker", name)


async def stop_courier_awhile(run: Run) -> None:
    """Stop a courier for longer than its lease, then let it go on: what it writes is too late."""
    name = await busy_worker(run)
    process = run.stage.processes[name]
    process.send_signal(signal.SIGSTOP)
    run.fault("stop-courier", name)
    await run.clients.until(lambda: False, min(now_s() + 1.5 * LEASE_S, run.deadline_s))
    process.send_signal(signal.SIGCONT)


KILLS: tuple[FaultAction, ...] = (kill_courier, kill_engine, kill_both)


async def worker_kill(run: Run) -> None:
    async def kills() -> None:
        async for number in run.faults_due():
            await KILLS[number % len(KILLS)](run)

    await run.beside(run.load(), kills())
    await run.until_done()


async def frozen_worker(run: Run) -> None:
    async def freezes() -> None:
        async for _ in run.faults_due():
            await stop_courier_awhile(run)

    await run.beside(run.load(), freezes())
    await run.until_done()


# -- gateways --------------------------------------------------------------------------------


async def kill_gateway(run: Run) -> None:
    """Kill a gateway and all its processes while another one is ready to take its clients."""
    stage = run.stage
    wanted = min(2, len(stage.gateways))

    def ready() -> list[str]:
        return [name for name in stage.gateways if stage.programs[name].is_ready]

    await stage.until(lambda: len(ready()) >= wanted, "another gateway is ready")
    name = run.random.choice(ready())
    num_open = run.clients.num_open
    stage.kill_all_of(name)
    run.fault("kill-gateway", name, streams_open=num_open)


async def until_many_are_open(run: Run) -> None:
    """Wait a while until those that the last kill cut off are back; not when no more will come."""
    clients = run.clients
    wanted = 0 if run.is_slice else min(NUM_STREAMS, run.num_jobs // 2)
    await clients.until(
        lambda: clients.num_open >= wanted or clients.num_asked >= run.num_jobs,
        min(now_s() + BUSY_S, run.deadline_s),
    )


async def gateway_kill(run: Run) -> None:
    async def kills() -> None:
        async for _ in run.faults_due():
            await until_many_are_open(run)
            await kill_gateway(run)

    load = run.load(tokens=(5, 30) if run.is_slice else (20, 80))
    await run.beside(load, kills())
    await run.until_done()


# -- restarts in good order ------------------------------------------------------------------


async def restart_one(run: Run) -> None:
    """Restart a worker or a gateway by SIGTERM; it must end with status 0."""
    stage = run.stage
    names = [*stage.workers, *stage.gateways]
    name = names[run.num_faults_done % len(names)]
    run.fault("restart", name)
    await stage.until(lambda: stage.programs[name].is_ready, f"{name} is ready")
    status = await stage.restart(name)
    if status != 0:
        run.note("surprise", f"{name} ended with {status} after SIGTERM")


async def rolling_restart(run: Run) -> None:
    async def restarts() -> None:
        async for _ in run.faults_due():
            await restart_one(run)

    await run.beside(run.load(tokens=(20, 120)), restarts())
    await run.until_done()


# -- poison ----------------------------------------------------------------------------------

#: Certain ways to die, as HEADRACE_STUB_POISON knows them (worker/engine/stub.py). A kill
#: by the OOM killer is not among them: it takes a limited cgroup of one's own
#: (tests/worker/test_evidence.py reads the counters of played ones).
KINDS = (
    Poison.SEGFAULT,
    Poison.BUS,
    Poison.FPE,
    Poison.ILL,
    Poison.ABORT,
    Poison.RAISE,
    Poison.MEMORY,
    Poison.EXIT,
    Poison.STALL,
    Poison.HANG,
)
POISON_ID = 40_000  # no id of PROMPT_IDS
#: One job in so many is poison, but never fewer than three of a run.
POISON_EVERY = 500


async def poison(run: Run) -> None:
    """Poison in random places of the load: all of it must be found, and nothing else."""
    num_poison = max(3, run.num_jobs // POISON_EVERY)
    places = set(run.random.sample(range(run.num_jobs), num_poison))
    numbers = itertools.count()

    def spoil(asked: Asked) -> Asked:
        if next(numbers) not in places:
            return asked
        kind = KINDS[run.num_faults_done % len(KINDS)]
        dies_at = run.random.randrange(asked.num_tokens)
        run.fault("poison", asked.key, kind=kind.name.lower(), dies_at=dies_at)
        at = run.random.randint(0, len(asked.prompt))
        prompt = [*asked.prompt[:at], POISON_ID, int(kind), dies_at, *asked.prompt[at:]]
        return msgspec.structs.replace(asked, prompt=prompt, poison=kind.name.lower())

    await run.load(make=spoil)
    await run.until_done()


#: What a soak mixes in, of this file.
FAULTS: dict[str, FaultAction] = {
    "kill-courier": kill_courier,
    "kill-engine": kill_engine,
    "kill-worker": kill_both,
    "stop-courier": stop_courier_awhile,
    "kill-gateway": kill_gateway,
    "restart": restart_one,
}

SCENARIOS = [
    Scenario(
        name="calm",
        what="no fault: load and checker alone",
        jobs=2000,
        faults=0,
        slice_jobs=40,
        slice_faults=0,
        run=calm,
        num_workers=2,
    ),
    Scenario(
        name="worker-kill",
        what="kill -9 of couriers, engines and both in mid-decode",
        jobs=10_000,
        faults=300,
        slice_jobs=60,
        slice_faults=4,
        run=worker_kill,
        rules=Rules(max_resume_s=LEASE_S + 5, needs_takeovers=True),
        slice_rules=Rules(needs_takeovers=True),
    ),
    Scenario(
        name="worker-freeze",
        what="a courier stands still for longer than its lease, then writes",
        jobs=2_000,
        faults=60,
        slice_jobs=40,
        slice_faults=2,
        run=frozen_worker,
        rules=Rules(needs_takeovers=True),
    ),
    Scenario(
        name="gateway-kill",
        what="kill -9 of gateways with 1,000 streams open",
        jobs=10_000,
        faults=200,
        slice_jobs=80,
        slice_faults=4,
        run=gateway_kill,
        # Some 13 jobs a second are done, and the other streams wait for their turn: the load lasts
        # as long as 200 gateways need to start again. Those above 1,000 are the ones that come.
        settings={"HEADRACE_STUB_STEP_MS": "100", "HEADRACE_MAX_NUM_SEQS": "32"},
        num_workers=2,
        num_gateways=3,
        in_flight=1100,
        keeps_load=True,
    ),
    Scenario(
        name="rolling-restart",
        what="SIGTERM to workers and gateways in turn under load: 0 failed",
        jobs=5_000,
        faults=60,
        slice_jobs=80,
        slice_faults=4,
        run=rolling_restart,
        settings={"HEADRACE_DRAIN_S": "1"},
        num_workers=3,
        num_gateways=2,
    ),
    Scenario(
        name="poison",
        what="1 job in 500 kills its engine: all of those are found, and no other",
        jobs=10_000,
        faults=20,
        slice_jobs=40,
        slice_faults=3,
        run=poison,
        rules=Rules(needs_takeovers=True),
        settings={"HEADRACE_STUB_POISON": str(POISON_ID), "HEADRACE_STEP_TIMEOUT_S": "3"},
    ),
]
