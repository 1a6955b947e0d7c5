"""What Redis keeps for the operator's view: counts, pauses, samples, history, open streams.

Nothing here is needed to run a job; all of it may be lost and comes back: counts begin anew (the
sampler sees that), pauses are copied from Postgres, history fills again.

Invariants:
1. A tick belongs to one sampler: `take_turn` is given to one caller in its time, whatever their
   number, so a second sampler adds no second point.
2. Lists and sets are bounded when they are written: an hour of points, a day of minutes, the
   snapshots of KEEP_SNAPSHOTS_S.
3. A model's set of pauses is replaced whole, and couriers are woken when one was lifted.

Called by: gateway/dashboard (sampler, overview, queues, feed), gateway/upkeep (pauses),
gateway/follower (open streams), gateway/admission (what waits).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, cast

import msgspec

from headrace.contract import keys
from headrace.contract.redis_client import Client, redis_errors
from headrace.contract.waiting import Waiting, waiting_of

#: Points of the last hour, one every five seconds, and of the last day, one a minute.
MAX_POINTS = 720
MAX_MINUTES = 1440
#: Seconds a snapshot is kept: longer than the longest window that is read from it.
KEEP_SNAPSHOTS_S = 330
#: Seconds after which a gateway's number of streams no longer counts: it reports every five.
STREAMS_TTL_S = 20

#: One value a series at one moment; None: there was nothing to measure.
Point = dict[str, float | None]


class Severity(StrEnum):
    PAGE = "page"  # somebody must get up
    WARN = "warn"  # somebody should look at it tomorrow


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong now."""

    code: str
    severity: Severity
    text: str  # what is wrong, and what to do
    since: str  # ISO 8601
    model: str | None = None  # which it concerns, where it is one
    subject: str = ""  # with code: which alarm this is, so that `since` stays

    @property
    def identity(self) -> tuple[str, str]:
        return self.code, self.subject


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """What the sampler publishes every tick, read as it is by every gateway."""

    at_ms: int
    sample: dict[str, Any]
    alarms: list[Alarm]


class WorkerSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker had counted."""

    model: str
    started_ms: int
    latencies: dict[str, list[int]]  # latency_bounds.KINDS


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that counts up, at one moment: two of them make rates and quantiles."""

    at_ms: int
    counts: dict[str, dict[str, int]]  # by model: fields of hr:{m}:counts
    workers: dict[str, WorkerSnapshot]


class Span(StrEnum):
    """Which history."""

    HOUR = "hour"
    DAY = "day"


class Live:
    """The figures on one Redis."""

    def __init__(self, client: Client) -> None:
        self._client: Any = client  # its own annotations are partial

    # -- counts ------------------------------------------------------------------------------

    def counts(self, models: Sequence[str]) -> dict[str, dict[str, int]]:
        """Return what was counted for each model, by field."""
        with redis_errors("read counts"):
            pipe = self._client.pipeline(transaction=False)
            for model in models:
                pipe.hgetall(keys.counts(model))
            rows = cast("list[dict[bytes, bytes]]", pipe.execute())
        return {
            model: {name.decode(): int(value) for name, value in row.items()}
            for model, row in zip(models, rows, strict=True)
        }

    def takeovers(self, model: str) -> dict[str, int]:
        """Return the takeovers of the model's lanes, by lane name."""
        with redis_errors("read takeovers"):
            row = cast("dict[bytes, bytes]", self._client.hgetall(keys.takeovers(model)))
        return {lane.decode(): int(value) for lane, value in row.items()}

    def waiting(self, models: Sequence[str]) -> dict[str, Waiting]:
        """Return what waits for each model, in one round trip."""
        with redis_errors("read what waits"):
            pipe = self._client.pipeline(transaction=False)
            for model in models:
                pipe.hgetall(keys.waiting(model))
                pipe.hget(keys.counts(model), "accepted")
            replies: Any = iter(pipe.execute())
        rows = zip(models, replies, replies, strict=True)
        return {model: waiting_of(row, num_accepted) for model, row, num_accepted in rows}

    # -- pauses ------------------------------------------------------------------------------

    def set_pauses(self, pauses: Mapping[str, Iterable[str]]) -> list[str]:
        """Make each model's set of `<class>:<tenant>` exactly this; return the models changed."""
        wanted = {model: {text.encode() for text in texts} for model, texts in pauses.items()}
        with redis_errors("write pauses"):
            pipe = self._client.pipeline(transaction=False)
            for model in wanted:
                pipe.smembers(keys.paused(model))
            found = dict(zip(wanted, map(set, pipe.execute()), strict=True))
            changed = [model for model in wanted if wanted[model] != found[model]]
            for model in changed:
                self._replace_pauses(model, wanted[model])
        return changed

    def _replace_pauses(self, model: str, members: set[bytes]) -> None:
        pipe = self._client.pipeline(transaction=True)
        pipe.delete(keys.paused(model))
        if members:
            pipe.sadd(keys.paused(model), *members)
        pipe.publish(keys.wake_channel(model), "work")
        pipe.execute()

    # -- open streams ------------------------------------------------------------------------

    def report_streams(self, gateway: str, num_streams: int) -> None:
        """Say how many event streams a gateway process holds open; it is forgotten by itself."""
        with redis_errors("report streams"):
            self._client.hset(keys.STREAMS, gateway, f"{_now_ms()}:{num_streams}")

    def forget_streams(self, gateway: str) -> None:
        """Take back what a gateway that stops has reported."""
        with redis_errors("report streams"):
            self._client.hdel(keys.STREAMS, gateway)

    def num_streams(self) -> int:
        """Return the open streams of all gateways that still report."""
        with redis_errors("count streams"):
            rows = cast("dict[bytes, bytes]", self._client.hgetall(keys.STREAMS))
            oldest_ms = _now_ms() - STREAMS_TTL_S * 1000
            reports = {gateway: value.partition(b":") for gateway, value in rows.items()}
            gone = [gateway for gateway, (at, _, _) in reports.items() if int(at) < oldest_ms]
            if gone:
                self._client.hdel(keys.STREAMS, *gone)
        return sum(int(num) for at, _, num in reports.values() if int(at) >= oldest_ms)

    # -- samples -----------------------------------------------------------------------------

    def take_turn(self, *, lasts_ms: int) -> int | None:
        """Return Redis's time, Unix ms, if the caller is the one to sample now; else None.

        Nobody else gets the turn for so long. Redis's clock, because the lanes' ids are by it, and
        hosts of gateways and tasks may differ.
        """
        with redis_errors("take the sampler's turn"):
            if not self._client.set(keys.SAMPLER, "1", nx=True, px=lasts_ms):
                return None
            return _ms(self._client.time())

    def snapshots_since(self, *times_ms: int) -> list[Snapshot | None]:
        """Return, for each time, the oldest snapshot that is not older."""
        with redis_errors("read snapshots"):
            pipe = self._client.pipeline(transaction=False)
            for at_ms in times_ms:
                pipe.zrangebyscore(keys.SNAPSHOTS, at_ms, "+inf", start=0, num=1)
            rows = cast("list[list[bytes]]", pipe.execute())
        return [_snapshot.decode(row[0]) if row else None for row in rows]

    def save(
        self, sampled: Sampled, snapshot: Snapshot, point: Point, minute: Point | None
    ) -> None:
        """Publish a tick: the sample, what the next ones compare with, and its points."""
        with redis_errors("save sample"):
            # No transaction: a Cluster has the keys in several slots, and half a tick harms nobody.
            pipe = self._client.pipeline(transaction=False)
            pipe.set(keys.SAMPLE, _json.encode(sampled))
            oldest_ms = snapshot.at_ms - KEEP_SNAPSHOTS_S * 1000
            pipe.zremrangebyscore(keys.SNAPSHOTS, "-inf", oldest_ms)
            pipe.zadd(keys.SNAPSHOTS, {_msgpack.encode(snapshot): snapshot.at_ms})
            pipe.rpush(keys.HISTORY_5S, _json.encode(point))
            pipe.ltrim(keys.HISTORY_5S, -MAX_POINTS, -1)
            if minute is not None:
                pipe.rpush(keys.HISTORY_1M, _json.encode(minute))
                pipe.ltrim(keys.HISTORY_1M, -MAX_MINUTES, -1)
            pipe.execute()

    def sampled(self) -> tuple[Sampled, float] | None:
        """Return the newest sample and its age, s; None when there is none that can be read."""
        with redis_errors("read sample"):
            pipe = self._client.pipeline(transaction=False)
            pipe.get(keys.SAMPLE)
            pipe.time()
            data, now = cast("tuple[bytes | None, tuple[int, int]]", pipe.execute())
        if data is None:
            return None
        try:
            found = _sampled.decode(data)
        except msgspec.DecodeError:  # of another version: the next is ours, or the alarm says so
            return None
        return found, max(0, _ms(now) - found.at_ms) / 1000

    def history(self, span: Span, *, newest: int = 0) -> list[Point]:
        """Return the points of an hour or a day, oldest first; of them only the `newest` if set."""
        key = keys.HISTORY_5S if span is Span.HOUR else keys.HISTORY_1M
        with redis_errors("read history"):
            rows = cast("list[bytes]", self._client.lrange(key, -newest, -1))
        return [_point.decode(row) for row in rows]


_json = msgspec.json.Encoder()
_msgpack = msgspec.msgpack.Encoder()
_sampled = msgspec.json.Decoder(Sampled)
_snapshot = msgspec.msgpack.Decoder(Snapshot)
_point = msgspec.json.Decoder(Point)


def _ms(time_of_redis: tuple[int, int]) -> int:
    seconds, microseconds = time_of_redis
    return seconds * 1000 + microseconds // 1000


def _now_ms() -> int:
    return int(time.time() * 1000)
