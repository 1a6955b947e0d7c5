"""Suspects in their lanes on a real Valkey: who is given them, and when."""

from __future__ import annotations

import pytest

from headrace.contract import keys, wire
from headrace.contract import streams as streams_module
from headrace.contract.streams import MAX_TRIAL_GROUP, Move

MODEL = "tiny/model: a {b}"


@pytest.fixture
def claim(streams):
    def claim(worker="w1", *, is_idle=True, max_jobs=16, lease_ms=60_000, room_tokens=1 << 20):
        return streams.claim(
            MODEL,
            worker,
            lease_ms=lease_ms,
            room_tokens=room_tokens,
            max_jobs=max_jobs,
            is_idle=is_idle,
        )

    return claim


@pytest.fixture
def suspect(streams, spec_for, claim, client):
    """Let a job be claimed and come back under suspicion, each in a millisecond of its own."""

    def now_ms() -> int:
        seconds, micros = client.time()
        return seconds * 1000 + micros // 1000

    def suspect(level=1, **changes):
        spec = spec_for(**changes)
        streams.enqueue(spec, 10)
        (given,) = claim("before", is_idle=False).claims
        assert streams.hand_back(MODEL, given.job, 1, suspect=level)
        done_ms = now_ms()
        while now_ms() == done_ms:  # entries of two lanes are ordered by the millisecond
            continue
        return spec.job

    return suspect


def jobs_of(claimed):
    return [given.job for given in claimed.claims]


def test_a_busy_worker_passes_suspects_by_and_an_idle_one_gets_nothing_else(
    streams, spec_for, claim, suspect
):
    jobs = [suspect(), suspect()]
    streams.enqueue(other := spec_for(), 10)
    assert jobs_of(claim(is_idle=False)) == [other.job]
    streams.enqueue(spec_for(), 10)
    claimed = claim("w2")
    assert jobs_of(claimed) == jobs
    assert claimed.is_trial
    assert {given.suspect for given in claimed.claims} == {1}


def test_suspects_of_level_two_are_given_one_by_one_the_longest_waiting_first(claim, suspect):
    first, second = suspect(2), suspect(2, tenant="tenant_b")
    assert jobs_of(claim()) == [first]
    assert jobs_of(claim("w2")) == [second]
    assert not claim("w3").is_trial


def test_a_group_holds_one_level_and_no_more_than_may_run_together(claim, suspect):
    first = [suspect() for _ in range(3)]
    alone = suspect(2)
    first += [suspect(tenant=f"tenant_{n}") for n in range(MAX_TRIAL_GROUP)]
    assert jobs_of(claim()) == first[:MAX_TRIAL_GROUP]
    assert jobs_of(claim("w2")) == [alone]
    assert jobs_of(claim("w3")) == first[MAX_TRIAL_GROUP:]


def test_a_group_is_no_larger_than_the_room_but_for_the_first(claim, suspect):
    jobs = [suspect() for _ in range(4)]
    assert jobs_of(claim(room_tokens=5)) == jobs[:1]
    assert jobs_of(claim("w2", room_tokens=25)) == jobs[1:3]
    assert jobs_of(claim("w3", max_jobs=1)) == jobs[3:]


def test_one_busy_worker_runs_dry_for_suspects_that_wait_for_long(
    streams, spec_for, claim, suspect, monkeypatch
):
    monkeypatch.setattr(streams_module, "TRIAL_AFTER_MS", -1)
    job = suspect()
    waiting = [spec_for() for _ in range(2)]
    for spec in waiting:
        streams.enqueue(spec, 10)
    assert jobs_of(claim(is_idle=False)) == []
    assert jobs_of(claim("w2", is_idle=False, max_jobs=1)) == [waiting[0].job], "one at a time"
    assert jobs_of(claim(is_idle=False)) == []
    assert jobs_of(claim()) == [job]
    assert jobs_of(claim(is_idle=False)) == [waiting[1].job], "the turn is over"


def test_the_turn_of_a_worker_that_claims_no_more_passes_to_another(
    streams, claim, suspect, client, monkeypatch
):
    monkeypatch.setattr(streams_module, "TRIAL_AFTER_MS", -1)
    suspect()
    claim(is_idle=False)
    trial = keys.prefix(MODEL) + "trial"
    assert client.get(trial) == b"w1"
    assert 0 < client.pttl(trial) <= streams_module.TRIAL_TTL_MS
    client.delete(trial)  # as when its lifetime is over
    claim("w2", is_idle=False)
    assert client.get(trial) == b"w2"


def test_a_suspect_whose_worker_died_is_a_suspect_still(claim, suspect):
    job = suspect(2)
    assert jobs_of(claim()) == [job]
    assert jobs_of(claim("w2", is_idle=False, lease_ms=0)) == []
    (given,) = claim("w2", lease_ms=0).claims
    assert (given.job, given.suspect, given.is_takeover) == (job, 2, True)


def test_a_suspect_that_is_handed_back_in_good_order_stays_one(streams, claim, suspect):
    job = suspect(2)
    claim()
    assert streams.hand_back(MODEL, job, 1)
    assert jobs_of(claim("w2", is_idle=False)) == []
    (given,) = claim("w2").claims
    assert (given.job, given.suspect) == (job, 2)


def test_a_level_that_rises_and_a_repeat_leave_one_entry(streams, claim, suspect):
    job = suspect(1)
    for _ in range(2):
        assert streams.hand_back(MODEL, job, 1, suspect=2)
    (depth,) = streams.depths(MODEL)
    assert (depth.num_queued, depth.num_held, depth.is_of_suspects) == (1, 0, True)
    assert claim().claims[0].suspect == 2


def test_the_lane_it_came_from_is_left_clean(client, claim, suspect):
    suspect(deadline_ms=1)
    prefix = keys.prefix(MODEL)
    assert client.keys(f"{prefix}lane:*") == [
        f"{prefix}lane:{keys.lane('interactive', 'suspect', 'tenant_a')}".encode()
    ]
    for name in ("lanes", "held", "urgent"):
        assert not client.exists(prefix + name)


def test_its_end_leaves_nothing_behind(streams, client, claim, suspect):
    job = suspect()
    streams.finish(MODEL, [(job, "")])
    assert streams.depths(MODEL) == []
    assert not client.exists(keys.prefix(MODEL) + "suspects")
    assert jobs_of(claim()) == []


def test_a_suspect_that_was_lost_with_redis_is_enqueued_as_one(streams, client, spec_for, claim):
    spec = spec_for()
    assert streams.enqueue(spec, 10, suspect=2)
    assert not streams.enqueue(spec, 10, suspect=2), "it is there already"
    assert jobs_of(claim(is_idle=False)) == []
    (given,) = claim().claims
    assert (given.job, given.suspect) == (spec.job, 2)
    assert client.ttl(keys.job_hash(MODEL, spec.job)) > 0


def test_an_entry_that_is_gone_is_left_to_the_sweeper(streams, client, spec_for, claim):
    spec = spec_for()
    streams.enqueue(spec, 10)
    (given,) = claim(is_idle=False).claims
    client.xdel(keys.lane_stream(MODEL, given.lane), given.entry)
    assert not streams.hand_back(MODEL, spec.job, 1, suspect=1)
    assert streams.knows(MODEL, [spec.job]) == [False]
    assert streams.enqueue(spec, 10, suspect=1)
    assert jobs_of(claim()) == [spec.job]


def test_a_worker_that_outlives_redis_restores_a_suspect_as_one(
    streams, client, spec_for, claim, suspect
):
    job = suspect(2)
    (given,) = claim().claims
    client.flushall()
    spec = wire.decode(given.spec)
    assert isinstance(spec, wire.JobSpec)
    assert streams.restore(spec, "w1", 10, attempt=2, gen=0, log=[], suspect=given.suspect)
    assert streams.renew(MODEL, "w1", [(job, 2)]) == ["held"]
    assert jobs_of(claim("w2", is_idle=False, lease_ms=0)) == []
    assert [(g.job, g.suspect) for g in claim("w2", lease_ms=0).claims] == [(job, 2)]


def test_a_suspect_moves_to_no_other_lane_and_can_be_canceled(streams, spec_for, claim, suspect):
    job = suspect()
    assert streams.move(spec_for(job, priority=wire.Priority.HIGH), 10) is Move.GIVEN
    streams.cancel(MODEL, job)
    assert jobs_of(claim()) == [job]
    assert streams.renew(MODEL, "w1", [(job, 0)]) in (["gone"], ["cancel"])


def test_a_pause_does_not_keep_suspects_back(streams, client, claim, suspect):
    job = suspect()
    client.sadd(keys.paused(MODEL), "*:*")
    assert jobs_of(claim()) == [job], "what was given once is given again"
