"""The token log of each job and the frames that carry it to subscribers.

Invariants:
1. Logged before seen (design invariant 3): one script appends to the log and then publishes; no
   other code publishes tokens.
2. Contiguous: an append whose first index is not the log's next one is refused; one that was
   already made (a repeat after an unknown outcome), wholly or in its beginning, changes nothing and
   publishes nothing, and the writer is told from where to go on.
3. Fenced (design invariant 5): a write by an attempt older than the job's newest is refused and
   reported as stale; `fence` is what makes an attempt the newest.
4. One end: the end record is appended once; nothing is appended after it.
5. A flush is one command whatever number of jobs it holds, and one message a gateway shard that has
   subscribers for any of them; with none it only appends.

Called by: worker/emit (fence, append, announce, end), gateway/sse (subscribe, read, follow),
gateway/jobs (end of a job canceled before pickup).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import msgspec

from headrace.contract import keys, scripts, wire
from headrace.contract.redis_client import Client, redis_errors

#: Seconds a shard's wish for a job's frames lasts unless it is repeated.
SUBSCRIPTION_S = 60


class Append(IntEnum):
    """What became of one job's part of a flush."""

    LOGGED = 0
    REPEATED = 1  # it was in the log already
    STALE = 2  # a newer attempt has the job, or it has ended: drop it
    BROKEN = 3  # the log is not where the writer believes (Redis lost it): restore, then repeat


@dataclass(frozen=True, slots=True)
class Overlap:
    """The chunk's beginning was logged by a flush whose reply was lost: send it from `next` on."""

    next: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """A job's log as an attempt finds it, the moment it became the newest."""

    gen: int
    is_canceled: bool
    log: tuple[wire.TokenChunk, ...]

    @property
    def next(self) -> int:
        return self.log[-1].next if self.log else 0


@dataclass(frozen=True, slots=True)
class Position:
    """How far a job's log is, without reading it."""

    gen: int
    next: int
    is_ended: bool


@dataclass(frozen=True, slots=True)
class LogView:
    """A job's log as a subscriber reads it."""

    chunks: tuple[wire.TokenChunk, ...]
    end: wire.JobEnd | None
    num_records: int


class TokenLog:
    """The logs of all jobs on one Redis, and the frames published from them."""

    def __init__(self, client: Client) -> None:
        self._client: Any = client  # its own annotations are partial
        self._fence = client.register_script(scripts.FENCE)
        self._append = client.register_script(scripts.APPEND)
        self._announce = client.register_script(scripts.ANNOUNCE)
        self._end = client.register_script(scripts.END)

    def fence(self, model: str, job: str, attempt: int, worker: str) -> Fenced | None:
        """Make `attempt` the job's newest and return its log; None if a newer one exists."""
        with redis_errors(f"fence {job}"):
            reply = cast(
                "list[Any]",
                self._fence(
                    keys=[keys.prefix(model) + "lanes"],
                    args=[keys.prefix(model), job, attempt, worker, keys.RUNNING_TTL_S],
                ),
            )
        if not reply[0]:
            return None
        chunks = tuple(m for m in map(wire.decode, reply[3]) if isinstance(m, wire.TokenChunk))
        return Fenced(gen=int(reply[1]), is_canceled=bool(reply[2]), log=chunks)

    def append(
        self, model: str, chunks: Sequence[tuple[str, wire.TokenChunk]]
    ) -> list[Append | Overlap]:
        """Append (tenant, chunk) pairs to their logs and publish them: one command."""
        payloads = [wire.encode(chunk) for _, chunk in chunks]
        items = [
            (chunk.job, tenant, chunk.attempt, chunk.first, len(chunk.ids), len(payload))
            for (tenant, chunk), payload in zip(chunks, payloads, strict=True)
        ]
        args: list[Any] = [keys.prefix(model), keys.shard_channel(""), keys.RUNNING_TTL_S]
        args += [msgspec.msgpack.encode(items), b"".join(payloads)]
        with redis_errors("append to token logs"):
            reply = cast("list[int]", self._append(keys=[keys.prefix(model) + "lanes"], args=args))
        return [Overlap(-state) if state < 0 else Append(state) for state in reply]

    def announce(self, model: str, started: Sequence[tuple[wire.JobStarted, int]]) -> int:
        """Publish (start of an attempt, prompt's tokens) pairs; returns how many are stale."""
        args: list[Any] = [keys.prefix(model), keys.shard_channel("")]
        for message, prompt_tokens in started:
            args += (message.job, message.attempt, wire.encode(message), prompt_tokens)
        with redis_errors("announce start"):
            refused = self._announce(keys=[keys.prefix(model) + "lanes"], args=args)
        return cast("int", refused)

    def end(self, model: str, ends: Sequence[wire.JobEnd]) -> None:
        """Append and publish the end records of jobs whose end is committed. Safe to repeat."""
        args: list[Any] = [keys.prefix(model), keys.shard_channel("")]
        args += (keys.LOG_TTL_S, keys.JOB_TTL_S)
        for message in ends:
            args += (message.job, message.status.value, wire.encode(message))
        with redis_errors("append end records"):
            self._end(keys=[keys.prefix(model) + "lanes"], args=args)

    def read(self, model: str, job: str, begin: int = 0, count: int = 0) -> LogView:
        """Return the log: chunks in order, and the end record once there is one.

        With a count it is so many records from `begin` on: a page.
        """
        last = begin + count - 1 if count else -1
        with redis_errors(f"read log of {job}"):
            rows = cast("list[bytes]", self._client.lrange(keys.token_log(model, job), begin, last))
        return _view_of(rows)

    def read_each(
        self, places: Sequence[tuple[str, str, int]], count: int
    ) -> list[LogView | wire.WireError]:
        """Return so many records of each log, (model, job, begin), in one round trip.

        A log that this process cannot read is an error of its own, not of all.
        """
        with redis_errors("read logs"):
            pipe = self._client.pipeline(transaction=False)
            for model, job, begin in places:
                pipe.lrange(keys.token_log(model, job), begin, begin + count - 1)
            found = cast("list[list[bytes]]", pipe.execute())
        views: list[LogView | wire.WireError] = []
        for rows in found:
            try:
                views.append(_view_of(rows))
            except wire.WireError as error:
                views.append(error)
        return views

    def prompt_tokens(self, model: str, job: str) -> int | None:
        """Return how many tokens the job's worker counted in its prompt; None: nobody did."""
        with redis_errors(f"read prompt's tokens of {job}"):
            value = cast("bytes | None", self._client.hget(keys.job_hash(model, job), "prompt"))
        return None if value is None else int(value)

    def position(self, model: str, job: str) -> Position | None:
        """Return how far the log is; None when this Redis does not know the job."""
        with redis_errors(f"read position of {job}"):
            key = keys.job_hash(model, job)
            gen, next_index, end, lane = cast(
                "list[bytes | None]", self._client.hmget(key, "gen", "next", "end", "lane")
            )
            if gen is None and end is None and lane is None and not self._client.exists(key):
                return None
        return Position(int(gen or 0), int(next_index or 0), end is not None)

    def lacks_end(self, model: str, jobs: Sequence[str]) -> list[bool]:
        """Say which of the jobs this Redis knows but has no end record of."""
        if not jobs:
            return []
        with redis_errors("look up end records"):
            pipe = self._client.pipeline(transaction=False)
            for job in jobs:
                pipe.hmget(keys.job_hash(model, job), "lane", "attempt", "end")
            rows = cast("list[list[bytes | None]]", pipe.execute())
        return [(lane or attempt) is not None and end is None for lane, attempt, end in rows]

    def subscribe(self, shard: str, jobs: Sequence[tuple[str, str]]) -> None:
        """Ask for the frames of (model, job) pairs for SUBSCRIPTION_S; repeat it to stay."""
        until_ms = int((time.time() + SUBSCRIPTION_S) * 1000)
        with redis_errors("subscribe"):
            pipe = self._client.pipeline(transaction=False)
            for model, job in jobs:
                key = keys.subscribers(model, job)
                pipe.zadd(key, {shard: until_ms})
                pipe.expire(key, SUBSCRIPTION_S)
            pipe.execute()

    def unsubscribe(self, shard: str, model: str, job: str) -> None:
        with redis_errors("unsubscribe"):
            self._client.zrem(keys.subscribers(model, job), shard)


def _view_of(rows: list[bytes]) -> LogView:
    chunks: list[wire.TokenChunk] = []
    end: wire.JobEnd | None = None
    for message in map(wire.decode_stream, rows):
        if isinstance(message, wire.TokenChunk):
            chunks.append(message)
        elif isinstance(message, wire.JobEnd):
            end = message
    return LogView(tuple(chunks), end, len(rows))


class ShardSubscription:
    """The one pub/sub connection of a gateway process."""

    def __init__(self, client: Client, shard: str) -> None:
        self._client: Any = client  # its own annotations are partial
        self._channel = keys.shard_channel(shard)
        self._pubsub: Any = None

    def open(self) -> None:
        """Subscribe, and return once Redis has confirmed it: frames are received from here on."""
        with redis_errors("shard channel"):
            pubsub: Any = self._client.pubsub()
            try:
                pubsub.subscribe(self._channel)
                while (message := pubsub.get_message(timeout=5.0)) is None or (
                    message["type"] != "subscribe"
                ):
                    if message is None:
                        raise TimeoutError("no confirmation of the subscription")
            except BaseException:
                pubsub.close()
                raise
            self._pubsub = pubsub

    def messages(self, timeout_s: float) -> list[wire.StreamMessage]:
        """Return the messages of the next frame; empty when none came in time."""
        with redis_errors("shard channel"):
            frame = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s)
        if frame is None:
            return []
        return [wire.decode_stream(part) for part in wire.split_frame(frame["data"])]

    def close(self) -> None:
        if self._pubsub is not None:
            pubsub, self._pubsub = self._pubsub, None
            pubsub.close()
