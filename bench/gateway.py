"""How many POSTs and status GETs a second the gateway answers on this machine.

    PYTHONPATH=.imports python bench/gateway.py [--seconds 5] [--processes 2] [--connections 32]

Real servers (the embedded ones, durable), gunicorn with gevent, and a load generator of raw
keep-alive connections in this process: on two cores all of them share the cores, so the figures are
what the machine does, not what the gateway alone could do. The gateway's own CPU time a request
does not depend on who else is busy (but for the caches); 1000 / it = requests a second and core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from headrace.contract import database, wire
from headrace.contract.accounts import Accounts
from headrace.contract.ledger import Ledger
from headrace.fleet.postgres import start_postgres
from headrace.fleet.valkey import start_valkey

MODEL = "bench"


@dataclass
class Tally:
    statuses: dict[int, int] = field(default_factory=dict[int, int])
    latencies_ms: list[float] = field(default_factory=list[float])
    last_body: bytes = b""


async def hammer(
    host: str, port: int, request: Callable[[], bytes], until: float, tally: Tally
) -> None:
    """Send one request after another over one connection."""
    reader, writer = await asyncio.open_connection(host, port)
    while time.perf_counter() < until:
        sent = time.perf_counter()
        writer.write(request())
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        tally.last_body = await reader.readexactly(length)
        tally.latencies_ms.append((time.perf_counter() - sent) * 1000)
        status = int(head[9:12])
        tally.statuses[status] = tally.statuses.get(status, 0) + 1
    writer.close()


async def load(port: int, request: Callable[[], bytes], *, seconds: float, num: int) -> Tally:
    tally = Tally()
    until = time.perf_counter() + seconds
    await asyncio.gather(*(hammer("127.0.0.1", port, request, until, tally) for _ in range(num)))
    return tally


def request_bytes(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def cpu_s(master: int) -> float:
    """Return the CPU seconds gunicorn's processes have used, from /proc."""
    pids = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def run(name: str, port: int, master: int, request: bytes, options: argparse.Namespace) -> Tally:
    """Load the gateway with one request over and over, and print what came of it."""
    seconds, used = options.seconds, cpu_s(master)
    tally = asyncio.run(load(port, lambda: request, seconds=seconds, num=options.connections))
    used = cpu_s(master) - used
    latencies = sorted(tally.latencies_ms)
    p50, p99 = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
    print(
        f"{name:12} {len(latencies) / seconds:6.0f} /s  p50 {p50:5.1f} ms  p99 {p99:5.1f} ms  "
        f"gateway CPU {used / len(latencies) * 1000:4.2f} ms  {tally.statuses}  "
        f"load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return tally


def gunicorn(env: dict[str, str], listener: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gunicorn", "-c", "python:headrace.gateway.server"]
    command.append("headrace.gateway.app:create_app_from_env()")
    variables = {**os.environ, **env, "HEADRACE_BIND": f"fd://{listener.fileno()}"}
    return subprocess.Popen(command, env=variables, pass_fds=[listener.fileno()])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        start_valkey(Path(folder)) as valkey,
        start_postgres(Path(folder)) as postgres,
        socket.socket() as listener,
    ):
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from headrace.fleet.migrate import migrate; migrate(sys.argv[1])",
                postgres.url,
            ],
            check=True,
        )
        engine = database.connect(postgres.url)
        accounts = Accounts(engine)
        key = accounts.create_key(tenant="bench", name="bench").secret
        accounts.register_model(
            wire.ModelCard(
                name=MODEL,
                folder="/nowhere",
                max_seq_tokens=8192,
                vocab_size=50_000,
                dtype="float32",
                has_chat_template=True,
            )
        )
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        server = gunicorn(
            {
                "HEADRACE_REDIS_URL": valkey.url,
                "HEADRACE_DATABASE_URL": postgres.url,
                "HEADRACE_GATEWAY_PROCESSES": str(options.processes),
                "HEADRACE_LOG_LEVEL": "WARNING",
            },
            listener,
        )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=30) as answer:
                answer.read()
            measure(port, server.pid, key, Ledger(engine), options)
        finally:
            server.terminate()
            server.wait(30)
            engine.dispose()


def measure(port: int, master: int, key: str, ledger: Ledger, options: argparse.Namespace) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Once upon a time " * 20}).encode()
    post = request_bytes("POST", "/v1/jobs", key, body)
    asyncio.run(load(port, lambda: post, seconds=1, num=options.connections))  # warm
    posted = run("POST", port, master, post, options)
    job = json.loads(posted.last_body)["id"]
    run("GET", port, master, request_bytes("GET", f"/v1/jobs/{job}", key), options)
    run("GET healthz", port, master, request_bytes("GET", "/healthz", key), options)
    left = len(ledger.outbox_jobs(older_than_s=1, limit=1000))
    print(f"jobs whose enqueue was not confirmed within a second: {left}")


if __name__ == "__main__":
    main()
