"""Job streams on a real Valkey: order, leases, ends, restores."""

from __future__ import annotations

import threading
import time

import pytest

from headrace.contract import keys, wire
from headrace.contract.errors import QueueUnavailable
from headrace.contract.live import Live
from headrace.contract.redis_client import connect
from headrace.contract.streams import HEARD, JobStreams, WakeSubscription, Workers

MODEL = "tiny/model: a {b}"
LONG_MS = 60_000


def claim(streams, worker="w1", room=1_000_000, max_jobs=100, lease_ms=LONG_MS, is_idle=False):
    return streams.claim(
        MODEL, worker, lease_ms=lease_ms, room_tokens=room, max_jobs=max_jobs, is_idle=is_idle
    )


def claim_one(streams, worker="w1", **options):
    claims = claim(streams, worker, max_jobs=1, **options).claims
    return claims[0].job if claims else None


def names_of(client):
    found = {key.decode().removeprefix(keys.prefix(MODEL)) for key in client.keys("hr:*")}
    return sorted(found - {"counts", "takeovers"})  # figures stay


# -- order -----------------------------------------------------------------------------------


def test_a_lane_is_first_in_first_out(streams, spec_for):
    jobs = [spec_for() for _ in range(5)]
    for spec in jobs:
        assert streams.enqueue(spec, 10)
    claims = claim(streams).claims
    assert [c.job for c in claims] == [s.job for s in jobs]
    assert [wire.decode(c.spec) for c in claims] == jobs
    assert {c.cost_tokens for c in claims} == {10}
    assert not any(c.is_takeover for c in claims)


def test_interactive_goes_before_batch_whatever_its_priority(streams, spec_for):
    batch = spec_for(job_class=wire.JobClass.BATCH, priority=wire.Priority.HIGH)
    interactive = spec_for(priority=wire.Priority.LOW)
    streams.enqueue(batch, 1)
    streams.enqueue(interactive, 1)
    assert [c.job for c in claim(streams).claims] == [interactive.job, batch.job]


def test_priority_orders_the_jobs_of_one_tenant(streams, spec_for):
    low, normal, high = (spec_for(priority=p) for p in ("low", "normal", "high"))
    for spec in (low, normal, high):
        streams.enqueue(spec, 1)
    assert [claim_one(streams) for _ in range(3)] == [high.job, normal.job, low.job]


def test_the_tenant_served_least_goes_first_even_with_low_priority(
    streams, tokens, spec_for, chunk_of
):
    streams.enqueue(spec_for("job_a1", tenant="a", priority="high"), 1)
    streams.enqueue(spec_for("job_b1", tenant="b", priority="low"), 1)
    assert claim_one(streams) == "job_a1"
    tokens.fence(MODEL, "job_a1", 1, "w1")
    tokens.append(MODEL, [("a", chunk_of("job_a1", 1, 0, 5))])
    streams.enqueue(spec_for("job_a2", tenant="a", priority="high"), 1)
    assert [claim_one(streams), claim_one(streams)] == ["job_b1", "job_a2"]


def test_one_claim_shares_between_tenants_before_anything_is_served(streams, spec_for):
    for number in range(3):
        streams.enqueue(spec_for(f"job_a{number}", tenant="a"), 10)
    for number in range(3):
        streams.enqueue(spec_for(f"job_b{number}", tenant="b"), 10)
    order = [c.job[4] for c in claim(streams).claims]
    assert sorted(order[:2]) == sorted(order[2:4]) == sorted(order[4:]) == ["a", "b"]


def test_invariant_5_a_tenant_back_from_idleness_starts_at_the_least_served_active_one(
    streams, tokens, spec_for, chunk_of, client
):
    for number in range(3):
        streams.enqueue(spec_for(f"job_a{number}", tenant="a"), 1)
    assert claim_one(streams) == "job_a0"
    tokens.fence(MODEL, "job_a0", 1, "w1")
    tokens.append(MODEL, [("a", chunk_of("job_a0", 1, 0, 20))])
    streams.enqueue(spec_for("job_b0", tenant="b"), 1)
    assert client.hget(keys.prefix(MODEL) + "served", "b") == b"20"


def test_invariant_5_nobody_saves_up_while_the_queue_happens_to_be_empty(
    streams, tokens, spec_for, chunk_of, client
):
    # Tenant a had the fleet to itself and has nothing queued at the moment b arrives.
    streams.enqueue(spec_for("job_a0", tenant="a"), 1)
    assert [c.job for c in claim(streams).claims] == ["job_a0"]
    tokens.fence(MODEL, "job_a0", 1, "w1")
    tokens.append(MODEL, [("a", chunk_of("job_a0", 1, 0, 20))])
    streams.finish(MODEL, [("job_a0", "")])
    for number in range(3):
        streams.enqueue(spec_for(f"job_b{number}", tenant="b"), 1)
    assert client.hget(keys.prefix(MODEL) + "served", "b") == b"20"
    streams.enqueue(spec_for("job_a1", tenant="a"), 1)
    assert "job_a1" in [c.job for c in claim(streams, max_jobs=2).claims]


def test_invariant_5_a_tenant_that_trickles_does_not_save_up(
    streams, tokens, spec_for, chunk_of, client
):
    # Both run, nothing waits: b's next job does not find b far behind.
    for tenant in ("a", "b"):
        streams.enqueue(spec_for(f"job_{tenant}0", tenant=tenant), 1)
        claim(streams)
        tokens.fence(MODEL, f"job_{tenant}0", 1, "w1")
    for tenant, served in (("a", 20), ("b", 2)):
        tokens.append(MODEL, [(tenant, chunk_of(f"job_{tenant}0", 1, 0, served))])
    streams.enqueue(spec_for("job_b1", tenant="b"), 1)
    assert client.hget(keys.prefix(MODEL) + "served", "b") == b"20"


def test_a_lane_jumps_when_its_deadline_is_near(streams, spec_for):
    now_ms = int(time.time() * 1000)
    ahead = spec_for("job_ahead", tenant="b")
    head = spec_for("job_head", job_class="batch")
    urgent = spec_for("job_urgent", job_class="batch", deadline_ms=now_ms + 5_000)
    later = spec_for("job_later", job_class="batch", tenant="c", deadline_ms=now_ms + 3_600_000)
    for spec in (ahead, head, urgent, later):
        streams.enqueue(spec, 1)
    # The lane is first in, first out, so its head comes before the urgent one; then all is as ever.
    order = [claim_one(streams) for _ in range(4)]
    assert order == ["job_head", "job_urgent", "job_ahead", "job_later"]
    assert claim_one(streams) is None


# -- room ------------------------------------------------------------------------------------


def test_a_job_too_large_for_the_room_blocks_those_behind_it(streams, spec_for):
    streams.enqueue(spec_for("job_1"), 10)
    streams.enqueue(spec_for("job_2"), 50)
    streams.enqueue(spec_for("job_3"), 1)
    claimed = claim(streams, room=30)
    assert [c.job for c in claimed.claims] == ["job_1"]
    assert claimed.is_blocked
    assert claim(streams, room=20).claims == ()
    claimed = claim(streams, room=51)
    assert [c.job for c in claimed.claims] == ["job_2", "job_3"]
    assert not claimed.is_blocked


def test_an_idle_worker_is_given_one_oversized_job_alone(streams, spec_for):
    streams.enqueue(spec_for("job_1"), 500)
    streams.enqueue(spec_for("job_2"), 1)
    claimed = claim(streams, room=100, is_idle=True)
    assert [c.job for c in claimed.claims] == ["job_1"]
    assert claimed.is_blocked


def test_a_claim_for_no_jobs_takes_nothing(streams, spec_for):
    streams.enqueue(spec_for(), 1)
    assert claim(streams, max_jobs=0).claims == ()
    assert len(claim(streams).claims) == 1


# -- one live entry --------------------------------------------------------------------------


def test_invariant_1_enqueue_is_safe_to_repeat(streams, spec_for):
    spec = spec_for()
    assert [streams.enqueue(spec, 1) for _ in range(3)] == [True, False, False]
    assert len(claim(streams).claims) == 1
    assert not streams.enqueue(spec, 1)
    streams.finish(MODEL, [(spec.job, "")])
    assert not streams.enqueue(spec, 1)
    assert claim(streams).claims == ()


def test_invariant_1_an_entry_the_hash_does_not_name_is_dropped(streams, spec_for, client):
    spec = spec_for()
    lane = keys.lane("interactive", "normal", "tenant_a")
    streams.enqueue(spec, 1)
    entry = {"job": spec.job, "spec": wire.encode(spec), "cost": 1}
    client.xadd(keys.lane_stream(MODEL, lane), entry)
    assert len(claim(streams).claims) == 1
    assert client.xlen(keys.lane_stream(MODEL, lane)) == 1
    assert claim(streams).claims == ()
    streams.finish(MODEL, [(spec.job, "")])
    client.delete(keys.job_hash(MODEL, spec.job))
    assert names_of(client) == ["served"]


def test_a_lane_emptied_by_dropping_entries_leaves_no_stream(streams, spec_for, client):
    spec = spec_for()
    streams.enqueue(spec, 1)
    client.delete(keys.job_hash(MODEL, spec.job))  # as if the hash had run out
    assert claim(streams).claims == ()
    assert names_of(client) == []


def test_claimed_jobs_are_claimed_once_by_two_workers_at_a_time(streams, spec_for, redis_url):
    jobs = {spec_for().job for _ in range(40)}
    for job in jobs:
        streams.enqueue(spec_for(job), 1)
    found: dict[str, list[str]] = {"w1": [], "w2": []}

    def work(worker):
        with connect(redis_url) as own:
            mine = JobStreams(own)
            while claims := claim(mine, worker, max_jobs=3).claims:
                found[worker] += [c.job for c in claims]

    threads = [threading.Thread(target=work, args=(worker,)) for worker in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found["w1"] + found["w2"]) == sorted(jobs)


# -- leases ----------------------------------------------------------------------------------


def test_a_silent_workers_job_is_taken_over_before_new_ones(streams, spec_for):
    first, second = spec_for(), spec_for()
    streams.enqueue(first, 1)
    assert claim_one(streams, "w1") == first.job
    streams.enqueue(second, 1)
    claims = claim(streams, "w2", lease_ms=0).claims
    assert [(c.job, c.is_takeover) for c in claims] == [(first.job, True), (second.job, False)]


def test_a_held_lease_is_not_taken_over(streams, spec_for):
    streams.enqueue(spec_for(), 1)
    assert len(claim(streams, "w1").claims) == 1
    assert claim(streams, "w2").claims == ()


def test_invariant_3_a_stale_attempt_cannot_renew(streams, tokens, spec_for):
    spec = spec_for()
    streams.enqueue(spec, 1)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")
    assert streams.renew(MODEL, "w1", [(spec.job, 1)]) == ["held"]
    assert claim_one(streams, "w2", lease_ms=0) == spec.job
    tokens.fence(MODEL, spec.job, 2, "w2")
    assert streams.renew(MODEL, "w1", [(spec.job, 1), ("job_none", 1)]) == ["lost", "gone"]
    assert streams.renew(MODEL, "w2", [(spec.job, 2)]) == ["held"]
    assert streams.renew(MODEL, "w2", []) == []


def test_renewing_keeps_an_entry_from_being_taken_over(streams, tokens, spec_for, client):
    spec = spec_for()
    streams.enqueue(spec, 1)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")
    lane = keys.lane_stream(MODEL, keys.lane("interactive", "normal", "tenant_a"))
    entry = client.xpending_range(lane, keys.GROUP, "-", "+", 1)[0]["message_id"]
    client.xclaim(lane, keys.GROUP, "w1", 0, [entry], idle=LONG_MS)
    streams.renew(MODEL, "w1", [(spec.job, 1)])
    assert claim(streams, "w2").claims == ()
    client.xclaim(lane, keys.GROUP, "w1", 0, [entry], idle=LONG_MS)
    assert claim_one(streams, "w2") == spec.job


def test_a_job_handed_back_is_given_to_the_next_claim_at_once(streams, tokens, spec_for):
    spec = spec_for()
    streams.enqueue(spec, 1)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")
    assert streams.hand_back(MODEL, spec.job, 1)
    claims = claim(streams, "w2").claims
    assert [(c.job, c.is_takeover) for c in claims] == [(spec.job, True)]
    tokens.fence(MODEL, spec.job, 2, "w2")
    assert not streams.hand_back(MODEL, spec.job, 1)
    assert not streams.hand_back(MODEL, "job_none", 1)
    assert claim(streams, "w3").claims == ()


def test_a_job_too_large_to_be_taken_over_now_blocks_new_ones(streams, spec_for):
    streams.enqueue(spec_for("job_big"), 100)
    claim(streams, "w1")
    streams.hand_back(MODEL, "job_big", 1)
    streams.enqueue(spec_for("job_small"), 1)
    claimed = claim(streams, "w2", room=50)
    assert claimed.claims == ()
    assert claimed.is_blocked
    assert claim_one(streams, "w2", room=50, is_idle=True) == "job_big"


# -- end -------------------------------------------------------------------------------------


def test_invariant_2_finish_leaves_nothing_but_a_hash_that_runs_out(
    streams, tokens, spec_for, client
):
    spec = spec_for(deadline_ms=int(time.time() * 1000) + 3_600_000)
    streams.enqueue(spec, 1)
    entry = claim(streams).claims[0].entry
    for _ in range(2):  # safe to repeat
        streams.finish(MODEL, [(spec.job, entry)])
        assert names_of(client) == [f"job:{spec.job}", "served"]
    assert 0 < client.ttl(keys.job_hash(MODEL, spec.job)) <= keys.JOB_TTL_S
    assert streams.knows(MODEL, [spec.job, "job_none"]) == [True, False]
    assert streams.knows(MODEL, []) == []


def test_finish_of_one_job_leaves_the_others_of_its_lane(streams, spec_for):
    specs = [spec_for() for _ in range(3)]
    for spec in specs:
        streams.enqueue(spec, 1)
    claim(streams, max_jobs=2)
    streams.finish(MODEL, [(specs[0].job, "")])
    streams.finish(MODEL, [("job_none", ""), (specs[1].job, "0-1")])  # not the entry it has
    assert claim_one(streams, "w2", lease_ms=0) == specs[1].job
    assert claim_one(streams, "w2") == specs[2].job


def test_a_queued_job_that_is_finished_is_never_given(streams, spec_for, client):
    spec, other = spec_for(), spec_for()
    streams.enqueue(spec, 1)
    streams.enqueue(other, 1)
    streams.finish(MODEL, [(spec.job, "")])
    assert [c.job for c in claim(streams).claims] == [other.job]


def test_cancel_reaches_the_holder_at_its_next_renewal(streams, tokens, spec_for, client):
    spec = spec_for()
    streams.enqueue(spec, 1)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")
    wake = WakeSubscription(client, MODEL)
    assert next_message(wake) == HEARD
    streams.cancel(MODEL, spec.job)
    assert next_message(wake) == f"cancel {spec.job}"
    wake.close()
    assert streams.renew(MODEL, "w1", [(spec.job, 1)]) == ["cancel"]


def test_cancel_before_the_pickup_is_seen_by_the_fence(streams, tokens, spec_for):
    spec = spec_for()
    streams.enqueue(spec, 1)
    streams.cancel(MODEL, spec.job)
    streams.cancel(MODEL, "job_none")
    claim(streams, "w1")
    fenced = tokens.fence(MODEL, spec.job, 1, "w1")
    assert fenced is not None
    assert fenced.is_canceled
    assert streams.knows(MODEL, ["job_none"]) == [False]


def test_each_new_wake_connection_says_from_when_on_it_hears(client):
    wake = WakeSubscription(client, MODEL)
    assert next_message(wake) == HEARD
    client.client_kill_filter(_type="pubsub")
    deadline = time.monotonic() + 20
    while True:  # the client may put it right by itself, or say that it broke first
        assert time.monotonic() < deadline
        try:
            if (message := wake.wait(0.1)) is not None:
                break
        except QueueUnavailable:
            continue
    assert message == HEARD
    wake.close()


def next_message(wake):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if (message := wake.wait(0.1)) is not None:
            return message
    return None


def test_enqueue_and_hand_back_wake_the_couriers(streams, spec_for, client):
    wake = WakeSubscription(client, MODEL)
    assert next_message(wake) == HEARD
    spec = spec_for()
    streams.enqueue(spec, 1)
    assert next_message(wake) == "work"
    claim(streams)
    streams.hand_back(MODEL, spec.job, 1)
    assert next_message(wake) == "work"
    wake.close()
    wake.close()


# -- what is seen ----------------------------------------------------------------------------


def test_depths_tell_queued_from_held(streams, spec_for):
    before_ms = int(time.time() * 1000)
    for number in range(3):
        streams.enqueue(spec_for(f"job_{number}"), 1)
    streams.enqueue(spec_for("job_b", tenant="b", job_class="batch"), 1)
    claim(streams, max_jobs=1)
    lanes = {d.lane: d for d in streams.depths(MODEL)}
    mine = lanes["interactive:normal:tenant_a"]
    assert (mine.num_queued, mine.num_held) == (2, 1)
    assert mine.oldest_ms is not None
    assert abs(mine.oldest_ms - before_ms) < 60_000
    assert lanes["batch:normal:b"].num_queued == 1
    claim(streams)
    held = {d.lane: (d.num_queued, d.num_held, d.oldest_ms) for d in streams.depths(MODEL)}
    assert held["interactive:normal:tenant_a"] == (0, 3, None)
    assert JobStreams(streams._client).depths("unknown") == []


def test_depths_tell_who_holds_and_count_what_was_handed_back_as_queued(streams, spec_for):
    for number in range(5):
        streams.enqueue(spec_for(f"job_{number}"), 1)
    assert [claim_one(streams, w) for w in ("w1", "w2", "w1")] == ["job_0", "job_1", "job_2"]
    assert streams.hand_back(MODEL, "job_1", 1)
    (depth,) = streams.depths(MODEL)
    assert (depth.num_queued, depth.num_held, depth.lag) == (3, 2, 2)
    assert dict(depth.claimed_by) == {"w1": 2}
    (entry, _), *_ = streams._client.xrange(keys.lane_stream(MODEL, depth.lane), count=2)[1:]
    assert depth.oldest_ms == int(entry.split(b"-")[0]), "the one that was handed back is older"
    assert depth.key == ("interactive", "tenant_a")
    streams.finish(MODEL, [("job_4", "")])  # a deletion: Redis no longer knows the lag
    (depth,) = streams.depths(MODEL)
    assert (depth.num_queued, depth.lag) == (2, 1)


def test_depths_are_read_in_slices(streams, spec_for, monkeypatch):
    monkeypatch.setattr("headrace.contract.streams.DEPTHS_BATCH", 2)
    for number in range(5):
        streams.enqueue(spec_for(tenant=f"t{number}"), 1)
    assert [d.lane for d in streams.depths(MODEL)] == [f"interactive:normal:t{n}" for n in range(5)]


def test_what_is_accepted_made_and_ended_is_counted_once(streams, tokens, spec_for, chunk_of):
    live = Live(streams._client)
    spec = spec_for("job_1")
    assert [streams.enqueue(spec, 1), streams.enqueue(spec, 1)] == [True, False]
    claim(streams)
    tokens.fence(MODEL, "job_1", 1, "w1")
    for _ in range(2):  # a repeat counts nothing
        tokens.append(MODEL, [("tenant_a", chunk_of("job_1", 1, 0, 5))])
    end = wire.JobEnd(
        job="job_1",
        gen=0,
        next=5,
        status=wire.JobStatus.FAILED,
        finish_reason=wire.FinishReason.ERROR,
        prompt_tokens=1,
        cached_tokens=0,
    )
    for _ in range(2):
        tokens.end(MODEL, [end])
    assert live.counts([MODEL])[MODEL] == {"accepted": 1, "tokens": 5, "ended:failed": 1}


def test_a_redis_that_is_away_is_queue_unavailable(spec_for):
    away = connect("redis://127.0.0.1:1/0")
    streams, workers = JobStreams(away), Workers(away)
    calls = [
        lambda: streams.enqueue(spec_for(), 1),
        lambda: claim(streams),
        lambda: streams.renew(MODEL, "w", [("job", 1)]),
        lambda: streams.finish(MODEL, [("job", "")]),
        lambda: streams.cancel(MODEL, "job"),
        lambda: streams.knows(MODEL, ["job"]),
        lambda: streams.depths(MODEL),
        workers.ping,
        workers.alive,
        workers.seen,
        lambda: WakeSubscription(away, MODEL).wait(0.1),
    ]
    for call in calls:
        with pytest.raises(QueueUnavailable):
            call()
