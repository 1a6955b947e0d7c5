"""What is done to the two stores: killed, emptied, filled.

The servers are real and so are their failures. A full disk is a limit on the size of files
(RLIMIT_FSIZE), lowered on the running processes and raised again: no root is needed, and a write
fails in the same places, as EFBIG instead of ENOSPC. Redis answers MISCONF to either. Postgres
refuses to extend a table either way; it calls EFBIG XX000 where ENOSPC is 53100
(tests/contract/test_store_errors.py has both). Where its write-ahead log cannot be written either,
it ends itself, and is started again once there is room, as a supervisor would.

Invariants:
1. A server that was killed or ended is started on the same data, unless it was emptied.
2. What was taken away is given back when the context ends, whatever happened in it.
3. Servers are started in the main thread (fleet.child); nothing here blocks the loop for longer
   than a signal takes.

Called by: scenarios_stores, scenarios_streams, scenarios_workers (soak).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psycopg
import redis

from headrace.fleet.postgres import start_postgres
from headrace.fleet.valkey import start_valkey
from headrace.tests.faults.stage import Stage

UNLIMITED = resource.RLIM_INFINITY
#: Seconds within which a server must feel what was done to it, on a busy machine.
PATIENCE_S = 60.0
#: Segments of the write-ahead log are made whole and are this large: a limit on file size that
#: leaves the log alone cannot be smaller.
WAL_SEGMENT_BYTES = 16 << 20
#: Rows that make the table of jobs larger than that: one fills a page of 8 kB.
NUM_BALLAST = WAL_SEGMENT_BYTES // 8192 + 200


class StoreFaults:
    """The stores of one stage, and what can be done to them."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    # -- killed ------------------------------------------------------------------------------

    def kill_redis(self, *, is_emptied: bool = False) -> None:
        """Kill Redis; with `is_emptied` its data is removed too."""
        process = self._stage.valkey.process
        process.kill()
        process.wait()
        if is_emptied:
            shutil.rmtree(self._stage.folder / "valkey" / "appendonlydir")

    async def kill_redis_and_lose(self, seconds: float) -> int:
        """Kill Redis; its file lacks what it wrote in the last so many seconds (0: nothing).

        A killed process loses nothing that it had written. With `appendfsync everysec` a machine
        that loses its power may lose the last second; returns the bytes that are missing.
        """
        folder = self._stage.folder / "valkey" / "appendonlydir"
        kept = _sizes(folder)
        if seconds:
            await asyncio.sleep(seconds)
        self.kill_redis()
        lost = 0
        for path, size in kept.items() if seconds else ():
            if path.exists() and path.suffix == ".aof":
                lost += path.stat().st_size - size
                os.truncate(path, size)
        return lost

    async def start_redis(self) -> None:
        await self._stage.on_main(self._start_redis)

    def _start_redis(self) -> None:
        stage = self._stage
        stage.valkey.stop()  # lets go of the folder
        stage.valkey = start_valkey(stage.folder)
        for door in (stage.redis_door, *stage.redis_doors.values()):
            door.join(stage.valkey.port)

    def kill_postgres(self) -> None:
        """Kill every process of Postgres in one moment, as a machine that loses its power does."""
        server = self._stage.postgres
        pids = [server.pid, *_children(server.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.wait()

    async def start_postgres(self) -> None:
        await self._stage.on_main(self._start_postgres)

    def _start_postgres(self) -> None:
        stage = self._stage
        stage.postgres.stop()
        stage.postgres = start_postgres(stage.folder)
        for door in (stage.postgres_door, *stage.postgres_doors.values()):
            door.join(stage.postgres.port)

    # -- filled ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def full_redis_memory(self) -> AsyncIterator[None]:
        """No more memory than is used: with `noeviction` every write that needs some is refused."""
        with redis.Redis.from_url(self._stage.valkey.url) as admin:
            admin.config_set("maxmemory", int(_info(admin, "memory")["used_memory"] * 0.95))
            try:
                await self._until(lambda: _refuses(admin, "OOM"), "Redis has no memory left")
                yield
            finally:
                admin.config_set("maxmemory", 0)

    @contextlib.asynccontextmanager
    async def full_redis_disk(self) -> AsyncIterator[None]:
        """No append to the append-only file succeeds."""
        pid = self._stage.valkey.pid
        with redis.Redis.from_url(self._stage.valkey.url) as admin:
            _limit_files(pid, 0)
            try:
                await self._until(lambda: _refuses(admin, "MISCONF"), "Redis cannot write its file")
                yield
            finally:
                _limit_files(pid, UNLIMITED)

    async def grow_jobs(self) -> None:
        """Make the table of jobs so large that its limit can be above the log's (see above)."""
        await asyncio.to_thread(self._sql, _GROW % NUM_BALLAST)

    @contextlib.asynccontextmanager
    async def full_postgres_disk(self) -> AsyncIterator[None]:
        """The table of jobs cannot grow; what fits into its pages, and other tables, still can."""
        ((size,),) = await asyncio.to_thread(self._sql, "select pg_relation_size('jobs')")
        assert size > WAL_SEGMENT_BYTES, "grow_jobs comes first"
        self._limit_postgres(size)
        try:
            yield
        finally:
            self._limit_postgres(UNLIMITED)

    @contextlib.asynccontextmanager
    async def full_postgres_log(self) -> AsyncIterator[None]:
        """Not even the write-ahead log can be written: Postgres ends itself at the next commit."""
        process = self._stage.postgres.process
        self._limit_postgres(0)
        try:
            await self._until(lambda: process.poll() is not None, "Postgres ends")
            yield
        finally:
            process.kill()
            process.wait()
            await self.start_postgres()

    def _limit_postgres(self, num_bytes: int) -> None:
        """Limit the postmaster first: what it starts from then on inherits it."""
        server = self._stage.postgres
        _limit_files(server.pid, num_bytes)
        for pid in _children(server.pid):
            with contextlib.suppress(ProcessLookupError):
                _limit_files(pid, num_bytes)

    # -- parts -------------------------------------------------------------------------------

    def _sql(self, query: Any, *values: object) -> list[Any]:
        url = self._stage.postgres.url.replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True) as db:
            found = db.execute(query, values or None)
            return found.fetchall() if found.description else []

    async def running(self) -> list[str]:
        """Return the jobs that run by their rows."""
        query = "select id from jobs where status = 'running'"
        return [job for (job,) in await asyncio.to_thread(self._sql, query)]

    async def in_nobodys_memory(self, killed: str = "") -> list[str]:
        """Return the jobs that ran and whose tokens no living process remembers.

        Those that wait to be run again, and those whose row names a worker that was started after
        it took them, or `killed`.
        """
        found = [job for (job,) in await asyncio.to_thread(self._sql, _WAITING_AGAIN)]
        for name in self._stage.workers:
            process = self._stage.processes[name]
            is_dead = name == killed or process.poll() is not None
            age_s = 0.0 if is_dead else _age_s(process.pid)
            rows = await asyncio.to_thread(self._sql, _TAKEN_BEFORE, name, age_s)
            found += [job for (job,) in rows]
        return found

    async def attempted(self, worker: str, at_s: float) -> list[str]:
        """Return the jobs of which a worker ran an attempt at a moment (Unix s)."""
        rows = await asyncio.to_thread(self._sql, _ATTEMPTED, worker, at_s, at_s)
        return [job for (job,) in rows]

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        await self._stage.until(condition, what, PATIENCE_S)


#: Rows as the newest job's, of another time and of no client. A column that is stored as it is
#: keeps them in the table's own file, and leaves no room behind it for the row of a POST.
_GROW = """
alter table jobs alter column traceparent set storage plain;
insert into jobs
select (jsonb_populate_record(job, jsonb_build_object(
    'id', 'job_ballast' || n, 'metadata', '{}'::jsonb,
    'traceparent', repeat(n::text, 7400 / length(n::text)),
    'created_at', now() - interval '1 hour', 'finished_at', now() - interval '1 hour'
  ))).*
from (select job from jobs as job where finished_at is not null limit 1) as ended,
  generate_series(1, %d) as n;
alter table jobs alter column traceparent set storage extended;
"""


_WAITING_AGAIN = "select id from jobs where status = 'queued' and attempt > 0"
#: By worker, and how many seconds it has lived.
_TAKEN_BEFORE = """
select j.id from jobs j join attempts a on a.job_id = j.id and a.number = j.attempt
where j.status = 'running' and j.worker = %s and a.started_at < now() - make_interval(secs => %s)
"""

_ATTEMPTED = """
select job_id from attempts where worker = %s and started_at <= to_timestamp(%s)
and (ended_at is null or ended_at >= to_timestamp(%s))
"""


def _age_s(pid: int) -> float:
    """Return how long a process has lived; 0 if it is gone."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0.0
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return max(0.0, up_s - ticks / os.sysconf("SC_CLK_TCK"))


def _children(pid: int) -> list[int]:
    """Return what a process started: each of Postgres' has a session of its own."""
    try:
        said = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in said.split()]


def _sizes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.iterdir()}


def _limit_files(pid: int, num_bytes: int) -> None:
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, UNLIMITED))


def _info(admin: redis.Redis, section: str) -> dict[str, Any]:
    return admin.info(section)  # pyright: ignore[reportReturnType]


def _refuses(admin: redis.Redis, code: str) -> bool:
    """Say whether Redis refuses a write for this reason; the write itself changes nothing."""
    try:
        admin.set("probe", 0, px=1)
    except redis.OutOfMemoryError:
        return code == "OOM"
    except redis.ResponseError as error:
        return str(error).startswith(code)
    return False
