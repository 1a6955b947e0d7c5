"""Counts, pauses, samples and open streams in Redis: bounded, taken by one, lost without harm."""

from __future__ import annotations

import threading
import time

import pytest

from headrace.contract import keys
from headrace.contract import live as live_module
from headrace.contract.errors import QueueUnavailable
from headrace.contract.live import (
    Alarm,
    Live,
    Sampled,
    Severity,
    Snapshot,
    Span,
    WorkerSnapshot,
)
from headrace.contract.redis_client import connect
from headrace.contract.streams import HEARD, WakeSubscription

MODEL = "tiny/model: a {b}"


@pytest.fixture
def live(client):
    return Live(client)


def snapshot(at_ms, **counts):
    worker = WorkerSnapshot(model=MODEL, started_ms=1, latencies={"ttft_ms": [1, 2, 3]})
    return Snapshot(at_ms=at_ms, counts={MODEL: counts}, workers={"w": worker})


def sampled(at_ms, alarms=()):
    return Sampled(at_ms=at_ms, sample={"num_queued": 3, "ttft_ms": None}, alarms=list(alarms))


def save(live, at_ms, minute=None, **counts):
    point = {"at": at_ms / 1000, "num_queued": 1.0, "oldest_s": None}
    live.save(sampled(at_ms), snapshot(at_ms, **counts), point, minute)


def test_invariant_1_one_of_many_samplers_gets_the_turn(live):
    taken = []
    start = threading.Barrier(8)

    def take():
        start.wait()
        taken.append(live.take_turn(lasts_ms=60_000))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (at_ms,) = [turn for turn in taken if turn is not None]
    assert abs(at_ms - time.time() * 1000) < 60_000


def test_a_turn_runs_out(live):
    assert live.take_turn(lasts_ms=1)
    deadline = time.monotonic() + 20
    while live.take_turn(lasts_ms=1) is None:
        assert time.monotonic() < deadline


def test_what_was_saved_is_read_as_it_was(live, client):
    now_ms = int(time.time() * 1000)
    alarm = Alarm(code="no_worker", severity=Severity.PAGE, text="t", since="2026-01-01", model="m")
    live.save(sampled(now_ms, [alarm]), snapshot(now_ms, tokens=5), {"at": 1.0}, {"at": 0.0})
    found, age_s = live.sampled()
    assert found == sampled(now_ms, [alarm])
    assert 0 <= age_s < 60
    assert live.snapshots_since(0) == [snapshot(now_ms, tokens=5)]
    assert live.history(Span.HOUR) == [{"at": 1.0}]
    assert live.history(Span.DAY) == [{"at": 0.0}]


def test_a_sample_of_another_version_is_none(live, client):
    assert live.sampled() is None
    client.set(keys.SAMPLE, b'{"at_ms": "yesterday"}')
    assert live.sampled() is None


def test_the_oldest_snapshot_of_each_window_is_found(live):
    for at_ms in (1_000, 2_000, 3_000):
        save(live, at_ms, tokens=at_ms)
    found = live.snapshots_since(1_500, 0, 3_000, 3_001)
    assert [None if one is None else one.at_ms for one in found] == [2_000, 1_000, 3_000, None]


def test_invariant_2_history_and_snapshots_are_bounded(live, client, monkeypatch):
    monkeypatch.setattr(live_module, "MAX_POINTS", 5)
    monkeypatch.setattr(live_module, "MAX_MINUTES", 2)
    for second in range(400):
        save(live, second * 1000, minute={"at": float(second)} if second % 100 == 0 else None)
    assert [point["at"] for point in live.history(Span.HOUR)] == [395, 396, 397, 398, 399]
    assert [point["at"] for point in live.history(Span.HOUR, newest=2)] == [398, 399]
    assert [point["at"] for point in live.history(Span.DAY)] == [200, 300]
    assert client.zcard(keys.SNAPSHOTS) == live_module.KEEP_SNAPSHOTS_S


def test_invariant_3_pauses_are_replaced_whole_and_couriers_are_woken(live, client):
    wake = WakeSubscription(client, MODEL)
    assert wake.wait(20) == HEARD
    assert live.set_pauses({MODEL: {"*:*", "batch:t"}, "other": set()}) == [MODEL]
    assert client.smembers(keys.paused(MODEL)) == {b"*:*", b"batch:t"}
    assert wake.wait(20) == "work"
    assert live.set_pauses({MODEL: {"batch:t", "*:*"}}) == [], "nothing changed: nobody is woken"
    assert live.set_pauses({MODEL: []}) == [MODEL]
    assert client.exists(keys.paused(MODEL)) == 0
    assert wake.wait(20) == "work"
    wake.close()


def test_open_streams_are_added_up_while_their_gateways_report(live, client):
    live.report_streams("gw_1", 3)
    live.report_streams("gw_2", 4)
    live.report_streams("gw_2", 5)
    assert live.num_streams() == 8
    live.forget_streams("gw_1")
    assert live.num_streams() == 5
    silent_ms = int(time.time() * 1000) - live_module.STREAMS_TTL_S * 1000 - 1000
    client.hset(keys.STREAMS, "gw_2", f"{silent_ms}:5")
    assert live.num_streams() == 0
    assert client.hlen(keys.STREAMS) == 0, "who is silent is forgotten"


def test_counts_and_takeovers_of_a_model_that_never_ran_are_none(live):
    assert live.counts([MODEL, "b"]) == {MODEL: {}, "b": {}}
    assert live.counts([]) == {}
    assert live.takeovers(MODEL) == {}


def test_a_redis_that_is_away_is_queue_unavailable():
    away = Live(connect("redis://127.0.0.1:1/0"))
    calls = [
        lambda: away.counts(["m"]),
        lambda: away.takeovers("m"),
        lambda: away.set_pauses({"m": []}),
        lambda: away.report_streams("gw", 1),
        lambda: away.forget_streams("gw"),
        away.num_streams,
        lambda: away.take_turn(lasts_ms=10),
        lambda: away.snapshots_since(1),
        lambda: save(away, 1),
        away.sampled,
        lambda: away.history(Span.DAY),
    ]
    for call in calls:
        with pytest.raises(QueueUnavailable):
            call()
