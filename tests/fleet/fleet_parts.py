"""A fleet for tests: real servers behind forwarders, and gateway, workers and tasks as processes.

Nothing is simulated; only the addresses go through `Forwarder`, so that a test can take a server
away. Every process is ended by `Fleet.stop`, and dies with the test run besides.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from headrace.contract import database
from headrace.contract.accounts import Accounts
from headrace.fleet.child import start_child
from headrace.fleet.postgres import start_postgres
from headrace.fleet.server import Server
from headrace.fleet.valkey import start_valkey
from headrace.tests.fleet.forwarder import Forwarder
from headrace.tests.real_parts import migrate_in_a_process

#: Seconds within which anything a test waits for must have happened, on a busy machine.
PATIENCE_S = 60.0
LEASE_S = 3.0


@dataclass
class Event:
    """One server-sent event."""

    name: str
    data: dict[str, Any]
    id: str | None


@dataclass
class Fleet:
    folder: Path
    model: Path
    settings: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start_servers(self) -> None:
        self.valkey: Server = start_valkey(self.folder)
        self.postgres: Server = start_postgres(self.folder)
        migrate_in_a_process(self.postgres.url)
        self.redis_door = Forwarder(self.valkey.port)
        self.postgres_door = Forwarder(self.postgres.port)
        port = _free_port()
        self.api = f"http://127.0.0.1:{port}"
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "HEADRACE_REDIS_URL": _through(self.valkey, self.redis_door),
            "HEADRACE_DATABASE_URL": _through(self.postgres, self.postgres_door),
            "HEADRACE_DATA_DIR": str(self.folder),
            "HEADRACE_BIND": f"127.0.0.1:{port}",
            "HEADRACE_MODEL": str(self.model),
            "HEADRACE_ENGINE_THREADS": "1",
            "HEADRACE_LEASE_S": str(LEASE_S),
            "HEADRACE_HEARTBEAT_S": "1",
            "HEADRACE_KV_CACHE_MB": "512",
        } | self.settings
        engine = database.connect(self.postgres.url)
        self.key = Accounts(engine).create_key(tenant="one", name="test").secret
        self.other_key = Accounts(engine).create_key(tenant="two", name="test").secret
        engine.dispose()

    def start(self, name: str, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start `headrace ARGUMENTS` as the process `name`; its output goes to NAME.log."""
        self.processes[name] = start_child(
            [sys.executable, "-m", "headrace.fleet", *arguments],
            log=self.folder / f"{name}.log",
            env=self.env | settings,
            death_signal=signal.SIGKILL,
            cwd=self.folder,
        )
        return self.processes[name]

    def start_gateway(self) -> None:
        self.start("gateway", "gateway")
        wait_for(lambda: self._is_ok("/readyz"), "the gateway is ready", self)

    def start_worker(self, name: str = "worker", **settings: str) -> None:
        self.start(name, "worker", HEADRACE_WORKER_ID=name, **settings)
        log = self.folder / f"{name}.log"
        size = log.stat().st_size
        wait_for(lambda: "worker.ready" in log.read_text()[size:], f"{name} is ready", self)

    def end(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        """End a process and return its status."""
        process = self.processes.pop(name)
        process.send_signal(how)
        return process.wait(PATIENCE_S)

    def kill_group(self, name: str) -> None:
        """Kill a process and all it started, at once: gunicorn's workers, Celery's beat."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)

    def stop(self) -> None:
        for name in list(self.processes):
            self.kill_group(name)
        self.redis_door.close()
        self.postgres_door.close()
        self.valkey.stop()
        self.postgres.stop()

    def restart_valkey(self) -> None:
        """Start Valkey again on its data; the address of the fleet leads to it."""
        self.valkey.stop()
        self.valkey = start_valkey(self.folder)
        self.redis_door.join(self.valkey.port)

    def restart_postgres(self) -> None:
        self.postgres.stop()
        self.postgres = start_postgres(self.folder)
        self.postgres_door.join(self.postgres.port)

    # -- the API -----------------------------------------------------------------------------

    def call(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.key}"} | kwargs.pop("headers", {})
        return httpx.request(method, self.api + path, headers=headers, timeout=PATIENCE_S, **kwargs)

    def submit(self, *, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        """Submit a job and return it as it was accepted."""
        body.setdefault("model", self.model.name)
        if not body.keys() & {"prompt", "prompt_token_ids"}:
            body.setdefault("messages", [{"role": "user", "content": "Tell me a story."}])
        response = self.call("POST", "/v1/jobs", json=body, headers=headers or {})
        assert response.status_code == 202, response.text
        assert response.headers["Location"] == f"/v1/jobs/{response.json()['id']}"
        return response.json()

    def job(self, job_id: str) -> dict[str, Any]:
        response = self.call("GET", f"/v1/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def wait_status(self, job_id: str, *statuses: str) -> dict[str, Any]:
        wait_for(lambda: self.job(job_id)["status"] in statuses, f"{job_id} is {statuses}", self)
        return self.job(job_id)

    def events(self, job_id: str, after: str | None = None) -> Iterator[Event]:
        """Follow a job's events, from the start or after an event id, to its end."""
        headers = {"Authorization": f"Bearer {self.key}"}
        if after is not None:
            headers["Last-Event-ID"] = after
        url = f"{self.api}/v1/jobs/{job_id}/events"
        with httpx.stream("GET", url, headers=headers, timeout=PATIENCE_S) as response:
            response.raise_for_status()
            yield from parse_events(response.iter_lines())

    def _is_ok(self, path: str) -> bool:
        try:
            return httpx.get(self.api + path, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def parse_events(lines: Iterator[str]) -> Iterator[Event]:
    """Parse server-sent events as the WHATWG's specification says."""
    name, data, event_id = "message", [], None
    for line in lines:
        if not line:
            if data:
                yield Event(name, json.loads("\n".join(data)), event_id)
            name, data, event_id = "message", [], None
        elif not line.startswith(":"):
            field_name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field_name == "event":
                name = value
            elif field_name == "data":
                data.append(value)
            elif field_name == "id":
                event_id = value


def check_stream(events: list[Event], first: int = 0) -> tuple[str, list[int]]:
    """Assert that indexes are contiguous from `first`, each once; return text and token ids."""
    text, ids = "", []
    for event in events:
        if event.name == "token":
            assert event.data["index"] == first + len(ids), "a gap or a repeat"
            assert event.data["count"] == len(event.data["token_ids"])
            ids += event.data["token_ids"]
            text += event.data["text"]
            assert event.id == str(first + len(ids) - 1)
    return text, ids


def wait_for(condition: Callable[[], bool], what: str, fleet: Fleet | None = None) -> None:
    """Wait until the condition holds; fail with the processes' last lines when it does not."""
    deadline = time.monotonic() + PATIENCE_S
    pause = 0.01
    while not condition():
        ended = {n: p.returncode for n, p in _processes(fleet).items() if p.poll() is not None}
        if time.monotonic() > deadline or ended:
            logs = "\n".join(
                f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-25:])
                for path in (sorted(fleet.folder.glob("*.log")) if fleet else [])
            )
            raise AssertionError(f"not in time: {what}; ended: {ended}\n{logs}")
        time.sleep(pause)
        pause = min(0.2, pause * 1.5)


def _processes(fleet: Fleet | None) -> dict[str, subprocess.Popen[bytes]]:
    return {} if fleet is None else fleet.processes


def _through(server: Server, door: Forwarder) -> str:
    return server.url.replace(f":{server.port}/", f":{door.port}/")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
