"""Scenarios in which the way between the parts fails: partitions, lost connections, lost answers.

- `partition`: a worker and its Redis cannot reach each other, half of the times for longer than the
  lease: others take its jobs over, and what it writes when the way is open again comes too late.
- `pubsub-kill`: the subscriptions of gateways and workers are cut; what was published meanwhile is
  found in the log.
- `unsure`: operations that are done and say that they failed (unsure.py).
- `repeated-entries`: entries delivered more than once (repeated.py), and stolen.

Called by: scenario.all_scenarios, scenarios_planted (steals, stalls), scenarios_soak (FAULTS).
"""

from __future__ import annotations

import asyncio

import redis.asyncio

from headrace.contract import keys
from headrace.tests.faults.record import now_s
from headrace.tests.faults.scenario import FaultAction, Rules, Run, Scenario
from headrace.tests.fleet.forwarder import Forwarder, Way

LEASE_S = 2.0
#: Seconds a partition of a full run lasts at most, and one of a slice.
LONGEST_S = 60.0
LONGEST_OF_A_SLICE_S = 6.0
#: Jobs from which on a run counts as a full one.
MANY_JOBS = 500
#: Seconds the fault waits for a worker with something in its hands.
BUSY_S = 10.0
#: Within this many seconds a subscriber has what a lost message held.
GAP_S = 2.0


# -- partition -------------------------------------------------------------------------------


def partition_s(run: Run, number: int) -> float:
    """Draw how long a partition lasts: every second one is shorter than a lease."""
    longest_s = LONGEST_S if run.num_jobs >= MANY_JOBS else LONGEST_OF_A_SLICE_S
    if number % 2:
        return run.random.uniform(1.0, LEASE_S)
    # Most a few leases long, some as long as can be.
    return LEASE_S * 1.5 * (longest_s / (LEASE_S * 1.5)) ** run.random.random()


def cut_off(run: Run, door: Forwarder) -> str:
    """Let a way fail, in one of the manners in which networks do; return which."""
    how = run.random.choice(("hold", "hold", "hold", "up", "down", "cut"))
    if how == "cut":
        door.cut()
    else:
        door.hold(*([] if how == "hold" else [Way(how)]))
    return how


async def partition(run: Run, name: str, seconds: float) -> None:
    """Take a worker's Redis away for a while."""
    door = run.stage.redis_doors[name]
    try:
        run.fault("partition", name, seconds=round(seconds, 2), how=cut_off(run, door))
        await asyncio.sleep(seconds)
    finally:
        door.join()


async def busy_worker(run: Run, free: set[str]) -> str:
    """Wait for a worker of `free` with jobs in its hands; after a while take any."""

    def busy() -> list[str]:
        at_work = {each.worker for each in run.clients.followed.values()}
        return sorted(at_work & free & set(run.stage.ready_workers()))

    await run.clients.until(lambda: bool(busy()), min(now_s() + BUSY_S, run.deadline_s))
    return run.random.choice(busy() or sorted(free))


async def partition_one(run: Run) -> None:
    """Partition one worker, and wait until it is over."""
    name = await busy_worker(run, set(run.stage.workers))
    await partition(run, name, partition_s(run, run.random.randrange(2)))


async def partitions(run: Run) -> None:
    """Partition one worker after another, never all at once, each with its share of the load."""
    free = set(run.stage.workers)
    open_partitions: set[asyncio.Task[None]] = set()

    async def while_it_lasts(name: str, seconds: float) -> None:
        await partition(run, name, seconds)
        free.add(name)

    load = asyncio.create_task(run.load(run.num_jobs // run.num_faults, tokens=(40, 200)))
    for number in range(run.num_faults):
        name = await busy_worker(run, free)
        free.discard(name)
        task = asyncio.create_task(while_it_lasts(name, partition_s(run, number)))
        open_partitions.add(task)
        task.add_done_callback(open_partitions.discard)
        await load
        if number + 1 < run.num_faults:
            share = run.num_jobs * (number + 2) // run.num_faults
            share -= run.num_jobs * (number + 1) // run.num_faults
            load = asyncio.create_task(run.load(share, tokens=(40, 200)))
        while len(free) < 2:
            await asyncio.wait(open_partitions, return_when=asyncio.FIRST_COMPLETED)
        if now_s() > run.deadline_s:
            break
    await asyncio.gather(load, *open_partitions)
    await run.until_done()
    await asyncio.sleep(LEASE_S)  # the last worker to come back tries to write, and is refused


# -- pub/sub ---------------------------------------------------------------------------------


async def kill_pubsub(run: Run) -> None:
    """Close every subscribed connection: of gateways (frames) and of workers (wake messages)."""
    async with client_of(run) as client:
        num_killed = int(await client.client_kill_filter(_type="pubsub"))
    run.fault("kill-pubsub", "redis", connections=num_killed, streams_open=run.clients.num_open)


async def pubsub_kill(run: Run) -> None:
    clients = run.clients

    def all_run() -> bool:
        """True once every stream is open and its job has started: the gaps are to be measured."""
        is_open = clients.num_open >= run.num_jobs
        return is_open and all(each.worker for each in clients.followed.values())

    async def kills() -> None:
        await clients.until(
            lambda: all_run() or clients.num_ended > 0 or clients.is_all_done, run.deadline_s
        )
        for _ in range(run.num_faults):
            if run.clients.is_all_done or now_s() > run.deadline_s:
                return
            await kill_pubsub(run)
            await asyncio.sleep(run.random.uniform(0.2, 1.0))

    many = run.num_jobs >= MANY_JOBS
    load = run.load(tokens=(150, 200) if many else (5, 12), in_flight=run.num_jobs)
    await run.beside(load, kills())
    await run.until_done()


# -- lost answers ----------------------------------------------------------------------------


async def only_load(run: Run) -> None:
    """Run the load; the faults are inside the programs, which wrote each to their logs."""
    await run.load(tokens=(5, 40))
    await run.until_done()
    for path in sorted(run.stage.folder.glob("*.log")):
        said = path.read_text(errors="replace")
        for when in ("before", "after"):
            for store in ("redis", "sql"):
                count = sum(
                    f"call={store}." in line and f"when={when}" in line
                    for line in said.splitlines()
                    if line.startswith("fault.unsure")
                )
                if count:
                    run.fault("unsure", path.stem, store=store, when=when, count=count)


# -- repeated entries ------------------------------------------------------------------------


def client_of(run: Run) -> redis.asyncio.Redis:
    """Return a client of the stage's Redis, past every door."""
    return redis.asyncio.Redis.from_url(run.stage.valkey.url)


async def steal(run: Run) -> bool:
    """Take the lease of a running job away from its living worker, as XAUTOCLAIM would.

    The entry looks as if its worker had been silent for long: whoever claims next takes it over.
    """
    model = run.stage.model.name
    seen = [job for job, each in run.clients.followed.items() if each.num_chunks > 2]
    if not seen:
        return False
    job = run.random.choice(seen)
    async with client_of(run) as client:
        lane, entry = await client.hmget(keys.job_hash(model, job), "lane", "entry")
        if lane is None or entry is None:
            return False
        stream = keys.lane_stream(model, lane.decode())
        try:
            taken = await client.xclaim(
                stream, keys.GROUP, "thief", 0, [entry], idle=3_600_000, justid=True
            )
        except redis.exceptions.ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return False  # the job has ended since, and its lane was empty and is gone
        await client.publish(keys.wake_channel(model), "work")
    if taken:
        run.fault("steal-entry", job)
    return bool(taken)


async def steal_one(run: Run) -> None:
    """Steal one entry, as soon as there is one to steal."""
    while not await steal(run) and not run.clients.is_all_done and now_s() < run.deadline_s:
        await asyncio.sleep(0.02)


async def repeated_entries(run: Run) -> None:
    async def thefts() -> None:
        async for _ in run.faults_due():
            await steal_one(run)

    await run.beside(run.load(tokens=(20, 80)), thefts())
    await run.until_done()


# -- the list --------------------------------------------------------------------------------

#: What a soak mixes in, of this file. (A partition needs a stage with own_doors.)
FAULTS: dict[str, FaultAction] = {
    "partition": partition_one,
    "kill-pubsub": kill_pubsub,
    "steal-entry": steal_one,
}

SCENARIOS = [
    Scenario(
        name="partition",
        what="a worker and Redis cannot reach each other for 1-60 s, half longer than the lease",
        jobs=5_000,
        faults=200,
        slice_jobs=48,
        slice_faults=4,
        run=partitions,
        rules=Rules(min_stale_writes=1, needs_takeovers=True),
        slice_rules=Rules(needs_takeovers=True),  # of so few a renewal may find all, before a write
        num_workers=4,
        own_doors=True,
        limit_s=7200.0,
    ),
    Scenario(
        name="pubsub-kill",
        what="CLIENT KILL of every pub/sub connection; gaps are filled from the log",
        jobs=1_000,
        faults=200,
        slice_jobs=40,
        slice_faults=6,
        run=pubsub_kill,
        rules=Rules(max_silence_s=GAP_S),
        slice_rules=Rules(),
        # A thousand streams that run, not wait: 1,000 events a second on a core that is shared.
        settings={
            "HEADRACE_STUB_STEP_MS": "1000",
            "HEADRACE_MAX_NUM_SEQS": "256",
            "HEADRACE_KV_CACHE_MB": "8192",
        },
        num_workers=4,
    ),
    Scenario(
        name="unsure",
        what="1% of all Redis and SQL calls in every program: done, and an error returned",
        jobs=20_000,
        faults=0,
        slice_jobs=80,
        slice_faults=0,
        run=only_load,
        wrap="unsure:share=0.01,seed={seed}",
        num_workers=3,
        limit_s=7200.0,
    ),
    Scenario(
        name="repeated-entries",
        what="every entry delivered 2-3 times, and some stolen from living workers",
        jobs=10_000,
        faults=1_000,
        slice_jobs=60,
        slice_faults=8,
        run=repeated_entries,
        rules=Rules(needs_takeovers=True),
        wrap="repeated:seed={seed}",
        num_workers=3,
    ),
]
