"""The clients of a campaign: they submit, follow, reconnect, and never give up before the deadline.

One asyncio loop holds thousands of streams. A client does what a good client of the API does:
repeats a POST that got no answer or a 5xx with the same Idempotency-Key, goes to the next gateway
when one is away, and resumes a stream with the last event id it was given. It looks at the bytes
only as far as it must for that (the last complete event's id, whether it was the terminal one);
what they mean is the checker's business.

Invariants:
1. Everything that is received is recorded before it is acted on.
2. An event counts as received when its blank line has come, as the specification of server-sent
   events says; what was cut off is asked for again.
3. Nothing waits longer than the run's deadline.

Called by: campaign (makes it), scenario.Run, scenarios.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from headrace.tests.faults.record import (
    Answer,
    Asked,
    Canceled,
    Chunk,
    Closed,
    Opened,
    Recorder,
    now_s,
)

#: Names of terminal events.
ENDS = frozenset({b"succeeded", b"failed", b"canceled", b"expired"})
#: Statuses of a POST after which the same POST is sent again.
REPEATED = frozenset({0, 408, 429, 500, 502, 503, 504})
#: Seconds between two tries at a gateway that did not answer.
RETRY_S = 0.1
#: Seconds a stream may be silent before it is opened anew: several heartbeats.
SILENCE_S = 15.0
#: Seconds a POST may take.
POST_S = 30.0

_AWAY = (aiohttp.ClientError, TimeoutError, OSError)


@dataclass(slots=True)
class Followed:
    """One job's subscriber: where it is, and where its events went."""

    job: str
    tenant: str
    num_connections: int = 0
    last_id: str | None = None
    is_done: bool = False
    num_chunks: int = 0
    news_at_s: float = 0.0  # when bytes last came
    worker: str = ""  # that the last `started` named
    tail: bytes = b""  # of an event that is not complete yet

    def take(self, data: bytes) -> None:
        """Look for the last complete event's id, for a worker's name and for the end."""
        *complete, self.tail = (self.tail + data).rsplit(b"\n\n", 1)
        for event in complete[0].split(b"\n\n") if complete else ():
            for line in event.split(b"\n"):
                if line.startswith(b"id: "):
                    self.last_id = line[4:].decode()
                elif line.startswith(b"event: "):
                    self.is_done = self.is_done or line[7:] in ENDS
                elif line.startswith(b'data: {"job":') and b'"worker":"' in line:
                    self.worker = line.rpartition(b'"worker":"')[2].partition(b'"')[0].decode()


@dataclass
class Clients:
    """All clients of a run, over a list of gateways."""

    apis: list[str]
    keys: dict[str, str]  # tenant -> API key
    model: str
    recorder: Recorder
    deadline_s: float
    num_asked: int = 0
    num_accepted: int = 0
    num_ended: int = 0
    num_given_up: int = 0
    num_open: int = 0  # streams that hold a connection right now
    followed: dict[str, Followed] = field(default_factory=dict)  # jobs that have not ended
    read_delay_s: Callable[[Followed], float] | None = None  # a slow subscriber's pause a read
    _num_loading: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _gateway: int = 0

    async def open(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S)
        # Connections are used again, as by real clients: a killed gateway breaks them.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=10)
        self.session = aiohttp.ClientSession(
            timeout=timeout, connector=connector, read_bufsize=1 << 14
        )
        self.changed = asyncio.Event()  # set and cleared at each answer and each end

    async def close(self) -> None:
        """End every task and connection."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.session.close()

    @property
    def is_all_done(self) -> bool:
        """True when nothing more will be submitted and everything accepted has ended."""
        return not self._num_loading and self.num_asked > 0 and not self.followed

    # -- load --------------------------------------------------------------------------------

    async def load(self, asked: Iterable[Asked], in_flight: Callable[[], int]) -> None:
        """Submit each, so many not ended at a time; return when the last is accepted."""
        self._num_loading += 1
        submits: set[asyncio.Task[None]] = set()
        try:
            for each in asked:
                if not await self.until(lambda: len(submits) < in_flight(), self.deadline_s):
                    return
                self.num_asked += 1
                submits.add(task := asyncio.create_task(self._submit_and_follow(each)))
                self._keep(task)
                task.add_done_callback(submits.discard)
            while submits and any(not self._is_accepted(task) for task in submits):
                await self._next_change()
        finally:
            self._num_loading -= 1
            self._tell()

    async def submit(self, asked: Asked) -> str | None:
        """POST until there is an answer that counts; return the job's id, None if refused."""
        self.recorder.add(msgspec.structs.replace(asked, at_s=now_s()))
        body = self._body(asked)
        while now_s() < self.deadline_s:
            answer = await self._post(asked, body)
            self.recorder.add(answer)
            if answer.job is not None:
                self.num_accepted += 1
                self._tell()
                return answer.job
            if answer.status not in REPEATED:
                break
            await asyncio.sleep(RETRY_S)
        self.num_given_up += 1
        self._tell()
        return None

    async def follow(self, job: str, tenant: str) -> Followed:
        """Read the job's events to its end, through whatever happens; return the subscriber."""
        subscriber = self.followed.setdefault(job, Followed(job, tenant))
        while not subscriber.is_done and now_s() < self.deadline_s:
            how = await self._connection(subscriber)
            self.recorder.add(Closed(job, subscriber.num_connections, how, now_s()))
            subscriber.num_connections += 1
            subscriber.tail = b""
            if how != "end":
                await asyncio.sleep(RETRY_S)
        if subscriber.is_done:
            self.followed.pop(job, None)
            self.num_ended += 1
        self._tell()
        return subscriber

    async def cancel(self, job: str, tenant: str) -> int:
        """Ask for a cancel, again until there is an answer; return its status."""
        while now_s() < self.deadline_s:
            try:
                url = f"{self._next_api()}/v1/jobs/{job}/cancel"
                async with self.session.post(url, headers=self._auth(tenant)) as response:
                    status = response.status
            except _AWAY:
                status = 0
            self.recorder.add(Canceled(job, status, now_s()))
            if status not in REPEATED:
                return status
            await asyncio.sleep(RETRY_S)
        return 0

    async def output(self, job: str, tenant: str) -> dict[str, Any]:
        """Return what an ended job made."""
        url = f"{self._next_api()}/v1/jobs/{job}"
        async with self.session.get(url, headers=self._auth(tenant)) as response:
            return (await response.json())["output"]

    # -- waiting -----------------------------------------------------------------------------

    async def until_ended(self, count: float, deadline_s: float) -> None:
        """Wait until so many jobs have ended, or no more will be."""
        await self.until(lambda: self.num_ended >= count or self.is_all_done, deadline_s)

    async def until_done(self, deadline_s: float) -> None:
        await self.until(lambda: self.is_all_done, deadline_s)

    async def until(self, condition: Callable[[], bool], deadline_s: float) -> bool:
        """Wait until something that clients notice has come true; False when time is up."""
        while not condition():
            if now_s() >= deadline_s:
                return False
            await self._next_change()
        return True

    async def _next_change(self) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), 0.25)

    def _tell(self) -> None:
        self.changed.set()
        self.changed.clear()

    # -- one job -----------------------------------------------------------------------------

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _is_accepted(task: asyncio.Task[None]) -> bool:
        return task.done() or task.get_name().startswith("following")

    async def _submit_and_follow(self, asked: Asked) -> None:
        job = await self.submit(asked)
        if job is not None:
            self.followed.setdefault(job, Followed(job, asked.tenant))
            task = asyncio.current_task()
            assert task is not None
            task.set_name(f"following {job}")
            self._tell()
            await self.follow(job, asked.tenant)

    def _body(self, asked: Asked) -> bytes:
        prompt = "prompt" if isinstance(asked.prompt, str) else "prompt_token_ids"
        is_greedy = asked.reference is not None
        sampling = {
            "max_tokens": asked.num_tokens,
            "temperature": 0.0 if is_greedy else 1.0,
            "seed": asked.seed,
        }
        return json.dumps(
            {
                "model": self.model,
                prompt: asked.prompt,
                "sampling": sampling,
                "metadata": {"campaign": asked.key},
            }
        ).encode()

    async def _post(self, asked: Asked, body: bytes) -> Answer:
        headers = self._auth(asked.tenant) | {
            "Content-Type": "application/json",
            "Idempotency-Key": asked.key,
        }
        url = f"{self._next_api()}/v1/jobs"
        status, job, error = 0, None, ""
        try:
            timeout = aiohttp.ClientTimeout(total=POST_S)
            async with self.session.post(url, data=body, headers=headers, timeout=timeout) as got:
                said = json.loads(await got.read())
                status = got.status
                job = said.get("id") if status in (200, 202) else None
                error = said.get("code", "")
        except (*_AWAY, ValueError) as raised:
            status, job, error = 0, None, type(raised).__name__
        return Answer(asked.key, status, job, now_s(), error, asked.tenant)

    async def _connection(self, subscriber: Followed) -> str:
        """Hold one connection as long as it lasts; return what ended it."""
        job, number = subscriber.job, subscriber.num_connections
        headers = self._auth(subscriber.tenant)
        if subscriber.last_id is not None:
            headers["Last-Event-ID"] = subscriber.last_id
        url = f"{self._next_api()}/v1/jobs/{job}/events"
        try:
            async with self.session.get(url, headers=headers) as response:
                self.recorder.add(Opened(job, number, subscriber.last_id, response.status, now_s()))
                if response.status != 200:
                    return f"status {response.status}"
                with self._counted():
                    return await self._read(subscriber, response)
        except _AWAY as error:
            return type(error).__name__

    async def _read(self, subscriber: Followed, response: aiohttp.ClientResponse) -> str:
        job, number = subscriber.job, subscriber.num_connections
        async for data in response.content.iter_any():
            self.recorder.add(Chunk(job, number, now_s(), data))
            subscriber.num_chunks += 1
            subscriber.news_at_s = now_s()
            subscriber.take(data)
            if self.read_delay_s is not None and (pause_s := self.read_delay_s(subscriber)):
                await asyncio.sleep(pause_s)
        # The server ends the body after the terminal event; what comes after it is recorded too.
        return "end" if subscriber.is_done else "ended early"

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def _auth(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.keys[tenant]}"}

    def _next_api(self) -> str:
        self._gateway += 1
        return self.apis[self._gateway % len(self.apis)]
