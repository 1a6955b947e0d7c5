"""Random operations of several workers against a small model of what must hold.

The model knows which jobs are open and who may believe to hold them. After each step: an open job
that Redis was told of has exactly one live entry, an ended one has none, and the newest attempt is
the one the model handed out. A claim never gives what another worker holds under a live lease. At
the end every open job can be claimed: nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from headrace.contract import keys, wire
from headrace.contract.live import Live
from headrace.contract.redis_client import connect
from headrace.contract.streams import JobStreams, Move
from headrace.contract.tokens import TokenLog
from headrace.contract.waiting import Load

MODEL = "m"
WORKERS = st.sampled_from(["w1", "w2", "w3"])
NEVER_MS = 1_000_000


@dataclass
class OpenJob:
    spec: wire.JobSpec
    attempt: int = 0  # Postgres hands these out
    holder: str | None = None
    is_fenced: bool = False


class Lanes(RuleBasedStateMachine):
    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.streams, self.tokens = JobStreams(self.client), TokenLog(self.client)
        self.open: dict[str, OpenJob] = {}
        self.ended: list[wire.JobSpec] = []
        self.num_made = 0

    def pick(self, index: int, *, held: bool) -> tuple[str, OpenJob] | None:
        found = [(n, j) for n, j in self.open.items() if (j.holder is not None) == held]
        return found[index % len(found)] if found else None

    @rule(
        tenant=st.sampled_from("ab"),
        job_class=st.sampled_from(wire.JobClass),
        priority=st.sampled_from(wire.Priority),
        deadline_ms=st.sampled_from([None, 1, 1 << 50]),
        cost=st.integers(1, 9),
    )
    def enqueue(self, tenant, job_class, priority, deadline_ms, cost):
        self.num_made += 1
        spec = wire.JobSpec(
            job=f"job_{self.num_made}",
            tenant=tenant,
            model=MODEL,
            job_class=job_class,
            priority=priority,
            sampling=wire.Sampling(),
            prompt=str(cost),
            deadline_ms=deadline_ms,
        )
        assert self.streams.enqueue(spec, cost)
        self.open[spec.job] = OpenJob(spec)

    @rule(index=st.integers(0, 99))
    def enqueue_again(self, index):
        specs = [job.spec for job in self.open.values()] + self.ended
        if specs:
            spec = specs[index % len(specs)]
            assert not self.streams.enqueue(spec, int(spec.prompt))

    @rule(index=st.integers(0, 99))
    def a_late_relay_adds_a_second_entry(self, index):
        specs = [job.spec for job in self.open.values()] + self.ended
        if specs:
            spec = specs[index % len(specs)]
            lane = keys.lane(spec.job_class, spec.priority, spec.tenant)
            if self.client.exists(keys.lane_stream(MODEL, lane)):
                fields = {"job": spec.job, "spec": wire.encode(spec), "cost": spec.prompt}
                self.client.xadd(keys.lane_stream(MODEL, lane), fields)
                self.client.sadd(keys.prefix(MODEL) + "lanes", lane)
                self.client.hincrby(keys.waiting(MODEL), f"jobs:{lane}", 1)
                self.client.hincrby(keys.waiting(MODEL), f"tokens:{lane}", int(spec.prompt))

    @rule(index=st.integers(0, 99), held=st.booleans(), priority=st.sampled_from(wire.Priority))
    def move(self, index, held, priority):
        if found := self.pick(index, held=held):
            job = found[1]
            spec = msgspec.structs.replace(job.spec, priority=priority)
            is_there = priority == job.spec.priority
            moved = self.streams.move(spec, int(spec.prompt))
            if job.attempt:  # given once, it stays where it is, also after a hand-back
                assert moved in (Move.GIVEN, Move.THERE, Move.MOVED)
                assert moved is not Move.MOVED or job.holder is None
            else:
                assert moved is (Move.THERE if is_there else Move.MOVED)
            if moved is Move.MOVED:
                job.spec = spec

    @rule(worker=WORKERS, room=st.integers(0, 30), max_jobs=st.integers(1, 4), late=st.booleans())
    def claim(self, worker, room, max_jobs, late):
        claimed = self.streams.claim(
            MODEL,
            worker,
            lease_ms=0 if late else NEVER_MS,
            room_tokens=room,
            max_jobs=max_jobs,
            is_idle=False,
        )
        assert sum(c.cost_tokens for c in claimed.claims) <= room
        assert len({c.job for c in claimed.claims}) == len(claimed.claims) <= max_jobs
        for claim in claimed.claims:
            job = self.open[claim.job]  # what has ended is never given
            assert wire.decode(claim.spec) == job.spec
            assert late or job.holder is None  # a live lease is respected
            self.begin(worker, claim.job)

    def begin(self, worker: str, name: str) -> None:
        job = self.open[name]
        job.attempt, job.holder, job.is_fenced = job.attempt + 1, worker, True
        assert self.tokens.fence(MODEL, name, job.attempt, worker) is not None
        assert self.tokens.fence(MODEL, name, job.attempt - 1, "old") is None

    @rule(index=st.integers(0, 99))
    def renew(self, index):
        if found := self.pick(index, held=True):
            name, job = found
            assert job.holder is not None
            assert self.streams.renew(MODEL, job.holder, [(name, job.attempt)]) == ["held"]
            assert self.streams.renew(MODEL, "old", [(name, job.attempt - 1)]) == ["lost"]

    @rule(index=st.integers(0, 99))
    def hand_back(self, index):
        if found := self.pick(index, held=True):
            name, job = found
            assert self.streams.hand_back(MODEL, name, job.attempt)
            job.holder = None

    @rule(index=st.integers(0, 99), held=st.booleans())
    def end(self, index, held):
        if found := self.pick(index, held=held):
            name = found[0]
            end = wire.JobEnd(
                job=name,
                gen=0,
                next=0,
                status=wire.JobStatus.CANCELED,
                finish_reason=None,
                prompt_tokens=0,
                cached_tokens=0,
            )
            self.tokens.end(MODEL, [end])
            self.streams.finish(MODEL, [(name, "")])
            self.ended.append(self.open.pop(name).spec)

    @rule(relay_is_first=st.booleans())
    def redis_is_wiped(self, relay_is_first):
        self.client.flushall()
        self.ended.clear()  # a relay would enqueue them again; Postgres tells their pickup
        for name, job in self.open.items():
            cost = int(job.spec.prompt)
            if job.holder is None or relay_is_first:
                assert self.streams.enqueue(job.spec, cost)
            if job.holder is None:
                continue
            assert self.streams.renew(MODEL, job.holder, [(name, job.attempt)]) == ["gone"]
            assert self.streams.restore(
                job.spec, job.holder, cost, attempt=job.attempt, gen=0, log=[]
            )

    @invariant()
    def one_live_entry_a_job(self):
        live: dict[str, int] = {}
        for stream in self.client.keys(keys.lane_stream(MODEL, "*")):
            for entry, fields in self.client.xrange(stream):
                name = fields[b"job"].decode()
                if self.client.hget(keys.job_hash(MODEL, name), "entry") == entry:
                    live[name] = live.get(name, 0) + 1
        assert live == dict.fromkeys(self.open, 1)

    @invariant()
    def what_waits_is_counted(self):
        waits: dict[tuple[str, str], Load] = {}
        for stream in self.client.keys(keys.lane_stream(MODEL, "*")):
            job_class, _, tenant = stream.decode().rpartition("lane:")[2].split(":")
            given = self.client.xpending_range(stream, keys.GROUP, "-", "+", 1000)
            ids = {entry["message_id"] for entry in given}
            for entry, fields in self.client.xrange(stream):
                if entry not in ids:
                    known = waits.get((job_class, tenant), Load())
                    waits[job_class, tenant] = known + Load(1, int(fields[b"cost"]))
        told = Live(self.client).waiting([MODEL])[MODEL].lanes
        assert {key: load for key, load in told.items() if load != Load()} == waits

    @invariant()
    def the_newest_attempt_is_the_fence(self):
        for name, job in self.open.items():
            attempt = self.client.hget(keys.job_hash(MODEL, name), "attempt")
            if job.holder is not None:
                assert attempt == str(job.attempt).encode()

    def teardown(self):
        given: list[str] = []
        for _ in range(self.num_made + 1):  # a round ends what it was given
            claimed = self.streams.claim(
                MODEL, "last", lease_ms=0, room_tokens=10, max_jobs=3, is_idle=False
            )
            if not claimed.claims:
                break
            given += [c.job for c in claimed.claims]
            self.streams.finish(MODEL, [(c.job, c.entry) for c in claimed.claims])
        assert sorted(given) == sorted(self.open)
        assert not self.client.keys(keys.lane_stream(MODEL, "*"))
        assert not self.client.exists(keys.prefix(MODEL) + "held", keys.prefix(MODEL) + "lanes")


def test_random_operations_of_several_workers_lose_and_double_nothing(redis_url):
    with connect(redis_url) as client:
        machine = type("Machine", (Lanes,), {"client": client})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=40,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
