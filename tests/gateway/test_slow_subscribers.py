"""Subscribers that read slowly or not at all: bounded, caught up from the log, cut off in the end.

The gateway is gunicorn's with real sockets; the slow ones have a small window and do not read.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from headrace.contract.settings import GatewaySettings
from headrace.gateway import follower, outlet
from headrace.gateway.services import Services
from headrace.gateway.stream import LOG_PAGE
from headrace.tests.gateway.conftest import card
from headrace.tests.gateway.courier import MODEL, Courier
from headrace.tests.gateway.reader import TERMINAL
from headrace.tests.gateway.test_server import Running, running_gateway

#: Tokens of a chunk here, and chunks that overflow mailbox and buffers several times over.
CHUNK, NUM_CHUNKS = 200, 100


@pytest.fixture(scope="module")
def server(
    settings: GatewaySettings, services: Services, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A patient gateway: it cuts nobody off while a test has other things to do."""
    services.accounts.register_model(card(max_seq_tokens=1 << 20))
    log = tmp_path_factory.mktemp("gunicorn") / "log"
    with running_gateway(settings, log, num_processes=1) as running:
        yield running


@pytest.fixture
def strict(settings: GatewaySettings, server: Running, tmp_path) -> Iterator[Running]:
    """A gateway that cuts off whoever takes nothing for half a second."""
    quick = GatewaySettings.model_validate(dict(settings) | {"write_timeout_s": 0.5})
    with running_gateway(quick, tmp_path / "strict.log", num_processes=1) as running:
        yield running


@pytest.fixture
def http(server: Running, key) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key.secret}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


class Slow:
    """A subscriber with a socket of its own, which reads when it is told to."""

    def __init__(self, server: Running, key: str, job: str, after: int = -1) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(60)
        host, port = server.url.removeprefix("http://").split(":")
        self.sock.connect((host, int(port)))
        self.sock.sendall(
            f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Last-Event-ID: {after}\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        )
        self.received = bytearray()

    def read(self, size: int = 1 << 16) -> bool:
        """Take some bytes; False at the end."""
        try:
            part = self.sock.recv(size)
        except ConnectionResetError:
            return False
        self.received.extend(part)
        return bool(part)

    def indexes(self) -> list[int]:
        """Return the index of each token in whole events that have come."""
        found: list[int] = []
        for block in self.body().split(b"\n\n"):
            if block.startswith(b"event: token") and block.endswith(b"}"):
                data = json.loads(block.split(b"data: ")[1])
                found += range(data["index"], data["index"] + data["count"])
        return found

    def body(self) -> bytes:
        """Return what came without HTTP's chunks, as far as they are whole."""
        raw, parts = bytes(self.received), list[bytes]()
        at = raw.find(b"\r\n\r\n") + 4
        while (end := raw.find(b"\r\n", at)) > 0:
            size = int(raw[at:end], 16)
            parts.append(raw[end + 2 : end + 2 + size])
            at = end + 4 + size
        return b"".join(parts)

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def slow(server: Running, key) -> Iterator[Callable[..., Slow]]:
    made: list[Slow] = []

    def make(job: str, after: int = -1, on: Running = server) -> Slow:
        made.append(Slow(on, key.secret, job, after))
        return made[-1]

    yield make
    for one in made:
        one.close()


def post(http: httpx.Client) -> str:
    body = {"model": MODEL, "prompt": "x", "sampling": {"max_tokens": 100_000}}
    response = http.post("/v1/jobs", json=body)
    assert response.status_code == 202
    return response.json()["id"]


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def say_much(courier: Courier, held, num_chunks: int = NUM_CHUNKS) -> None:
    for _ in range(num_chunks):
        courier.say(held, CHUNK)


def test_one_that_reads_again_gets_all_of_it_in_order(http, slow, courier):
    job = post(http)
    reader = slow(job)
    held = courier.take()
    assert reader.read(1024)
    resyncs = metric(http, "headrace_stream_log_reads_total")
    say_much(courier, held)
    courier.end(held)
    while reader.read():
        pass
    assert reader.indexes() == list(range(CHUNK * NUM_CHUNKS))
    assert reader.body().rstrip().rpartition(b"event: ")[2].split(b"\n")[0].decode() in TERMINAL
    assert metric(http, "headrace_stream_log_reads_total") > resyncs, "its mailbox overflowed"


def test_one_that_takes_nothing_is_cut_off_and_may_resume(http, strict, slow, courier):
    job = post(http)
    reader = slow(job, on=strict)
    held = courier.take()
    say_much(courier, held)
    with httpx.Client(base_url=strict.url, timeout=60) as there:
        wait_for(lambda: metric(there, "headrace_streams_cut_total") == 1)
        wait_for(lambda: metric(there, "headrace_live_streams") == 0)
    while reader.read():
        pass
    seen = reader.indexes()
    assert seen == list(range(len(seen)))
    assert len(seen) < CHUNK * NUM_CHUNKS
    again = slow(job, after=len(seen) - 1)
    courier.end(held)
    while again.read():
        pass
    assert seen + again.indexes() == list(range(CHUNK * NUM_CHUNKS))
    log = strict.log.read_text()
    assert "Traceback" not in log
    assert "Socket error" not in log


def test_many_that_do_not_read_cost_little_and_hold_up_nobody(http, slow, courier):
    """Forty do not read a job of megabytes; one that does gets it all, and memory stays flat."""
    pid = int(metric_label(http, "process_resident_memory_bytes", "gateway"))
    job = post(http)
    readers = [slow(job) for _ in range(40)]
    held = courier.take()
    courier.say(held, CHUNK)
    for reader in readers:
        assert reader.read(512)
    before = resident_bytes(pid)
    well = slow(job)
    say_much(courier, held)
    courier.end(held)
    while well.read():
        pass
    assert well.indexes() == list(range(CHUNK * (NUM_CHUNKS + 1)))
    page_bytes = min(LOG_PAGE, NUM_CHUNKS) * follower.size_of(courier.chunk(held, CHUNK))
    bound = 40 * (page_bytes + follower.MAX_BYTES + outlet.PIECE_BYTES)
    grown = resident_bytes(pid) - before
    assert grown < bound, f"{grown:,} bytes more, {bound:,} allowed"


def test_a_stop_waits_for_no_client_that_does_not_read(settings, server, key, courier, tmp_path):
    headers = {"Authorization": f"Bearer {key.secret}"}
    with running_gateway(settings, tmp_path / "log", num_processes=1) as own:
        with httpx.Client(base_url=own.url, headers=headers, timeout=20) as client:
            job = post(client)
        reader = Slow(own, key.secret, job)
        held = courier.take()
        assert reader.read(512)
        say_much(courier, held)
        own.process.terminate()
        assert own.process.wait(30) == 0
        assert "graceful timeout" not in own.log.read_text()
        reader.close()
    courier.end(held)


def metric_label(http: httpx.Client, name: str, process: str) -> str:
    for line in http.get("/metrics").text.splitlines():
        if line.startswith(name) and f'process="{process}"' in line:
            return line.partition('pid="')[2].partition('"')[0]
    raise AssertionError(f"no {name} of {process}")


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the process is gone")
