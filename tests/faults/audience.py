"""Many cheap listeners on a few running jobs, and some that do not read.

A listener is a socket and a regular expression: thousands fit beside the fleet on two cores. When
Redis publishes a frame of new tokens is known by listening to the gateways' channels as well.

Invariants:
1. Each listener that reads gets its job's indexes contiguously; the first that does not ends the
   scenario with an AssertionError.
2. A listener that does not read has a small receive buffer, so that what it is sent soon waits in
   the gateway and not in this machine's kernel.
3. Leaving the context ends all listeners, cancels the jobs and waits for their ends.

Called by: scenarios_streams.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import redis.asyncio

from headrace.contract import keys, wire
from headrace.tests.faults.record import now_s
from headrace.tests.faults.scenario import Run

#: Bytes the kernel holds for a listener that does not read.
SLOW_BUFFER_BYTES = 4096
#: Listeners connected at a time: more would overflow the gateway's backlog of new connections.
AT_A_TIME = 50
#: Seconds after the last listener came in which the gateway and the streams settle.
SETTLE_S = 1.0

_TOKENS = re.compile(rb'"index":(\d+),"count":(\d+)')


class Listener(asyncio.Protocol):
    """One connection to a job's stream."""

    def __init__(self, audience: Audience, job: str) -> None:
        self._audience = audience
        self._job = job
        self._next: int | None = None  # index of the next token; None: none has come yet
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        at_s = now_s()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if (found := _TOKENS.search(event)) is None:
                continue
            first, count = int(found[1]), int(found[2])
            if self._next is not None and first != self._next:
                self._audience.broken.append(f"{self._job}: {first} after {self._next - 1}")
            self._next = first + count
            self._audience.saw(self._job, first, at_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._audience.is_over:
            self._audience.broken.append(f"{self._job}: a listener's connection ended: {exc}")


class Audience:
    """Listeners of one round."""

    def __init__(self, run: Run, per_job: int) -> None:
        self._run = run
        self._per_job = per_job
        api = urlsplit(run.clients.apis[0])
        self._address = (api.hostname or "", api.port or 0)
        self._connections: list[asyncio.BaseTransport | socket.socket] = []
        self._jobs: dict[str, str] = {}  # job -> tenant
        self._follows: list[asyncio.Task[Any]] = []
        self._published_s: dict[tuple[str, int], float] = {}
        self._delays_s: list[float] = []
        self.broken: list[str] = []
        self.is_over = False

    async def begin(self, num_jobs: int, num_tokens: int) -> None:
        """Start the jobs and let the listeners come."""
        clients = self._run.clients
        for _ in range(num_jobs):
            asked = self._run.next_asked((num_tokens, num_tokens))
            job = await clients.submit(asked)
            assert job is not None, "a job to listen to was refused"
            self._jobs[job] = asked.tenant
            self._follows.append(asyncio.create_task(clients.follow(job, asked.tenant)))
        wanted = [job for job in self._jobs for _ in range(self._per_job)]
        for start in range(0, len(wanted), AT_A_TIME):
            await asyncio.gather(*(self._listen_to(job) for job in wanted[start:][:AT_A_TIME]))
        await asyncio.sleep(SETTLE_S)

    async def add_slow(self, count: int, long: str, tenant: str) -> None:
        """Let listeners come that never read: of running jobs, and of a long one that has ended."""
        running = list(self._jobs)
        loop = asyncio.get_running_loop()
        for number in range(count):
            job = running[number % len(running)] if number % 2 else long
            key = self._run.clients.keys[self._jobs.get(job, tenant)]
            sock = socket.socket()
            self._connections.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER_BYTES)
            sock.setblocking(False)
            await loop.sock_connect(sock, self._address)
            await loop.sock_sendall(sock, self._request(job, key))

    async def listen(self, seconds: float) -> list[float]:
        """Return the delays of all events of the next so many seconds."""
        self._delays_s.clear()
        await asyncio.sleep(seconds)
        assert not self.broken, f"{len(self.broken)} listeners: {self.broken[:3]}"
        return list(self._delays_s)

    def saw(self, job: str, first: int, at_s: float) -> None:
        published_s = self._published_s.get((job, first))
        if published_s is not None:
            self._delays_s.append(max(0.0, at_s - published_s))

    async def __aenter__(self) -> Self:
        self._redis = redis.asyncio.Redis.from_url(self._run.stage.valkey.url)
        self._pubsub: Any = self._redis.pubsub()
        await self._pubsub.psubscribe(keys.shard_channel("*"))
        self._watch = asyncio.create_task(self._watch_frames())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_over = True
        for connection in self._connections:
            connection.close()
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self._pubsub.aclose()
        await self._redis.aclose()
        for job, tenant in self._jobs.items():
            await self._run.clients.cancel(job, tenant)
        await asyncio.gather(*self._follows)

    async def _watch_frames(self) -> None:
        async for message in self._pubsub.listen():
            if message["type"] != "pmessage":
                continue
            at_s = now_s()
            for part in wire.split_frame(message["data"]):
                chunk = wire.decode_stream(part)
                if isinstance(chunk, wire.TokenChunk):
                    self._published_s[chunk.job, chunk.first] = at_s

    async def _listen_to(self, job: str) -> None:
        host, port = self._address
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: Listener(self, job), host, port)
        self._connections.append(transport)
        transport.write(self._request(job, self._run.clients.keys[self._jobs[job]]))

    def _request(self, job: str, key: str) -> bytes:
        head = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: {self._address[0]}\r\n"
        return f"{head}Authorization: Bearer {key}\r\n\r\n".encode()


def memory_bytes(leader: int) -> int:
    """Return what a program and all it started hold in memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if os.getpgid(int(entry.name)) == leader:
                found += int((entry / "statm").read_text().split()[1]) * page
        except (OSError, IndexError):
            continue
    return found
