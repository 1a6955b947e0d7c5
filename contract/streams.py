"""Job streams by lane: enqueue, pick and claim, renew, end, hand back, move, restore.

A stream is FIFO, so order is made by lanes (class, priority, tenant), and the lane is chosen when a
worker has room, not when the job came. Each operation is one script, so it happens whole or not at
all, and each may be repeated after an error whose outcome is unknown.

Invariants:
1. A job has at most one live entry. `enqueue` of a job that has a hash does nothing; an entry its
   hash does not name is deleted when it is met (a relay that came late).
2. An entry leaves its stream only by `finish`, after the job's end is committed in Postgres: what
   is in the streams is what is not done. Nothing is trimmed. (`move` puts one into another stream.)
3. A lease is the entry's idle time in the pending list. `renew` touches it only while the job's
   newest attempt is still the caller's; a silent worker's entries are claimed by another.
4. `claim` gives a worker only what it has room for, lanes in this order: taken over and handed
   back, then a lane whose deadline is near, then class, then the tenant served least, then
   priority. A job too large for the room blocks those behind it (else it would starve). Of a
   paused lane it gives nothing new; what was given once is taken over all the same.
   Suspects (crashes.py) are given apart from all others, by claim_script.py.
5. A tenant that has nothing queued cannot save up: its next job finds it at the level of the least
   served one that waits, else of the least served one that runs, else of the one that ended last
   (Sheng et al., "Fairness in Serving Large Language Models", 2024, section 4).

Called by: gateway/jobs and tasks (enqueue, cancel), worker/intake and worker/leases,
gateway/dashboard (depths, heartbeats).

Size: the client's side of each script of scripts.py, one after the other as they stand there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

from headrace.contract import keys, log, scripts, wire
from headrace.contract.claim_script import CLAIM
from headrace.contract.redis_client import Client, redis_errors
from headrace.contract.waiting import COUNT_WAITING

#: A lane jumps when its oldest deadline is nearer than this, ms.
URGENT_BEFORE_MS = 10_000
#: A lease so long that only entries which were handed back are past it (scripts.HAND_BACK).
ONLY_HANDED_BACK_MS = 1_000_000_000
#: Lanes one script looks at for their depths: about 2 ms in which Redis does nothing else.
DEPTHS_BATCH = 200
#: Suspects of level 1 that run together: a poison among them puts so many more under suspicion.
MAX_TRIAL_GROUP = 8
#: ms a suspect waits for a worker that is idle; then a busy one is kept from new work until it is.
TRIAL_AFTER_MS = 10_000
#: What WakeSubscription.wait returns when messages are heard from now on.
HEARD = "heard"
#: ms after its last claim for which such a worker is the one: a few times intake's POLL_S.
TRIAL_TTL_MS = 5_000


@dataclass(frozen=True, slots=True)
class Claim:
    """One entry a worker was given."""

    job: str
    spec: bytes  # wire.JobSpec, not yet decoded: what cannot be decoded must still be ended
    cost_tokens: int
    lane: str
    entry: str
    is_takeover: bool
    suspect: int = 0  # its level; a claim with any holds only such of one level


@dataclass(frozen=True, slots=True)
class Claimed:
    claims: tuple[Claim, ...]
    is_blocked: bool  # the next job did not fit: ask again when there is more room
    is_trial: bool = False  # suspects: nothing may run beside them


@dataclass(frozen=True, slots=True)
class LaneDepth:
    lane: str
    num_queued: int  # nobody was given them yet, or they were handed back
    num_held: int
    oldest_ms: int | None  # Unix ms at which the oldest queued one was enqueued
    lag: int  # entries that were never given to anybody
    claimed_by: tuple[tuple[str, int], ...]  # (worker, jobs), as many as num_held in all

    @property
    def key(self) -> tuple[str, str]:
        """Return class and tenant."""
        job_class, _, tenant = self.lane.split(":", 2)
        return job_class, tenant

    @property
    def is_of_suspects(self) -> bool:
        return self.lane.split(":", 2)[1] == keys.SUSPECT


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker as its last beat showed it."""

    beat: wire.WorkerBeat
    beat_age_ms: int  # by the server's clock
    is_alive: bool  # the beat's lifetime has not run out


class Move(IntEnum):
    """What became of a job that was to go to another lane."""

    THERE = 0  # it was in that lane already
    MOVED = 1
    GIVEN = 2  # a worker was given it: too late
    UNKNOWN = 3  # this Redis has no entry for it: the relay enqueues it by its row


class JobStreams:
    """The lanes of all models on one Redis."""

    def __init__(self, client: Client) -> None:
        self._client: Any = client  # its own annotations are partial
        self._enqueue = client.register_script(COUNT_WAITING + scripts.ENQUEUE)
        self._claim = client.register_script(COUNT_WAITING + CLAIM)
        self._renew = client.register_script(scripts.RENEW)
        self._finish = client.register_script(COUNT_WAITING + scripts.FINISH)
        self._hand_back = client.register_script(COUNT_WAITING + scripts.HAND_BACK)
        self._cancel = client.register_script(scripts.CANCEL)
        self._move = client.register_script(COUNT_WAITING + scripts.MOVE)
        self._restore = client.register_script(COUNT_WAITING + scripts.RESTORE)
        self._depths = client.register_script(scripts.DEPTHS)

    def enqueue(self, spec: wire.JobSpec, cost_tokens: int, *, suspect: int = 0) -> bool:
        """Put the job in its lane; False when it is already there. Safe to repeat.

        A suspect of that level (its row says so) waits among suspects.
        """
        urgent = "" if spec.deadline_ms is None else spec.deadline_ms - URGENT_BEFORE_MS
        lane = keys.lane(spec.job_class, spec.priority, spec.tenant)
        with redis_errors(f"enqueue {spec.job}"):
            return bool(
                self._enqueue(
                    keys=[keys.prefix(spec.model) + "lanes"],
                    args=[
                        keys.prefix(spec.model),
                        spec.job,
                        lane,
                        spec.tenant,
                        wire.encode(spec),
                        cost_tokens,
                        urgent,
                        keys.RUNNING_TTL_S,
                        suspect,
                    ],
                )
            )

    def claim(
        self,
        model: str,
        worker: str,
        *,
        lease_ms: int,
        room_tokens: int,
        max_jobs: int,
        is_idle: bool,  # nothing in hand, nothing on its way out: only such may try suspects
    ) -> Claimed:
        """Take over and claim up to `max_jobs` jobs whose cost fits into `room_tokens`."""
        with redis_errors("claim"):
            reply = cast(
                "tuple[list[list[Any]], int, int]",
                self._claim(
                    keys=[keys.prefix(model) + "lanes"],
                    args=[
                        keys.prefix(model),
                        worker,
                        lease_ms,
                        max(0, room_tokens),
                        max_jobs,
                        int(is_idle),
                        keys.TAKEOVERS_TTL_S,
                        MAX_TRIAL_GROUP,
                        TRIAL_AFTER_MS,
                        TRIAL_TTL_MS,
                    ],
                ),
            )
        claims = tuple(
            Claim(
                job=job.decode(),
                spec=spec,
                cost_tokens=int(cost),
                lane=lane.decode(),
                entry=entry.decode(),
                is_takeover=kind == b"takeover",
                suspect=suspect,
            )
            for kind, lane, entry, job, spec, cost, suspect in reply[0]
        )
        return Claimed(claims, bool(reply[1]), bool(reply[2]))

    def renew(self, model: str, worker: str, held: Sequence[tuple[str, int]]) -> list[str]:
        """Renew the leases of (job, attempt) pairs; per pair: held, cancel, lost or gone.

        cancel: held, and its cancellation was asked. lost: a newer attempt has it. gone: this
        Redis does not know it any more (`restore` it).
        """
        if not held:
            return []
        args: list[Any] = [keys.prefix(model), worker, keys.RUNNING_TTL_S]
        for job, attempt in held:
            args += [job, attempt]
        with redis_errors("renew leases"):
            states = cast(
                "list[bytes]", self._renew(keys=[keys.prefix(model) + "lanes"], args=args)
            )
        return [state.decode() for state in states]

    def finish(self, model: str, ended: Iterable[tuple[str, str]]) -> None:
        """Acknowledge and delete the entries of ended jobs: pairs (job, entry or "")."""
        args: list[Any] = [keys.prefix(model), keys.JOB_TTL_S]
        for job, entry in ended:
            args += [job, entry]
        with redis_errors("acknowledge"):
            self._finish(keys=[keys.prefix(model) + "lanes"], args=args)

    def hand_back(self, model: str, job: str, attempt: int, *, suspect: int = 0) -> bool:
        """Let the next claim of any worker have the job at once; False if it is not ours.

        A suspect goes among the suspects, and stays there when it is handed back without a level.
        """
        with redis_errors(f"hand back {job}"):
            return bool(
                self._hand_back(
                    keys=[keys.prefix(model) + "lanes"],
                    args=[keys.prefix(model), job, attempt, suspect],
                )
            )

    def cancel(self, model: str, job: str) -> None:
        """Tell whoever holds the job, and whoever picks it up, that it is canceled."""
        with redis_errors(f"cancel {job}"):
            self._cancel(keys=[keys.prefix(model) + "lanes"], args=[keys.prefix(model), job])

    def move(self, spec: wire.JobSpec, cost_tokens: int) -> Move:
        """Put a job that waits into the lane its spec now names, behind what is there.

        Its row says so already, so a repeat, or an enqueue by the relay, comes to the same.
        """
        lane = keys.lane(spec.job_class, spec.priority, spec.tenant)
        args = [keys.prefix(spec.model), spec.job, lane, wire.encode(spec), cost_tokens]
        with redis_errors(f"move {spec.job}"):
            moved = self._move(keys=[keys.prefix(spec.model) + "lanes"], args=args)
        return Move(cast("int", moved))

    def restore(
        self,
        spec: wire.JobSpec,
        worker: str,
        cost_tokens: int,
        *,
        attempt: int,
        gen: int,
        log: Sequence[wire.TokenChunk],
        suspect: int = 0,
    ) -> bool:
        """Put a running job back into a Redis that lost it; False if a newer attempt has it."""
        args: list[Any] = [keys.prefix(spec.model), worker, spec.job, attempt, gen]
        kind = keys.SUSPECT if suspect else "restored"
        args += [log[-1].next if log else 0, keys.lane(spec.job_class, kind, spec.tenant)]
        args += [wire.encode(spec), cost_tokens, keys.RUNNING_TTL_S, suspect]
        args += [wire.encode(chunk) for chunk in log]
        with redis_errors(f"restore {spec.job}"):
            return bool(self._restore(keys=[keys.prefix(spec.model) + "lanes"], args=args))

    def knows(self, model: str, jobs: Sequence[str]) -> list[bool]:
        """Say which of the jobs this Redis has an entry for."""
        if not jobs:
            return []
        with redis_errors("look up jobs"):
            pipe = self._client.pipeline(transaction=False)
            for job in jobs:
                pipe.hexists(keys.job_hash(model, job), "lane")
            return [bool(found) for found in cast("list[int]", pipe.execute())]

    def depths(self, model: str) -> list[LaneDepth]:
        """Return the lanes of a model that hold anything, with depth and age."""
        prefix = keys.prefix(model)
        found: list[LaneDepth] = []
        with redis_errors("queue depth"):
            sets = [prefix + name for name in ("lanes", "held", "suspects")]
            names = cast("set[bytes]", self._client.sunion(sets))
            lanes = sorted(names)
            for start in range(0, len(lanes), DEPTHS_BATCH):
                args = [prefix, *lanes[start : start + DEPTHS_BATCH]]
                rows = cast("list[list[Any]]", self._depths(keys=[prefix + "lanes"], args=args))
                found += [_depth(row) for row in rows]
        return found


def _depth(row: list[Any]) -> LaneDepth:
    lane, length, pending, lag, oldest, num_back, oldest_back, holders = row
    ids = [cast("bytes", entry) for entry in (oldest, oldest_back) if entry]
    num_new = max(0, length - pending)
    return LaneDepth(
        lane.decode(),
        num_queued=num_new + num_back,
        num_held=pending - num_back,
        oldest_ms=min((int(entry.split(b"-")[0]) for entry in ids), default=None),
        lag=num_new if lag == b"" else int(lag),  # Redis does not know it after a deletion
        claimed_by=tuple(
            (worker.decode(), int(num))
            for worker, num in zip(holders[::2], holders[1::2], strict=True)
        ),
    )


class Workers:
    """Heartbeats of workers."""

    def __init__(self, client: Client) -> None:
        self._client: Any = client  # its own annotations are partial

    def beat(self, beat: wire.WorkerBeat, *, lifetime_ms: int) -> None:
        """Write the heartbeat; it vanishes when it is not repeated within its lifetime."""
        with redis_errors("heartbeat"):
            pipe = self._client.pipeline(transaction=False)
            data = wire.encode(beat)
            pipe.set(keys.worker_beat(beat.worker), data, px=lifetime_ms)
            pipe.set(keys.worker_last(beat.worker), data, ex=keys.WORKER_LAST_S)
            pipe.zadd(keys.WORKERS, {beat.worker: int(time.time() * 1000)})
            pipe.execute()

    def leave(self, worker: str) -> None:
        """Forget a worker that stops in good order."""
        with redis_errors("worker leaves"):
            self._client.delete(keys.worker_beat(worker), keys.worker_last(worker))
            self._client.zrem(keys.WORKERS, worker)

    def alive(self) -> dict[str, wire.WorkerBeat]:
        """Return the workers whose heartbeat has not run out; forget the others after an hour."""
        with redis_errors("list workers"):
            hour_ago = int(time.time() * 1000) - 3_600_000
            self._client.zremrangebyscore(keys.WORKERS, "-inf", hour_ago)
            names = cast("list[bytes]", self._client.zrange(keys.WORKERS, 0, -1))
            if not names:
                return {}
            values = cast(
                "list[bytes | None]",
                self._client.mget([keys.worker_beat(name.decode()) for name in names]),
            )
        found: dict[str, wire.WorkerBeat] = {}
        for value in values:
            beat = None if value is None else wire.decode(value)
            if isinstance(beat, wire.WorkerBeat):
                found[beat.worker] = beat
        return found

    def seen(self) -> list[SeenWorker]:
        """Return the workers of the last hour, by name: live ones, and those that went silent.

        A beat of another version is left out, so that one worker hides no other.
        """
        with redis_errors("list workers"):
            names = cast("list[bytes]", self._client.zrange(keys.WORKERS, 0, -1))
            pipe = self._client.pipeline(transaction=False)
            for name in names:
                worker = name.decode()
                pipe.get(keys.worker_last(worker))
                pipe.pttl(keys.worker_last(worker))
                pipe.exists(keys.worker_beat(worker))
            replies: Any = iter(pipe.execute())
        found: list[SeenWorker] = []
        for data, left_ms, is_alive in zip(replies, replies, replies, strict=True):
            beat = None if data is None else _readable_beat(data)
            if beat is not None:
                age_ms = max(0, keys.WORKER_LAST_S * 1000 - left_ms)
                found.append(SeenWorker(beat, age_ms, bool(is_alive)))
        return sorted(found, key=lambda worker: worker.beat.worker)

    def ping(self) -> None:
        """Raise QueueUnavailable unless Redis answers."""
        with redis_errors("ping"):
            self._client.ping()


def _readable_beat(data: bytes) -> wire.WorkerBeat | None:
    try:
        beat = wire.decode(data)
    except wire.WireError as error:
        log.event("beat.unreadable", level=logging.WARNING, why=error.detail)
        return None
    return beat if isinstance(beat, wire.WorkerBeat) else None


class WakeSubscription:
    """What couriers of a model listen to: `work`, and cancellations as `cancel <job>`.

    `heard` comes first on each new connection: what was sent before it, nobody here was told.
    """

    def __init__(self, client: Client, model: str) -> None:
        self._client: Any = client  # its own annotations are partial
        self._channel = keys.wake_channel(model)
        self._pubsub: Any = None

    def wait(self, timeout_s: float) -> str | None:
        """Return the next message, or None when none came in time; reconnects by itself."""
        with redis_errors("wake channel"):
            try:
                if self._pubsub is None:
                    self._pubsub = self._client.pubsub()
                    self._pubsub.subscribe(self._channel)
                message = self._pubsub.get_message(timeout=timeout_s)
            except BaseException:
                self.close()
                raise
        if message is None:
            return None
        # Also when the client has put a broken connection right by itself.
        return HEARD if message["type"] == "subscribe" else message["data"].decode()

    def close(self) -> None:
        if self._pubsub is not None:
            pubsub, self._pubsub = self._pubsub, None
            pubsub.close()
