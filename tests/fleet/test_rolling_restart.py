"""Workers and gateways restarted one after the other under load: no job fails, nobody sees a fault.

Two gateways and two workers; clients go to the other gateway when one refuses the connection, as a
proxy in front does, and keep every status they were answered with.
"""

import itertools
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from headrace.tests.fleet.fleet_parts import (
    PATIENCE_S,
    Event,
    Fleet,
    check_stream,
    parse_events,
    wait_for,
)
from headrace.worker.engine.stub import stub_token

VOCAB = 49152
NUM_TOKENS = 200  # four seconds
ENDS = ("succeeded", "failed", "canceled", "expired")
GATEWAYS = ("gateway", "gateway2")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_folder) -> Iterator[Fleet]:
    settings = {
        "HEADRACE_RUNNER": "stub",
        "HEADRACE_STUB_STEP_MS": "20",
        "HEADRACE_DRAIN_S": "0.1",  # shorter than a job: each stop hands back what runs
    }
    made = Fleet(tmp_path_factory.mktemp("rolling"), smollm2_folder, settings)
    made.start_servers()
    try:
        made.start("tasks", "tasks")
        made.start_gateway()
        for name in ("a", "b"):
            made.start_worker(name)
        yield made
    finally:
        made.stop()


@dataclass
class Clients:
    """What all clients do, on the gateways that answer."""

    fleet: Fleet
    urls: dict[str, str]
    statuses: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def follow(self, seed: int, idempotency_key: str) -> tuple[str, list[Event]]:
        """Submit a job and follow it to its end, through whatever happens."""
        body = {
            "model": self.fleet.model.name,
            "prompt": "p",
            "sampling": {"max_tokens": NUM_TOKENS, "temperature": 1.0, "seed": seed},
        }
        named = {"Idempotency-Key": idempotency_key}
        job = self.send("POST", "/v1/jobs", json=body, headers=named).json()["id"]
        events: list[Event] = []
        deadline = time.monotonic() + 2 * PATIENCE_S
        while time.monotonic() < deadline:
            last = next((e.id for e in reversed(events) if e.id is not None), "-1")
            try:
                for event in self.events(job, last):
                    events.append(event)
                    if event.name in ENDS:
                        return job, events
            except httpx.HTTPError:
                continue
        raise AssertionError(f"{job} has no end")

    def send(self, method: str, path: str, **kwargs) -> httpx.Response:
        """Send a request until a gateway accepts it; every answer is kept."""
        headers = {"Authorization": f"Bearer {self.fleet.key}", **kwargs.pop("headers", {})}
        deadline = time.monotonic() + PATIENCE_S
        for url in itertools.cycle(random.sample(list(self.urls.values()), len(self.urls))):
            assert time.monotonic() < deadline, "no gateway answers"
            try:
                answer = httpx.request(
                    method, url + path, headers=headers, timeout=PATIENCE_S, **kwargs
                )
            except httpx.TransportError:
                continue  # it stops, or is not there yet: the key makes a repeat harmless
            self.statuses.append(answer.status_code)
            if answer.status_code != 503:
                return answer
        raise AssertionError("not reached")

    def events(self, job: str, last: str) -> Iterator[Event]:
        url = random.choice(list(self.urls.values())) + f"/v1/jobs/{job}/events"
        headers = {"Authorization": f"Bearer {self.fleet.key}", "Last-Event-ID": last}
        with httpx.stream("GET", url, headers=headers, timeout=PATIENCE_S) as response:
            self.statuses.append(response.status_code)
            response.raise_for_status()
            yield from parse_events(response.iter_lines())


@pytest.fixture
def clients(fleet) -> Iterator[Clients]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    fleet.start("gateway2", "gateway", HEADRACE_BIND=f"127.0.0.1:{port}")
    wait_for(lambda: is_ready(url), "the second gateway is ready", fleet)
    yield Clients(fleet, {"gateway": fleet.api, "gateway2": url})
    if "gateway2" in fleet.processes:
        fleet.end("gateway2")


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def restart_gateway(fleet: Fleet, clients: Clients, name: str) -> None:
    bind = clients.urls[name].removeprefix("http://")
    assert fleet.end(name) == 0
    fleet.start(name, "gateway", HEADRACE_BIND=bind)
    wait_for(lambda: is_ready(clients.urls[name]), f"{name} is ready", fleet)


def restart_worker(fleet: Fleet, name: str) -> None:
    log = fleet.folder / f"{name}.log"
    size = log.stat().st_size
    wait_for(lambda: "job.started" in log.read_text()[size:], f"{name} has begun a job", fleet)
    assert fleet.end(name) == 0
    fleet.start_worker(name)


def test_a_rolling_restart_under_load_fails_no_job(fleet, clients):
    results: dict[int, tuple[str, list[Event]]] = {}
    stop = threading.Event()
    numbers = itertools.count()

    def load() -> None:
        while not stop.is_set():
            number = next(numbers)
            try:
                results[number] = clients.follow(number, f"key-{number}")
            except Exception as error:  # noqa: BLE001  told by the test's own thread
                clients.failures.append(repr(error))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for gateway, worker in zip(GATEWAYS, ("a", "b"), strict=True):
            restart_worker(fleet, worker)
            restart_gateway(fleet, clients, gateway)
    finally:
        stop.set()
        for thread in threads:
            thread.join(3 * PATIENCE_S)
    assert clients.failures == []
    assert len(results) >= 8
    assert {status for status in clients.statuses if status >= 400} <= {503}
    moved = 0
    for seed, (job, events) in results.items():
        assert [e.name for e in events if e.name in ENDS] == ["succeeded"]
        assert "reset" not in [e.name for e in events]
        text, ids = check_stream(events)
        assert ids == [stub_token(seed, index, VOCAB) for index in range(NUM_TOKENS)]
        row = clients.send("GET", f"/v1/jobs/{job}").json()
        assert (row["status"], row["output"]["text"]) == ("succeeded", text)
        moved += row["attempt"] > 1
    assert moved > 0, "some jobs were handed from one worker to another"
    said = "".join((fleet.folder / f"{name}.log").read_text() for name in GATEWAYS)
    assert "Traceback" not in said


def test_a_gateway_that_stops_answers_what_it_has_begun(fleet, clients):
    """A request that waits for its job gets its 202; the stream ends without an end event."""
    slow = {"max_tokens": 3000}  # a minute
    body = {"model": fleet.model.name, "prompt": "p", "sampling": slow}
    answers: list[httpx.Response] = []
    headers = {"Authorization": f"Bearer {fleet.key}", "Prefer": "wait=60"}

    def wait() -> None:
        url = clients.urls["gateway2"] + "/v1/jobs"
        answers.append(httpx.post(url, json=body, headers=headers, timeout=PATIENCE_S))

    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_for(lambda: num_running(fleet) > 0, "its job runs", fleet)
    job = fleet.call("GET", "/v1/jobs").json()["data"][0]["id"]
    url = clients.urls["gateway2"] + f"/v1/jobs/{job}/events"
    key = {"Authorization": f"Bearer {fleet.key}"}
    with httpx.stream("GET", url, headers=key, timeout=PATIENCE_S) as response:
        lines = response.iter_lines()
        assert next(lines) == "retry: 1000"
        assert any(line.startswith("id: ") for line in lines)
        fleet.processes["gateway2"].send_signal(signal.SIGTERM)
        names = [line for line in lines if line.startswith("event: ")]
    assert not {f"event: {name}" for name in ENDS} & set(names)
    waiting.join(PATIENCE_S)
    (answer,) = answers
    assert answer.status_code == 202
    assert fleet.processes.pop("gateway2").wait(PATIENCE_S) == 0
    said = (fleet.folder / "gateway2.log").read_text()
    assert "graceful timeout" not in said
    assert "Traceback" not in said
    fleet.call("POST", f"/v1/jobs/{job}/cancel")


def num_running(fleet: Fleet) -> int:
    jobs = fleet.call("GET", "/v1/jobs", params={"status": "running"}).json()["data"]
    return len(jobs)
