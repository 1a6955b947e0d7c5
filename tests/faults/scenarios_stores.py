"""Scenarios in which Redis or Postgres is killed, emptied or full while jobs run.

What is promised of each, beside what the checker always asserts:

| scenario | promise |
|---|---|
| `redis-crash` | everything finishes; `reset` only where the file's last second was lost too |
| `redis-empty` | the same; `reset` only for jobs whose worker died before it could put them back |
| `postgres-crash` | POSTs get 503 until it is back; streams go on meanwhile |
| `full-memory`, `full-redis-disk` | accepted (Postgres has it) and delayed until there is room |
| `full-postgres-disk` | POSTs that need room get 503; results wait with their workers |

Called by: scenario.all_scenarios, scenarios_soak (FAULTS).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from headrace.tests.faults.heard import heard
from headrace.tests.faults.record import Asked
from headrace.tests.faults.scenario import PROMPT_IDS, FaultAction, Rules, Run, Scenario
from headrace.tests.faults.store_faults import StoreFaults

#: Seconds a store stays away, or full.
AWAY_S = (0.2, 1.5)
#: Longer than a lease: every worker's leases have run out when Redis is back, and all live.
LONG_AWAY_S = (2.5, 4.0)
FULL_S = (1.0, 3.0)
#: Seconds within which a full disk must refuse a POST, and between those that are sent for it.
REFUSED_S, POST_EVERY_S = 60.0, 0.05
#: Ids of a prompt whose row is just under the 2 kB from which Postgres stores values apart.
WIDE_IDS = 100


async def pause(run: Run, seconds: tuple[float, float]) -> None:
    await asyncio.sleep(run.random.uniform(*seconds))


# -- one fault each, healed when it returns (the soak uses them too) ---------------------------


async def crash_redis(run: Run) -> None:
    """Kill Redis and start it on its file; at times as after a loss of power, at times late."""
    stores = StoreFaults(run.stage)
    away_s = run.random.choice((AWAY_S, AWAY_S, LONG_AWAY_S))
    lost_s = run.random.choice((0.0, run.random.uniform(0.1, 1.0)))
    lost_bytes = await stores.kill_redis_and_lose(lost_s)
    run.fault("redis-kill", "redis", lost_s=round(lost_s, 2), lost_bytes=lost_bytes)
    try:
        if lost_bytes:  # the claim itself may be lost: another worker is given the job as new
            run.may_reset(await stores.running())
        await pause(run, away_s)
    finally:
        await stores.start_redis()


async def empty_redis(run: Run, *, killed: str = "") -> None:
    """Start Redis without its data; with `killed`, that worker dies in the same moment.

    A log is truly gone, and its job may say `reset`, where no living worker has it in memory.
    """
    stores = StoreFaults(run.stage)
    stores.kill_redis(is_emptied=True)
    run.fault("redis-empty", "redis", killed=killed)
    try:
        if killed:
            run.stage.kill_all_of(killed)
        run.may_reset(await stores.in_nobodys_memory(killed))
        await pause(run, AWAY_S)
    finally:
        await stores.start_redis()


async def crash_postgres(run: Run) -> None:
    """Kill all of Postgres in one moment and start it on its data."""
    stores = StoreFaults(run.stage)
    stores.kill_postgres()
    run.fault("postgres-kill", "postgres")
    try:
        await pause(run, AWAY_S)
    finally:
        await stores.start_postgres()


async def fill_memory(run: Run) -> None:
    async with StoreFaults(run.stage).full_redis_memory():
        run.fault("redis-full-memory", "redis")
        await pause(run, FULL_S)


async def fill_redis_disk(run: Run) -> None:
    async with StoreFaults(run.stage).full_redis_disk():
        run.fault("redis-full-disk", "redis")
        await pause(run, FULL_S)


FAULTS: dict[str, FaultAction] = {
    "redis-kill": crash_redis,
    "redis-empty": empty_redis,
    "postgres-kill": crash_postgres,
    "redis-full-memory": fill_memory,
    "redis-full-disk": fill_redis_disk,
}


# -- scenarios -------------------------------------------------------------------------------


def each_time(action: FaultAction) -> Callable[[Run], Coroutine[Any, Any, None]]:
    """Make a scenario of one fault: load, and the fault again and again."""

    async def again(run: Run) -> None:
        async for _ in run.faults_due():
            await action(run)

    async def scenario(run: Run) -> None:
        await run.beside(run.load(), again(run))

    return scenario


async def redis_empty(run: Run) -> None:
    """Empty Redis again and again; every third time a worker dies with it."""

    async def empty() -> None:
        async for number in run.faults_due():
            dies = number % 3 == 2
            await empty_redis(run, killed=run.random.choice(run.stage.workers) if dies else "")

    await run.beside(run.load(), empty())


async def postgres_crash(run: Run) -> None:
    """Crash Postgres again and again; tokens go on to flow meanwhile."""
    streamed = 0

    async def crash() -> None:
        nonlocal streamed
        async for _ in run.faults_due():
            with heard(run) as said:
                await crash_postgres(run)
            streamed += said.num_chunks

    await run.beside(run.load(tokens=(60, 160)), crash())
    run.note("chunks_while_postgres_was_away", str(streamed))
    assert streamed or not run.num_faults_done, "no stream went on while Postgres was away"


def wide(asked: Asked) -> Asked:
    """Let a row need as much room as fits into its table: what is larger goes elsewhere."""
    return msgspec.structs.replace(asked, prompt=list(PROMPT_IDS[:WIDE_IDS]))


async def full_postgres_disk(run: Run) -> None:
    """The table cannot grow; every fourth time the write-ahead log cannot be written either."""
    stores, refused, num_met = StoreFaults(run.stage), 0, 0
    await run.load(1)
    await run.until_done()  # the row that the ballast is made after
    await stores.grow_jobs()

    async def fill() -> None:
        nonlocal refused, num_met
        async for number in run.faults_due():
            is_log = number % 4 == 1
            full = stores.full_postgres_log() if is_log else stores.full_postgres_disk()
            with heard(run) as said:
                async with asyncio.TaskGroup() as posts, full:  # accepted when there is room again
                    run.fault("postgres-full-log" if is_log else "postgres-full-disk", "postgres")
                    async with asyncio.timeout(REFUSED_S):
                        while not said.answers[503]:  # some fit into old pages
                            posts.create_task(run.load(1, (1, 2), in_flight=1 << 20, make=wide))
                            await asyncio.sleep(POST_EVERY_S)
                    await pause(run, FULL_S)
            refused += said.answers[503]
            num_met += 1

    await run.beside(run.load(run.num_jobs - 1), fill())
    run.note("posts_refused", str(refused))
    assert num_met, "the disk was never full while jobs ran"


SCENARIOS = [
    Scenario(
        name="redis-crash",
        what="kill -9 of Redis, started on its AOF (everysec): all finish",
        jobs=5000,
        faults=100,
        slice_jobs=60,
        slice_faults=3,
        run=each_time(crash_redis),
        num_workers=2,
    ),
    Scenario(
        name="redis-empty",
        what="Redis restarted without its data: all finish, reset only if the worker died too",
        jobs=5000,
        faults=50,
        slice_jobs=60,
        slice_faults=3,
        run=redis_empty,
        num_workers=2,
    ),
    Scenario(
        name="postgres-crash",
        what="kill -9 of all of Postgres: 503, streams go on, one result each",
        jobs=5000,
        faults=100,
        slice_jobs=60,
        slice_faults=3,
        run=postgres_crash,
        num_workers=2,
    ),
    Scenario(
        name="full-memory",
        what="maxmemory reached under Redis: accepted and delayed, recovers alone",
        jobs=1000,
        faults=20,
        slice_jobs=60,
        slice_faults=2,
        run=each_time(fill_memory),
        num_workers=2,
    ),
    Scenario(
        name="full-redis-disk",
        what="full disk under Redis (AOF errors): accepted and delayed, recovers alone",
        jobs=1000,
        faults=20,
        slice_jobs=60,
        slice_faults=2,
        run=each_time(fill_redis_disk),
        num_workers=2,
    ),
    Scenario(
        name="full-postgres-disk",
        what="full disk under Postgres (tables, at times its log): 503, recovers alone",
        jobs=1000,
        faults=20,
        slice_jobs=60,
        slice_faults=2,
        slice_limit_s=240.0,
        run=full_postgres_disk,
        rules=Rules(has_other_jobs=True),
        num_workers=2,
    ),
]
