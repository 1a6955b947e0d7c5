"""What waits in the lanes is counted as it comes and goes, and a wrong count heals.

The random operations of test_streams_random.py compare the counts with the lanes at each step.
"""

from __future__ import annotations

import pytest

from headrace.contract import keys, wire
from headrace.contract.live import Live
from headrace.contract.waiting import Load, Waiting

MODEL = "tiny/model: a {b}"


@pytest.fixture
def waiting(client):
    return lambda: Live(client).waiting([MODEL])[MODEL]


def claim(streams, max_jobs=10):
    claimed = streams.claim(
        MODEL, "w1", lease_ms=60_000, room_tokens=1 << 20, max_jobs=max_jobs, is_idle=False
    )
    return claimed.claims


def test_jobs_and_tokens_are_counted_by_class_and_tenant(streams, spec_for, waiting):
    first = spec_for(priority=wire.Priority.HIGH)
    for spec, cost in ((first, 5), (spec_for(), 7), (spec_for(job_class=wire.JobClass.BATCH), 11)):
        streams.enqueue(spec, cost)
    assert waiting() == Waiting(
        {("interactive", first.tenant): Load(2, 12), ("batch", first.tenant): Load(1, 11)}, 3
    )


def test_invariant_1_a_repeat_is_not_counted_again(streams, spec_for, waiting):
    spec = spec_for()
    assert streams.enqueue(spec, 5)
    assert not streams.enqueue(spec, 5)
    assert waiting().lanes == {("interactive", spec.tenant): Load(1, 5)}
    (given,) = claim(streams)
    for _ in range(2):
        streams.finish(MODEL, [(given.job, given.entry)])
    assert waiting() == Waiting({}, 1)


def test_what_ends_in_the_queue_is_counted_out(streams, spec_for, waiting):
    first, second = spec_for(), spec_for()
    streams.enqueue(first, 5)
    streams.enqueue(second, 7)
    streams.finish(MODEL, [(first.job, "")])
    assert waiting().lanes == {("interactive", first.tenant): Load(1, 7)}


def test_what_was_handed_back_is_not_counted(streams, spec_for, waiting):
    spec = spec_for()
    streams.enqueue(spec, 5)
    claim(streams)
    assert streams.hand_back(MODEL, spec.job, 1)
    assert waiting().lanes.get(("interactive", spec.tenant), Load()) == Load()


def test_invariant_2_entries_that_were_never_counted_do_no_harm(streams, spec_for, waiting, client):
    specs = [spec_for() for _ in range(3)]
    for spec in specs:
        streams.enqueue(spec, 5)
    client.delete(keys.waiting(MODEL))  # as if an older version had enqueued them
    assert len(claim(streams, 2)) == 2
    assert waiting().lanes == {("interactive", specs[0].tenant): Load(0, 0)}
    assert len(claim(streams)) == 1
    assert not client.exists(keys.waiting(MODEL)), "the lane was found empty"
