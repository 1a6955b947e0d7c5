"""The gateway as it is deployed: gunicorn, gevent workers, two processes, real sockets."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from headrace.contract.accounts import NewKey
from headrace.contract.settings import GatewaySettings
from headrace.gateway.services import Services
from headrace.tests.gateway.courier import MODEL, Courier

COMMAND = [
    sys.executable,
    "-m",
    "gunicorn",
    "-c",
    "python:headrace.gateway.server",
    "headrace.gateway.app:create_app_from_env()",
]


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20)


@contextmanager
def running_gateway(
    settings: GatewaySettings, log: Path, *, num_processes: int
) -> Iterator[Running]:
    """gunicorn on a port that is already bound, so that no other can take it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")},
            **settings.to_env(),
            "HEADRACE_BIND": f"fd://{listener.fileno()}",
            "HEADRACE_GATEWAY_PROCESSES": str(num_processes),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        with log.open("wb") as out:
            process = subprocess.Popen(
                COMMAND, env=env, stderr=out, stdout=out, pass_fds=[listener.fileno()]
            )
        running = Running(process, f"http://127.0.0.1:{listener.getsockname()[1]}", log)
    try:
        # The socket listens already: the first answer comes when a process is there.
        assert running.get("/readyz").json()["status"] == "ready"
        yield running
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def server(
    settings: GatewaySettings, app: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """Two processes, shared by the tests of this file."""
    log = tmp_path_factory.mktemp("gunicorn") / "log"
    with running_gateway(settings, log, num_processes=2) as running:
        yield running


@pytest.fixture
def http(server: Running, key: NewKey) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key.secret}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=20) as client:
        yield client


def post(http: httpx.Client, **headers: str) -> httpx.Response:
    return http.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}, headers=headers)


def until(lines: Iterator[str], word: str) -> list[str]:
    found: list[str] = []
    for line in lines:
        found.append(line)
        if line.startswith(word):
            return found
    raise AssertionError(f"the stream ended without {word!r}: {found}")


def test_a_job_is_streamed_to_subscribers_of_both_processes(http, courier: Courier):
    job = post(http).json()["id"]
    texts: list[str] = []

    def follow(_: int) -> str:
        text = ""
        with http.stream("GET", f"/v1/jobs/{job}/events") as response:
            for line in response.iter_lines():
                if line.startswith("data: ") and '"text"' in line:
                    text += json.loads(line[6:])["text"]
        return text

    with ThreadPoolExecutor(8) as pool:
        following = [pool.submit(follow, n) for n in range(8)]
        held = courier.take()
        for _ in range(20):
            courier.say(held, 3)
        courier.end(held)
        texts = [one.result(20) for one in following]
    assert texts == [held.text] * 8


def test_prefer_wait_holds_greenlets_not_processes(http, courier: Courier, services: Services):
    """Twenty waits on two processes, each answered when its job ends."""
    with ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(post, http, Prefer="wait=15") for _ in range(20)]
        for _ in range(20):
            deadline = time.monotonic() + 15
            while not any(depth.num_queued for depth in services.streams.depths(MODEL)):
                assert time.monotonic() < deadline
            held = courier.take()
            courier.say(held, 1)
            courier.end(held)
        responses = [one.result(20) for one in waiting]
    assert [r.status_code for r in responses] == [200] * 20
    assert all(r.json()["status"] == "succeeded" for r in responses)


def test_a_chunked_body_is_read_and_bounded(http):
    good = iter([b'{"model": "tiny", ', b'"prompt": "x"}'])
    json_type = {"Content-Type": "application/json"}
    assert http.post("/v1/jobs", content=good, headers=json_type).status_code == 202
    endless = (b" " * 4096 for _ in range(32))
    response = http.post("/v1/jobs", content=endless, headers=json_type)
    assert response.status_code == 413
    assert response.json()["code"] == "body_too_large"


def test_a_client_that_left_is_noticed_by_the_heartbeat(http, server, courier, services):
    job = post(http).json()["id"]
    with http.stream("GET", f"/v1/jobs/{job}/events") as response:
        until(response.iter_lines(), "event: queued")
        assert wishes(services, job) == 1
    deadline = time.monotonic() + 15
    while wishes(services, job):
        assert time.monotonic() < deadline


def test_metrics_add_up_over_the_processes(http, server):
    ids = [post(http).json()["id"] for _ in range(40)]
    assert len(set(ids)) == 40
    counts = {
        line.split()[-1]
        for _ in range(10)
        for line in server.get("/metrics").text.splitlines()
        if line.startswith("headrace_jobs_accepted_total{") and MODEL in line
    }
    assert len(counts) == 1  # whichever process answers
    assert float(counts.pop()) >= 40


def test_redis_connections_do_not_run_out_in_a_burst(http, services, courier):
    def one(_: int) -> int:
        return post(http).status_code

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(one, range(200))) == {202}
    (depth,) = services.streams.depths(MODEL)
    assert depth.num_queued == 200


def test_a_stop_ends_streams_and_leaves_their_jobs(settings, app, key, courier, tmp_path):
    headers = {"Authorization": f"Bearer {key.secret}"}
    with running_gateway(settings, tmp_path / "log", num_processes=1) as own:
        with httpx.Client(base_url=own.url, headers=headers, timeout=20) as http:
            job = post(http).json()["id"]
            held = courier.take()
            courier.say(held, 2)
            with http.stream("GET", f"/v1/jobs/{job}/events") as response:
                lines = response.iter_lines()
                assert "id: 1" in until(lines, "id: ")
                own.process.terminate()
                assert not any(line.startswith("event: ") for line in lines)
        assert own.process.wait(20) == 0
        log = own.log.read_text()
        assert "gateway.stopped" in log, "the stream was not ended, its process was killed"
        assert "Traceback" not in log
    courier.say(held, 1)
    courier.end(held)


def test_a_stop_ends_connections_that_wait_for_their_next_request(settings, app, tmp_path):
    with running_gateway(settings, tmp_path / "log", num_processes=1) as own:
        with httpx.Client(base_url=own.url, timeout=20) as http:
            assert http.get("/healthz").status_code == 200  # and its connection is kept
            own.process.terminate()
            assert own.process.wait(20) == 0
        assert "gateway.stopped" in own.log.read_text(), "its process was killed for it"


def test_nothing_of_requests_is_logged(server, http, key):
    secret = "a-secret-of-the-user"
    body = {"model": MODEL, "prompt": secret}
    assert http.post("/v1/jobs?x=" + secret, json=body).status_code == 202
    log = server.log.read_text()
    assert "job.accepted" in log
    assert secret not in log
    assert key.secret not in log
    assert "Traceback" not in log


def wishes(services: Services, job: str) -> int:
    from headrace.contract import keys

    return services.redis.zcard(keys.subscribers(MODEL, job))
