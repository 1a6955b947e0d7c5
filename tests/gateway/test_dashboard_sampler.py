"""The sampler on real stores: rates, levels, latencies, history; restarted, doubled, half blind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from headrace.contract import database, keys, latency_bounds, redis_client, wire
from headrace.contract.accounts import Accounts
from headrace.contract.dead_letters import DeadLetters
from headrace.contract.errors import QueueUnavailable
from headrace.contract.ids import new_id
from headrace.contract.ledger import Ledger
from headrace.contract.live import Live, Snapshot, Span, WorkerSnapshot
from headrace.contract.orders import Wanted, WorkerOrders
from headrace.contract.pauses import Pauses
from headrace.contract.streams import JobStreams, Workers
from headrace.contract.tokens import TokenLog
from headrace.gateway.dashboard.sampler import Sampler, latencies_between, minute_before
from headrace.tests.contract.burial import bury
from headrace.tests.gateway.conftest import card
from headrace.tests.gateway.courier import MODEL, chunk_of
from headrace.tests.gateway.test_dashboard_alarms import beat as beat_of


@dataclass
class Parts:
    client: object
    engine: object
    live: Live
    streams: JobStreams
    tokens: TokenLog
    workers: Workers
    pauses: Pauses
    orders: WorkerOrders

    def sampler(self, *, engine=None, client=None, oldest_target_s=60.0) -> Sampler:
        engine, client = engine or self.engine, client or self.client
        live = Live(client)
        return Sampler(
            accounts=Accounts(engine),
            streams=JobStreams(client),
            workers=Workers(client),
            live=live,
            pauses=Pauses(engine, live),
            orders=WorkerOrders(engine),
            letters=DeadLetters(engine),
            every_s=5,
            oldest_target_s=oldest_target_s,
        )

    def enqueue(self, num=1, *, job="job", **changes) -> None:
        for number in range(num):
            fields = {
                "job": f"{job}_{number}",
                "tenant": "tenant_a",
                "model": MODEL,
                "job_class": wire.JobClass.INTERACTIVE,
                "priority": wire.Priority.NORMAL,
                "sampling": wire.Sampling(),
                "prompt": "p",
            }
            self.streams.enqueue(wire.JobSpec(**(fields | changes)), 1)

    def claim(self, num: int) -> list[str]:
        claimed = self.streams.claim(
            MODEL, "w1", lease_ms=60_000, room_tokens=1 << 20, max_jobs=num, is_idle=True
        )
        return [claim.job for claim in claimed.claims]

    def end(self, job: str, status: str) -> None:
        record = wire.JobEnd(
            job=job,
            gen=0,
            next=0,
            status=wire.JobStatus(status),
            finish_reason=None,
            prompt_tokens=0,
            cached_tokens=0,
        )
        self.tokens.end(MODEL, [record])
        self.streams.finish(MODEL, [(job, "")])

    def beat(self, **changes) -> None:
        self.workers.beat(beat_of(model=MODEL, **changes), lifetime_ms=60_000)

    def age_snapshots(self, seconds: float) -> None:
        """Let what was saved have been saved earlier, so that no test waits for a window."""
        rows = self.client.zrange(keys.SNAPSHOTS, 0, -1)
        self.client.delete(keys.SNAPSHOTS, keys.SAMPLER)
        for row in rows:
            one = msgspec.msgpack.decode(row, type=Snapshot)
            older = msgspec.structs.replace(one, at_ms=one.at_ms - int(seconds * 1000))
            self.client.zadd(keys.SNAPSHOTS, {msgspec.msgpack.encode(older): older.at_ms})

    def take(self, sampler=None) -> dict:
        self.client.delete(keys.SAMPLER)
        assert (sampler or self.sampler()).sample()
        found = self.live.sampled()
        assert found is not None
        return found[0].sample

    def alarms(self) -> list[str]:
        return [alarm.code for alarm in self.live.sampled()[0].alarms]


@pytest.fixture
def parts(redis_url, database_url) -> Iterator[Parts]:
    engine, client = database.connect(database_url), redis_client.connect(redis_url)
    client.flushall()
    Accounts(engine).register_model(card())
    live = Live(client)
    pauses = Pauses(engine, live)
    pauses.resume(model="*", job_class="*", tenant_id="*")
    yield Parts(
        client=client,
        engine=engine,
        live=live,
        streams=JobStreams(client),
        tokens=TokenLog(client),
        workers=Workers(client),
        pauses=pauses,
        orders=WorkerOrders(engine),
    )
    client.close()
    engine.dispose()


def test_the_first_sample_has_levels_and_no_rates(parts):
    parts.enqueue(3)
    parts.claim(1)
    parts.beat()
    parts.live.report_streams("gw", 7)
    sample = parts.take()
    assert (sample["num_queued"], sample["num_running"]) == (2, 1)
    assert (sample["num_workers"], sample["live_streams"]) == (1, 7)
    assert 0 <= sample["oldest_s"] < 60
    assert sample["jobs_in_per_s"] is None
    assert sample["tokens_per_s"] is None
    assert sample["ttft_ms"] is None
    assert sample["models"][MODEL]["num_queued"] == 2
    assert sample["at"].endswith("Z")


def test_rates_are_what_was_counted_since_the_window_began(parts):
    parts.enqueue(2)
    parts.take()
    parts.age_snapshots(10)
    parts.enqueue(20, job="more")
    jobs = parts.claim(5)
    for job in jobs:
        parts.tokens.fence(MODEL, job, 1, "w1")
    parts.tokens.append(MODEL, [("tenant_a", chunk_of(jobs[0], 0, 40))])
    for job, status in zip(jobs, ("succeeded", "failed", "canceled"), strict=False):
        parts.end(job, status)
    sample = parts.take()
    assert sample["jobs_in_per_s"] == pytest.approx(2, rel=0.2)
    assert sample["jobs_out_per_s"] == pytest.approx(0.3, rel=0.2)
    assert sample["failed_per_s"] == pytest.approx(0.1, rel=0.2)
    assert sample["tokens_per_s"] == pytest.approx(4, rel=0.2)
    assert sample["models"][MODEL]["tokens_per_s"] == sample["tokens_per_s"]


def test_invariant_1_a_restarted_sampler_goes_on(parts):
    parts.take(parts.sampler())
    parts.age_snapshots(5)
    parts.enqueue(10)
    assert parts.take(parts.sampler())["jobs_in_per_s"] == pytest.approx(2, rel=0.2)
    assert len(parts.live.history(Span.HOUR)) == 2


def test_invariant_2_without_postgres_what_it_said_last_is_believed(parts):
    away = database.connect("postgresql+psycopg://u:p@127.0.0.1:1/none")
    sampler = parts.sampler()
    parts.enqueue(1)
    parts.take(sampler)
    for area in (sampler._accounts, sampler._pauses, sampler._orders):
        for name in ("_engine", "_single"):
            if hasattr(area, name):
                setattr(area, name, away)
    assert parts.take(sampler)["num_queued"] == 1
    blind = parts.sampler(engine=away)  # begins without: only what beats tell
    assert parts.take(blind)["models"] == {}
    parts.beat()
    assert parts.take(blind)["models"][MODEL]["num_queued"] == 1


def test_invariant_2_without_redis_there_is_no_sample(parts):
    with pytest.raises(QueueUnavailable):
        parts.sampler(client=redis_client.connect("redis://127.0.0.1:1/0")).sample()


def test_invariant_3_a_second_sampler_adds_nothing(parts):
    assert parts.sampler().sample()
    assert not parts.sampler().sample()
    assert len(parts.live.history(Span.HOUR)) == 1


def test_invariant_4_counts_that_begin_anew_give_no_negative_rate(parts):
    parts.enqueue(50)
    parts.take()
    parts.age_snapshots(10)
    parts.client.delete(keys.counts(MODEL))
    parts.enqueue(10, job="after")
    assert parts.take()["jobs_in_per_s"] == pytest.approx(1, rel=0.2)


# -- latencies -------------------------------------------------------------------------------


def counts_of(*latencies_ms):
    counts = latency_bounds.no_counts()
    for latency_ms in latencies_ms:
        counts[latency_bounds.bucket_of(latency_ms)] += 1
    return tuple(counts)


def test_quantiles_are_of_the_last_minute_and_of_all_workers(parts):
    parts.beat(latencies={"ttft_ms": counts_of(*[5000] * 100)})
    parts.beat(worker="w2", latencies={"ttft_ms": counts_of()})
    parts.take()
    parts.age_snapshots(50)
    parts.beat(latencies={"ttft_ms": counts_of(*[5000] * 100, *[10] * 60)})
    parts.beat(worker="w2", latencies={"ttft_ms": counts_of(*[10] * 30, *[800] * 10)})
    ttft = parts.take()["ttft_ms"]
    assert 5 < ttft["p50"] < 15, "the slow ones were before"
    assert 500 < ttft["p99"] < 1200
    assert parts.live.history(Span.HOUR)[-1]["ttft_p99_ms"] == ttft["p99"]


def snapshot_of(at_ms, **workers):
    return Snapshot(
        at_ms=at_ms,
        counts={},
        workers={
            name: WorkerSnapshot(model="m", started_ms=started, latencies={"itl_ms": list(counts)})
            for name, (started, counts) in workers.items()
        },
    )


def test_a_worker_that_is_new_counts_whole_and_one_never_seen_before_counts_not():
    before = snapshot_of(1000, old=(0, counts_of(5)))
    after = snapshot_of(
        9000,
        old=(0, counts_of(5, 7)),
        new=(2000, counts_of(90)),
        unknown=(0, counts_of(3000)),  # older than the window, but nobody looked then
    )
    found = latencies_between("m", after, before)
    assert found["itl_ms"] == list(counts_of(7, 90))
    assert latencies_between("other", after, before)["itl_ms"] == latency_bounds.no_counts()
    assert latencies_between("m", after, None)["itl_ms"] == latency_bounds.no_counts()


# -- alarms ----------------------------------------------------------------------------------


def test_jobs_without_a_worker_raise_the_alarm_until_one_serves(parts):
    parts.enqueue(1)
    parts.take()
    assert parts.alarms() == ["no_worker"]
    parts.beat(state="drained")
    parts.take()
    assert parts.alarms() == ["no_worker"]
    parts.beat(state="starting")
    parts.take()
    assert parts.alarms() == []


def test_the_oldest_job_counts_unless_its_queue_is_paused(parts):
    parts.beat()
    parts.enqueue(1)
    sampler = parts.sampler(oldest_target_s=0.001)
    deadline = time.monotonic() + 20
    while parts.take(sampler) and parts.alarms() != ["oldest_job"]:
        assert time.monotonic() < deadline
    parts.pauses.pause(model=MODEL, job_class="*", tenant_id="tenant_a", by="ada")
    sample = parts.take(sampler)
    assert parts.alarms() == []
    assert sample["oldest_s"] is not None, "it is shown all the same"


def test_failures_of_five_minutes_raise_the_alarm(parts):
    parts.beat()
    parts.take()
    parts.age_snapshots(250)
    parts.enqueue(10)
    for number, job in enumerate(parts.claim(10)):
        parts.end(job, "failed" if number < 5 else "succeeded")
    sample = parts.take()
    assert parts.alarms() == ["failures_growing"]
    assert sample["failed_per_s"] is None, "250 s ago is too long for a rate"


def test_a_quarantined_worker_that_runs_is_remembered_after_an_hour(parts):
    parts.orders.want("w1", Wanted.QUARANTINED, by="ada")
    parts.beat(state="quarantined")
    parts.take()
    assert parts.alarms() == []
    with parts.engine.begin() as db:
        db.exec_driver_sql("update worker_orders set ordered_at = now() - interval '61 minutes'")
    parts.take()
    assert parts.alarms() == ["worker_quarantined"]
    parts.workers.leave("w1")
    parts.take()
    assert parts.alarms() == []


# -- history ---------------------------------------------------------------------------------


def test_dead_letters_of_five_minutes_raise_the_alarm(parts):
    engine = parts.engine
    key = Accounts(engine).create_key(tenant=new_id("dead"), name="k")
    row = {
        "tenant_id": key.tenant_id,
        "key_id": key.id,
        "model": "retired",  # no worker tells of it any more: its letters count all the same
        "job_class": "interactive",
        "priority": "normal",
        "input": {"prompt": "x"},
        "sampling": {"max_tokens": 8},
        "meta": {},
        "cost_tokens": 9,
    }
    for number in range(3):
        job = new_id("job")
        Ledger(engine).accept_job(row | {"id": job}, idempotency_key=None, request_sha256=b"")
        bury(engine, job)
        parts.take()
        assert ("dead_letters_growing" in parts.alarms()) == (number == 2)


def test_a_minute_keeps_means_of_rates_and_the_most_of_ages():
    points = [
        {"at": 119, "num_queued": 100.0, "oldest_s": 99.0, "jobs_in_per_s": None},
        {"at": 120, "num_queued": 1.0, "oldest_s": 5.0, "jobs_in_per_s": None},
        {"at": 179, "num_queued": 3.0, "oldest_s": None, "jobs_in_per_s": 4.0},
    ]
    ended = minute_before(points, {"at": 180})
    assert ended == {"at": 120.0, "num_queued": 2.0, "oldest_s": 5.0, "jobs_in_per_s": 4.0}
    assert minute_before(points, {"at": 179.5}) is None
    assert minute_before([], {"at": 180}) is None
