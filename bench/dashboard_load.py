"""What open dashboards cost the gateway: its CPU with and without browsers, under a steady load.

    python -m bench.dashboard_load [--browsers 20] [--jobs-per-min 1000] [--seconds 30] [--rounds 4]

Starts a fleet of its own (stub engine, one gateway process) and submits jobs at an even pace all
the time. Rounds without and with browsers take turns, so both see the same machine. A browser here
is a connection to /v1/admin/feed that reads all it is sent. Prints the CPU of the gateway's
processes as a share of one core, from /proc, and the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from headrace.bench.own_fleet import own_fleet
from headrace.contract import database
from headrace.contract.accounts import Accounts
from headrace.contract.roles import Role
from headrace.fleet.access import read_access

MODEL = "smollm2-135m-instruct"
BODY = {"model": MODEL, "prompt": "p", "sampling": {"max_tokens": 32}}


@dataclass
class Heard:
    """What the browsers were sent in a round."""

    num_events: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Api:
    host: str
    port: int
    key: str  # of a tenant
    viewer_key: str

    def request(self, method: str, path: str, *, key: str, body: bytes = b"") -> bytes:
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body


def gateway_pids() -> list[int]:
    """Return the gateway's processes among those this benchmark started."""
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").iterdir():
            todo += map(int, (task / "children").read_text().split())
        if b"headrace.gateway.server" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found.append(pid)
    return found


def cpu_s(pids: list[int]) -> float:
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


async def submit_evenly(api: Api, per_min: float, stop: asyncio.Event, answers: list[int]) -> None:
    """POST jobs at an even pace over one connection until told to stop."""
    reader, writer = await asyncio.open_connection(api.host, api.port)
    post = api.request("POST", "/v1/jobs", key=api.key, body=json.dumps(BODY).encode())
    due = time.perf_counter()
    while not stop.is_set():
        writer.write(post)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        answers.append(int(head[9:12]))
        due += 60 / per_min
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    writer.close()


async def browse(api: Api, heard: Heard) -> None:
    """Read the feed until cancelled."""
    reader, writer = await asyncio.open_connection(api.host, api.port)
    try:
        writer.write(api.request("GET", "/v1/admin/feed", key=api.viewer_key))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the feed was refused: {head[:60]!r}")
        while data := await reader.read(1 << 16):
            heard.num_events += data.count(b"event: ")
            heard.num_bytes += len(data)
        raise RuntimeError("the feed ended by itself")
    finally:
        writer.close()


async def one_round(api: Api, pids: list[int], seconds: float, num_browsers: int) -> float:
    """Return the gateway's CPU as a share of one core, with so many browsers."""
    heard = Heard()
    browsers = [asyncio.create_task(browse(api, heard)) for _ in range(num_browsers)]
    await asyncio.sleep(2)  # opening them is no part of it
    heard.num_events = heard.num_bytes = 0
    used, started = cpu_s(pids), time.perf_counter()
    await asyncio.sleep(seconds)
    share = (cpu_s(pids) - used) / (time.perf_counter() - started)
    ended = [task for task in browsers if task.done()]
    for task in browsers:
        task.cancel()
    await asyncio.gather(*browsers, return_exceptions=True)
    if ended:
        ended[0].result()  # raises why
    rate = heard.num_events / seconds / max(1, num_browsers)
    print(
        f"{num_browsers:3d} browsers  gateway CPU {share:6.2%}  "
        f"{rate:.2f} events/s and {heard.num_bytes / seconds / max(1, num_browsers):6.0f} B/s each"
        f"  load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    return share


async def measure(api: Api, options: argparse.Namespace) -> None:
    pids, answers, stop = gateway_pids(), list[int](), asyncio.Event()
    load = asyncio.create_task(submit_evenly(api, options.jobs_per_min, stop, answers))
    shares: dict[int, list[float]] = {0: [], options.browsers: []}
    await asyncio.sleep(10)  # first jobs, first samples
    for _ in range(options.rounds):
        for num, found in shares.items():
            found.append(await one_round(api, pids, options.seconds, num))
    stop.set()
    await load
    without, with_them = (statistics.median(found) for found in shares.values())
    print(f"jobs {len(answers)}, answers {sorted(set(answers))}")
    print(
        f"median without {without:.2%}, with {options.browsers} browsers {with_them:.2%}: "
        f"they cost {with_them - without:.2%} of a core"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browsers", type=int, default=20)
    parser.add_argument("--jobs-per-min", type=float, default=1000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    settings = {"HEADRACE_RUNNER": "stub", "HEADRACE_STUB_STEP_MS": "5"}
    with tempfile.TemporaryDirectory() as folder, own_fleet(Path(folder), **settings) as fleet:
        access = read_access(Path(folder))
        if access is None:
            raise RuntimeError("the fleet left no access file")
        engine = database.connect(access.database_url, pool_size=1)
        viewer = Accounts(engine).create_key(tenant="bench", name="viewer", role=Role.VIEWER)
        engine.dispose()
        address = urlsplit(fleet["api_url"])
        if address.hostname is None or address.port is None:
            raise RuntimeError(f"the API's address is {fleet['api_url']!r}")
        api = Api(address.hostname, address.port, fleet["api_key"], viewer.secret)
        asyncio.run(measure(api, options))


if __name__ == "__main__":
    main()
