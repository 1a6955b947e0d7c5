"""A job that waits goes to another lane; one that a worker was given stays where it is."""

from __future__ import annotations

import msgspec
import pytest

from headrace.contract import keys, wire
from headrace.contract.streams import Move

MODEL = "tiny/model: a {b}"


@pytest.fixture
def claim(streams):
    def claim(max_jobs=100, worker="w1"):
        claimed = streams.claim(
            MODEL, worker, lease_ms=60_000, room_tokens=1 << 20, max_jobs=max_jobs, is_idle=False
        )
        return claimed.claims

    return claim


def at(spec: wire.JobSpec, priority: str) -> wire.JobSpec:
    return msgspec.structs.replace(spec, priority=wire.Priority(priority))


def test_a_moved_job_is_claimed_in_its_new_place_with_its_new_spec(streams, spec_for, claim):
    first, second, third = (spec_for() for _ in range(3))
    for spec in (first, second, third):
        streams.enqueue(spec, 10)
    assert streams.move(at(third, "high"), 10) is Move.MOVED
    assert streams.move(at(first, "low"), 10) is Move.MOVED
    claims = claim()
    assert [c.job for c in claims] == [third.job, second.job, first.job]
    assert [wire.decode(c.spec) for c in claims] == [at(third, "high"), second, at(first, "low")]
    assert {c.cost_tokens for c in claims} == {10}


def test_a_repeat_changes_nothing(streams, spec_for, client, claim):
    spec, other = spec_for(), spec_for(priority=wire.Priority.HIGH)
    streams.enqueue(spec, 1)
    streams.enqueue(other, 1)
    assert streams.move(at(spec, "high"), 1) is Move.MOVED
    assert streams.move(at(spec, "high"), 1) is Move.THERE
    lane = keys.lane("interactive", "high", spec.tenant)
    assert client.xlen(keys.lane_stream(MODEL, lane)) == 2
    assert [c.job for c in claim()] == [other.job, spec.job]  # behind what was there


def test_what_a_worker_was_given_does_not_move(streams, tokens, spec_for, claim):
    spec = spec_for()
    streams.enqueue(spec, 1)
    assert len(claim()) == 1
    assert streams.move(at(spec, "high"), 1) is Move.GIVEN
    tokens.fence(MODEL, spec.job, 1, "w1")
    assert streams.renew(MODEL, "w1", [(spec.job, 1)]) == ["held"]
    assert streams.hand_back(MODEL, spec.job, 1)
    assert streams.move(at(spec, "low"), 1) is Move.GIVEN  # it is the first to be given again
    assert [c.job for c in claim(worker="w2")] == [spec.job]


def test_what_this_redis_does_not_know_is_left_to_the_relay(streams, spec_for, client):
    spec = spec_for()
    assert streams.move(spec, 1) is Move.UNKNOWN
    assert client.keys("*") == []
    streams.enqueue(spec, 1)
    streams.finish(MODEL, [(spec.job, "")])
    assert streams.move(at(spec, "high"), 1) is Move.UNKNOWN


def test_an_emptied_lane_leaves_nothing_behind(streams, spec_for, client, claim):
    spec = spec_for()
    streams.enqueue(spec, 1)
    streams.move(at(spec, "low"), 1)
    old = keys.lane("interactive", "normal", spec.tenant)
    assert not client.exists(keys.lane_stream(MODEL, old))
    assert [depth.lane for depth in streams.depths(MODEL)] == [old.replace("normal", "low")]
    (claimed,) = claim()
    streams.finish(MODEL, [(claimed.job, claimed.entry)])
    left = {key.decode().removeprefix(keys.prefix(MODEL)) for key in client.keys("*")}
    assert f"job:{spec.job}" in left
    assert [key for key in left if key.startswith(("lane", "held", "urgent"))] == []


def test_a_moved_job_keeps_its_deadline(streams, spec_for, claim):
    behind = spec_for(tenant="other", priority=wire.Priority.HIGH)
    urgent = spec_for(deadline_ms=1)
    streams.enqueue(behind, 1)
    streams.enqueue(urgent, 1)
    assert streams.move(at(urgent, "low"), 1) is Move.MOVED
    assert [c.job for c in claim(max_jobs=1)] == [urgent.job]
