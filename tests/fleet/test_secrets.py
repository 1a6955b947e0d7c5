"""Secrets and what users wrote, through success, refusals, outages and crashes, at DEBUG: nowhere.

A whole fleet is made to say as much as it can; then everything that it has said is searched: logs
of all programs and servers, metrics, traces, answers, arguments and environments of processes.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.contract import database
from headrace.contract.operators import Operators
from headrace.contract.passwords import Passwords
from headrace.contract.roles import Role
from headrace.fleet.server import free_port
from headrace.gateway.dashboard.guard import csrf_token
from headrace.gateway.openapi import SESSION_COOKIE
from headrace.tests.contract.collector import Collector
from headrace.tests.fleet.fleet_parts import Fleet, wait_for

PASSWORD = "an-operators-own-password"
WRONG = "wrong-but-nearly-the-password"
PROMPT, NOTE, LABEL = "a-users-own-prompt", "a-users-own-note", "a-users-own-label"
#: Everything that a user wrote in a request which is refused, or in a place it does not belong.
STRAY = "a-users-stray-secret"
#: Characters of an output that make it certain that no log holds them by chance.
MIN_OUTPUT_CHARS = 40


@dataclass
class Told:
    """All that the fleet has said, and all that it must not have said."""

    secrets: dict[str, str]  # what it is -> the text
    said: dict[str, str] = field(default_factory=dict)  # where -> the text

    def leaks(self) -> list[str]:
        """Return `what in where`; encoded forms count too."""
        found = []
        for what, secret in self.secrets.items():
            assert len(secret) >= 12, f"{what} is too short to be searched for"
            forms = {secret, urllib.parse.quote(secret), base64.b64encode(secret.encode()).decode()}
            found += [
                f"{what} in {where}"
                for where, text in self.said.items()
                if any(form in text for form in forms)
            ]
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector().start()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def told(tmp_path_factory, smollm2_folder, collector: Collector) -> Told:
    """Run a fleet through all of it, and collect."""
    binds = {name: f"127.0.0.1:{free_port()}" for name in ("worker", "tasks")}
    settings = {
        "HEADRACE_RUNNER": "stub",
        "HEADRACE_STUB_STEP_MS": "20",
        "HEADRACE_LEASE_S": "2",
        "HEADRACE_STEP_TIMEOUT_S": "3",
        "HEADRACE_LOG_LEVEL": "DEBUG",
        "HEADRACE_TRACES_URL": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    fleet = Fleet(tmp_path_factory.mktemp("secrets"), smollm2_folder, settings)
    fleet.start_servers()
    try:
        fleet.start("tasks", "tasks", HEADRACE_METRICS_BIND=binds["tasks"])
        fleet.start_gateway()
        fleet.start_worker(HEADRACE_METRICS_BIND=binds["worker"])
        token = _log_in(fleet)
        told = Told(_secrets_of(fleet, token))
        told.secrets["an output"] = _succeed(fleet)
        told.said |= _refusals(fleet, token)
        told.said |= _arguments_and_environments(fleet)
        _lose_engine(fleet)
        told.said |= _outages(fleet, token)
        _lose_worker(fleet, binds["worker"])
        told.said |= _pages(fleet, binds)
        wait_for(lambda: bool(collector.bodies), "spans were exported", fleet)
        told.said["traces"] = b"\n".join(collector.bodies).decode("latin-1")
    finally:
        fleet.stop()
    for path in sorted(fleet.folder.rglob("*")):
        if path.is_file() and (path.suffix == ".log" or path.name == "log"):
            told.said[str(path.relative_to(fleet.folder))] = path.read_text(errors="replace")
    return told


# -- what happens ----------------------------------------------------------------------------


def _secrets_of(fleet: Fleet, token: str) -> dict[str, str]:
    passwords = {
        f"password of {name}": urllib.parse.urlsplit(fleet.env[variable]).password or ""
        for name, variable in (
            ("Redis", "HEADRACE_REDIS_URL"),
            ("Postgres", "HEADRACE_DATABASE_URL"),
        )
    }
    return passwords | {
        "API key": fleet.key.rpartition("_")[2],
        "operator's password": PASSWORD,
        "wrong password": WRONG,
        "session": token,
        "CSRF token": csrf_token(token),
        "prompt": PROMPT,
        "metadata": NOTE,
        "metadata's key": LABEL,
        "stray text": STRAY,
    }


def _log_in(fleet: Fleet) -> str:
    engine = database.connect(fleet.postgres.url)
    # A password is hashed in a thread of its own in the gateway; here nothing else waits for it.
    Operators(engine, Passwords(lambda work, *more: work(*more))).create(
        name="secretary", password=PASSWORD, role=Role.ADMIN
    )
    engine.dispose()
    form = {"name": "secretary", "password": PASSWORD}
    answer = httpx.post(f"{fleet.api}/dashboard/login", data=form, headers={"Origin": fleet.api})
    assert answer.status_code == 303, answer.text
    return answer.cookies[SESSION_COOKIE]


def _succeed(fleet: Fleet, num_tokens: int = 80) -> str:
    sampling = {"max_tokens": num_tokens, "logprobs": 2}
    job = fleet.submit(prompt=PROMPT, metadata={LABEL: NOTE}, sampling=sampling)
    assert [e.name for e in fleet.events(job["id"])][-1] == "succeeded"
    messages = [{"role": "user", "content": PROMPT}]
    fleet.wait_status(fleet.submit(messages=messages, metadata={LABEL: NOTE})["id"], "succeeded")
    text = fleet.job(job["id"])["output"]["text"]
    # Of the middle, where no half character stands: a log would have to hold this part too.
    words = max(re.findall(r"[ -~]+", text), key=len)
    assert len(text) > MIN_OUTPUT_CHARS
    assert len(words) >= 12, text
    return words


def _refusals(fleet: Fleet, token: str) -> dict[str, str]:
    """Return what answers to bad requests say; each carries what must not be repeated."""
    asked: dict[str, Any] = {"model": fleet.model.name, "prompt": STRAY}
    is_json = {"Content-Type": "application/json"}
    bodies: list[dict[str, Any]] = [
        {"json": asked | {"sampling": {"max_tokens": 0}}},
        {"json": asked | {"metadata": {"k": STRAY * 100}}},
        {"json": asked | {"messages": [{"role": "user", "content": STRAY}]}},
        {"json": {"model": fleet.model.name, "messages": [{"role": "user", "content": [STRAY]}]}},
        {"json": {"model": fleet.model.name, "prompt": STRAY * 20_000}},
        {"json": asked | {"sampling": {"stop": [STRAY * 50]}}},
        {"content": b'{"prompt": "' + STRAY.encode(), "headers": is_json},
        {"content": STRAY.encode() + b"\xff", "headers": is_json},
        {"content": STRAY.encode(), "headers": {"Content-Type": "text/plain"}},
    ]
    answers = [fleet.call("POST", "/v1/jobs", **body) for body in bodies]
    bad_key = {"Authorization": f"Bearer {fleet.key}x{STRAY}"}
    answers += [
        fleet.call("GET", "/v1/jobs", headers=bad_key),
        fleet.call("GET", "/v1/jobs", headers={"Authorization": f"Basic {STRAY}"}),
        fleet.call("GET", "/v1/admin/jobs"),
        httpx.get(f"{fleet.api}/v1/jobs", headers={"Cookie": f"{SESSION_COOKIE}={token}"}),
        httpx.post(
            f"{fleet.api}/v1/admin/queues/pause",
            json={},
            headers={"Cookie": f"{SESSION_COOKIE}={token}", "X-CSRF-Token": STRAY},
        ),
        httpx.post(
            f"{fleet.api}/dashboard/login",
            data={"name": "secretary", "password": WRONG},
            headers={"Origin": fleet.api},
        ),
    ]
    assert all(400 <= answer.status_code < 500 for answer in answers), answers
    found = {f"refusal {n}": f"{a.headers} {a.text}" for n, a in enumerate(answers)}
    host, port = fleet.api.removeprefix("http://").split(":")
    for number, line in enumerate((f"GET /?q={STRAY} HTTP/9.9", f"{STRAY} / HTTP/1.1", STRAY)):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(f"{line}\r\nX-{STRAY}\r\n\r\n".encode())
            found[f"malformed {number}"] = connection.recv(1 << 16).decode()
    return found


def _outages(fleet: Fleet, token: str) -> dict[str, str]:
    """Return what answers say while Postgres, then Redis, is away."""
    found = {}
    cookie = {"Cookie": f"{SESSION_COOKIE}={token}"}
    body = {"model": fleet.model.name, "prompt": PROMPT, "metadata": {LABEL: NOTE}}
    for name, door in (("Postgres", fleet.postgres_door), ("Redis", fleet.redis_door)):
        door.cut()
        answers = [
            fleet.call("POST", "/v1/jobs", json=body),
            fleet.call("GET", "/readyz"),
            fleet.call("GET", "/v1/jobs"),
            httpx.get(f"{fleet.api}/v1/admin/workers", headers=cookie, timeout=60),
        ]
        found |= {  # what is accepted or found all the same shows its own tenant its own job
            f"{name} away {number}": f"{answer.headers} {answer.text}"
            for number, answer in enumerate(answers)
            if answer.status_code >= 400 or answer.url.path == "/readyz"
        }
        door.join()
        wait_for(lambda: '"ready"' in fleet.call("GET", "/readyz").text, f"{name} is back", fleet)
    assert any("503" in text or "unavailable" in text for text in found.values())
    return found


def _lose_engine(fleet: Fleet) -> None:
    """End the engine three ways: a crash, a stall that the watchdog ends, a kill."""
    log = fleet.folder / "worker.log"
    for how in (signal.SIGABRT, signal.SIGSTOP, signal.SIGKILL):
        job = fleet.submit(prompt=PROMPT, metadata={LABEL: NOTE}, sampling={"max_tokens": 100})
        fleet.wait_status(job["id"], "running")
        num_before = log.read_text().count("engine.died")
        engine = _engine_of(fleet)
        engine_signal(engine, how)
        wait_for(lambda n=num_before: log.read_text().count("engine.died") > n, f"{how}", fleet)
        fleet.wait_status(job["id"], "succeeded", "failed")


def _lose_worker(fleet: Fleet, bind: str) -> None:
    job = fleet.submit(prompt=PROMPT, metadata={LABEL: NOTE}, sampling={"max_tokens": 100})
    fleet.wait_status(job["id"], "running")
    fleet.kill_group("worker")
    fleet.start_worker(HEADRACE_METRICS_BIND=bind)
    fleet.wait_status(job["id"], "succeeded", "failed")


def engine_signal(pid: int, how: signal.Signals) -> None:
    os.kill(pid, how)


def _engine_of(fleet: Fleet) -> int:
    """Return the engine's process: the worker's child."""
    (engine,) = [pid for pid in processes_under(fleet) if "worker.engine" in arguments_of(pid)]
    return engine


def processes_under(fleet: Fleet) -> list[int]:
    """Return every process that the fleet started, at whatever depth."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = path.read_text().partition(" ")
        except OSError:
            continue
        parents[int(pid)] = int(rest.rpartition(")")[2].split()[1])
    found = {process.pid for process in fleet.processes.values()}
    found |= {fleet.valkey.process.pid, fleet.postgres.process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def arguments_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _arguments_and_environments(fleet: Fleet) -> dict[str, str]:
    """Return the arguments of all processes, and the environments of those that need no secret."""
    found = {f"arguments of {pid}": arguments_of(pid) for pid in processes_under(fleet)}
    assert len(found) >= 7, found
    engine = _engine_of(fleet)
    environment = Path(f"/proc/{engine}/environ").read_bytes().decode()
    assert "HEADRACE_" not in environment
    return found | {"environment of the engine": environment}


def _pages(fleet: Fleet, binds: dict[str, str]) -> dict[str, str]:
    """Return what is open to all, and what each program tells Prometheus."""
    urls = [f"{fleet.api}{path}" for path in ("/metrics", "/readyz", "/openapi.json", "/docs")]
    urls += [f"http://{bind}/metrics" for bind in binds.values()]
    found = {url: httpx.get(url, timeout=60).text for url in urls}
    assert all(found.values())
    return found


# -- what is checked -------------------------------------------------------------------------


def test_nothing_secret_is_said_anywhere(told: Told):
    leaks = told.leaks()
    assert not leaks, "\n".join(leaks)


def test_the_fleet_did_say_something_everywhere(told: Told):
    """The search could have found something: each place is there, and speaks of these jobs."""
    logs = {where: text for where, text in told.said.items() if where.endswith("log")}
    assert {"gateway.log", "worker.log", "tasks.log"} <= set(logs)
    assert "job.accepted" in logs["gateway.log"]
    assert "engine.died" in logs["worker.log"]
    assert "job.ended" in logs["worker.log"]
    assert "job.accept" in told.said["traces"]
    assert any("headrace_" in text for where, text in told.said.items() if "/metrics" in where)


def test_the_search_finds_what_is_there():
    told = Told({"prompt": PROMPT}, {"a": f"x {PROMPT}", "b": urllib.parse.quote(PROMPT), "c": ""})
    assert told.leaks() == ["prompt in a", "prompt in b"]
