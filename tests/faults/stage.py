"""The fleet of a campaign: several workers and gateways that are started again when they die.

Names are `w0`, `w1`, ... (workers), `g0`, ... (gateways, each on a port of its own that it keeps)
and `tasks`. Programs are run directly, not through the CLI: a worker's start is what bounds how
many kills fit into an hour.

Invariants:
1. What has a name is running, or is started again within SUPERVISE_S of its end, unless a scenario
   holds it down (`hold`). A program that ends by itself, with no fault to blame, is noted and is
   started again too: the checker sees it as `ended by itself`.
2. All that is started is ended by `stop`, and dies with this process besides.
3. Servers and programs are started in the main thread only (`on_main`).

Called by: campaign; scenarios through run.stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from headrace.fleet import programs
from headrace.fleet.child import start_child
from headrace.fleet.server import free_port
from headrace.tests.faults.main_thread import MainThread
from headrace.tests.faults.record import Note, Recorder, Sample, now_s
from headrace.tests.fleet.fleet_parts import Fleet
from headrace.tests.fleet.forwarder import Forwarder

T = TypeVar("T")

#: Seconds between two looks at the programs.
SUPERVISE_S = 0.1
#: Seconds between two samples of memory and counters.
SAMPLE_S = 5.0
#: Seconds a fleet may take to become ready, on a machine that others use too.
READY_S = 120.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Program:
    """A program that has a name on this stage."""

    name: str
    kind: str  # worker | gateway | tasks
    settings: dict[str, str]
    metrics_port: int | None = None
    is_held: bool = False  # down until `release`
    is_blamed: bool = False  # a fault ended it: no surprise
    log_read: int = 0  # bytes of its log that were looked at
    is_ready: bool = False  # it said so since its last start
    engine_pid: int | None = None  # as its log says
    num_starts: int = 0


@dataclass
class Stage(Fleet):
    """Servers and programs of one run. Set up by `start_all`, taken down by `stop`."""

    main: MainThread = field(default_factory=MainThread)
    recorder: Recorder | None = None
    num_workers: int = 4
    num_gateways: int = 1
    own_doors: bool = False
    wrap: str | None = None
    wrapped_programs: tuple[str, ...] = ()
    programs: dict[str, Program] = field(default_factory=dict)
    redis_doors: dict[str, Forwarder] = field(default_factory=dict)  # own_doors: by worker
    postgres_doors: dict[str, Forwarder] = field(default_factory=dict)

    @property
    def workers(self) -> list[str]:
        return [name for name, each in self.programs.items() if each.kind == "worker"]

    @property
    def gateways(self) -> list[str]:
        return [name for name, each in self.programs.items() if each.kind == "gateway"]

    @property
    def apis(self) -> list[str]:
        return ["http://" + self.programs[name].settings["HEADRACE_BIND"] for name in self.gateways]

    # -- start and stop, in the main thread --------------------------------------------------

    def start_all(self) -> None:
        """Start servers and programs; return when they were started, not yet ready."""
        self.start_servers()
        self._add("tasks", "tasks")
        for number in range(self.num_gateways):
            self._add(f"g{number}", "gateway", HEADRACE_BIND=f"127.0.0.1:{free_port()}")
        for number in range(self.num_workers):
            name = f"w{number}"
            self._add(name, "worker", HEADRACE_WORKER_ID=name, **self._doors(name))
        self.api = self.apis[0]
        for name in self.programs:
            self.launch(name)

    def _add(self, name: str, kind: str, **settings: str) -> None:
        port = free_port() if kind == "worker" else None
        if port is not None:
            settings["HEADRACE_METRICS_BIND"] = f"127.0.0.1:{port}"
        self.programs[name] = Program(name, kind, settings, port)

    def _doors(self, name: str) -> dict[str, str]:
        if not self.own_doors:
            return {}
        redis = self.redis_doors[name] = Forwarder(self.valkey.port)
        postgres = self.postgres_doors[name] = Forwarder(self.postgres.port)
        return {
            "HEADRACE_REDIS_URL": _by_port(self.valkey.url, self.valkey.port, redis.port),
            "HEADRACE_DATABASE_URL": _by_port(self.postgres.url, self.postgres.port, postgres.port),
        }

    def launch(self, name: str) -> None:
        """Start a program of this stage (again); main thread."""
        program = self.programs[name]
        program.is_ready, program.is_blamed, program.engine_pid = False, False, None
        program.num_starts += 1
        log = self.folder / f"{name}.log"
        program.log_read = log.stat().st_size if log.exists() else 0
        self.processes[name] = start_child(
            self._argv(program),
            log=log,
            env=self.env | program.settings,
            death_signal=signal.SIGKILL,
            cwd=self.folder,
        )

    def _argv(self, program: Program) -> list[str]:
        if self.wrap is not None and program.kind in self.wrapped_programs:
            wrapped = "headrace.tests.faults.wrapped"
            return [sys.executable, "-m", wrapped, self.wrap, "--", program.kind]
        if program.kind == "tasks":
            return programs.tasks_argv(self.folder / "celery-beat")
        return programs.worker_argv() if program.kind == "worker" else programs.gateway_argv()

    def stop(self) -> None:
        """End everything; also what is half started."""
        for name in list(self.processes):
            self.kill_group(name)
        for door in [*self.redis_doors.values(), *self.postgres_doors.values()]:
            door.close()
        for part in ("redis_door", "postgres_door"):
            if hasattr(self, part):
                getattr(self, part).close()
        for part in ("valkey", "postgres"):
            if hasattr(self, part):
                getattr(self, part).stop()

    def restart_valkey(self) -> None:
        super().restart_valkey()
        for door in self.redis_doors.values():
            door.join(self.valkey.port)

    def restart_postgres(self) -> None:
        super().restart_postgres()
        for door in self.postgres_doors.values():
            door.join(self.postgres.port)

    # -- from the loop -----------------------------------------------------------------------

    async def on_main(self, work: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Do something in the main thread: whatever starts a process or waits for one."""
        return await self.main.call(work, *args, **kwargs)

    async def until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = READY_S
    ) -> None:
        """Wait until a condition of the fleet holds; AssertionError when it does not in time."""
        deadline = now_s() + timeout_s
        while not condition():
            if now_s() > deadline:
                raise AssertionError(f"not within {timeout_s:.0f} s: {what}; logs: {self.folder}")
            await asyncio.sleep(0.05)

    async def until_ready(self, num_workers: int | None = None) -> None:
        """Wait until gateways, and so many workers (all, if not said), are ready."""
        wanted = len(self.workers) if num_workers is None else num_workers
        names = self.gateways
        await self.until(lambda: len(self.ready_workers()) >= wanted, f"{wanted} workers ready")
        await self.until(lambda: all(self.programs[n].is_ready for n in names), "gateways ready")

    def ready_workers(self) -> list[str]:
        return [name for name in self.workers if self.programs[name].is_ready]

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Signal a program's first process; it is started again when it has ended."""
        self.programs[name].is_blamed = True
        self.programs[name].is_ready = False
        with contextlib.suppress(ProcessLookupError):
            self.processes[name].send_signal(how)

    def kill_all_of(self, name: str) -> None:
        """Kill a program and all it started in one moment."""
        self.programs[name].is_blamed = True
        self.programs[name].is_ready = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, signal.SIGKILL)

    def kill_engine(self, name: str, how: signal.Signals = signal.SIGKILL) -> bool:
        """Signal a worker's engine; False when it has none at the moment."""
        pid = self.engine_pid(name)
        if pid is None:
            return False
        self.programs[name].is_ready = False  # until the next engine is
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        return True

    def engine_pid(self, name: str) -> int | None:
        """Return the process that a worker started, as the kernel knows it."""
        pid = self.processes[name].pid
        try:
            said = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return None
        return int(said[0]) if said else None

    async def stop_program(self, name: str, timeout_s: float = 60.0) -> int:
        """End a program by SIGTERM and wait; it stays down until `release`; its exit status."""
        self.programs[name].is_held = self.programs[name].is_blamed = True
        self.programs[name].is_ready = False
        process = self.processes[name]
        process.terminate()
        await self.until(lambda: process.poll() is not None, f"{name} stops", timeout_s)
        return process.returncode

    async def release(self, name: str) -> None:
        """Start a program that was held down."""
        await self.on_main(self.launch, name)
        self.programs[name].is_held = False

    async def restart(self, name: str) -> int:
        """Restart in good order; return the exit status of the one that ended."""
        status = await self.stop_program(name)
        await self.release(name)
        await self.until(lambda: self.programs[name].is_ready, f"{name} is ready again")
        return status

    # -- supervision, tasks of the campaign --------------------------------------------------

    async def supervise(self) -> None:
        """Start again what has ended, and notice what has become ready; runs until cancelled."""
        while True:
            for name, program in self.programs.items():
                process = self.processes.get(name)
                if process is None:
                    continue
                if process.poll() is not None:
                    if not program.is_held:
                        await self._revive(program, process)
                elif not program.is_ready:
                    await self._look_for_ready(program)
            await asyncio.sleep(SUPERVISE_S)

    async def _revive(self, program: Program, process: subprocess.Popen[bytes]) -> None:
        if not program.is_blamed:
            text = f"{program.name} ended by itself with {process.returncode}"
            self.note("surprise", text)
        await self.on_main(self._launch_anew, program.name)

    def _launch_anew(self, name: str) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.processes[name].pid, signal.SIGKILL)  # gunicorn's, Celery's children
        self.launch(name)

    async def _look_for_ready(self, program: Program) -> None:
        if program.kind == "gateway":
            program.is_ready = await _answers(program.settings["HEADRACE_BIND"], "/readyz")
            return
        if program.kind == "tasks":
            program.is_ready = True
            return
        with (self.folder / f"{program.name}.log").open("rb") as log:
            log.seek(program.log_read)
            said = log.read()
        program.log_read += len(said)
        program.is_ready = said.rfind(b"worker.ready") > said.rfind(b"engine.died")

    async def sample(self) -> None:
        """Record memory and counters of every program now and then; runs until cancelled."""
        while True:
            await self.sample_once()
            await asyncio.sleep(SAMPLE_S)

    async def sample_once(self) -> None:
        for name, program in list(self.programs.items()):
            self._sample_memory(name)
            if program.is_ready and program.metrics_port is not None:
                await self._sample_metrics(name, program.metrics_port)

    def _sample_memory(self, name: str) -> None:
        leader = self.processes[name].pid
        for pid in _group_of(leader):
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            part = name if pid == leader else f"{name}.child"
            self._add_sample(part, pid, "rss_bytes", pages * PAGE_BYTES)

    async def _sample_metrics(self, name: str, port: int) -> None:
        text = await _get(f"127.0.0.1:{port}", "/metrics")
        lines = text.splitlines() if text else []
        stale = [x for x in lines if x.startswith("headrace_worker_stale_writes_total{")]
        if stale:
            value = sum(float(line.rpartition(" ")[2]) for line in stale)
            self._add_sample(name, self.processes[name].pid, "stale_writes", value)

    def _add_sample(self, process: str, pid: int, name: str, value: float) -> None:
        if self.recorder is not None:
            self.recorder.add(Sample(process, pid, name, value, now_s()))

    def note(self, name: str, value: str) -> None:
        if self.recorder is not None:
            self.recorder.add(Note(name, value, now_s()))


def _by_port(url: str, port: int, instead: int) -> str:
    return url.replace(f":{port}/", f":{instead}/")


def _group_of(leader: int) -> list[int]:
    """Return the processes of a group: a program and what it started."""
    found: list[int] = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if os.getpgid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


async def _answers(address: str, path: str) -> bool:
    return await _get(address, path) is not None


async def _get(address: str, path: str) -> str | None:
    """Return the body of a 200, None for anything else."""
    host, _, port = address.partition(":")
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 2)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
            said = await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()
    except (OSError, TimeoutError):
        return None
    head, _, body = said.partition(b"\r\n\r\n")
    return body.decode(errors="replace") if b" 200 " in head.partition(b"\r\n")[0] else None
