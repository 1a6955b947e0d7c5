"""The token log and its frames on a real Valkey."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract import keys, wire
from headrace.contract.errors import QueueUnavailable
from headrace.contract.redis_client import connect
from headrace.contract.tokens import Append, Overlap, Position, ShardSubscription, TokenLog

MODEL = "tiny/model: a {b}"
LOGGED, REPEATED, STALE, BROKEN = Append


@pytest.fixture
def shard(client):
    shard = ShardSubscription(client, "g1")
    shard.open()
    yield shard
    shard.close()


def frame(shard):
    """Return the messages of the next frame, within a deadline."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if messages := shard.messages(0.1):
            return messages
    return []


def append(tokens, *chunks):
    return tokens.append(MODEL, [("tenant_a", chunk) for chunk in chunks])


def end_of(job, next=0, **changes):
    fields = {
        "job": job,
        "gen": 0,
        "next": next,
        "status": wire.JobStatus.SUCCEEDED,
        "finish_reason": wire.FinishReason.STOP,
        "prompt_tokens": 3,
        "cached_tokens": 0,
    }
    return wire.JobEnd(**(fields | changes))


def started_of(job, attempt):
    return wire.JobStarted(job=job, attempt=attempt, gen=0, next=0, worker="w1")


# -- append ----------------------------------------------------------------------------------


def test_invariant_2_the_log_is_contiguous(tokens, chunk_of):
    tokens.fence(MODEL, "job_1", 1, "w1")
    assert append(tokens, chunk_of("job_1", 1, 0, 3)) == [LOGGED]
    assert append(tokens, chunk_of("job_1", 1, 3, 1), chunk_of("job_1", 1, 4, 2)) == [LOGGED] * 2
    assert append(tokens, chunk_of("job_1", 1, 3, 1)) == [REPEATED]
    assert append(tokens, chunk_of("job_1", 1, 7, 1)) == [BROKEN]  # a gap
    log = tokens.read(MODEL, "job_1").chunks
    assert [i for chunk in log for i in chunk.ids] == list(range(6))


def test_a_chunk_whose_beginning_is_logged_is_told_where_to_go_on(tokens, chunk_of, shard):
    """A flush was made and its reply lost; more tokens came before the next."""
    tokens.fence(MODEL, "job_1", 1, "w1")
    append(tokens, chunk_of("job_1", 1, 0, 3))
    tokens.subscribe("g1", [(MODEL, "job_1")])
    assert append(tokens, chunk_of("job_1", 1, 2, 4)) == [Overlap(3)]
    assert append(tokens, chunk_of("job_1", 1, 3, 3)) == [LOGGED]
    assert frame(shard) == [chunk_of("job_1", 1, 3, 3)], "nothing was published before"
    assert tokens.read(MODEL, "job_1").chunks == (
        chunk_of("job_1", 1, 0, 3),
        chunk_of("job_1", 1, 3, 3),
    )


def test_invariant_3_a_log_of_an_older_attempt_is_stale(tokens, chunk_of, client):
    tokens.fence(MODEL, "job_1", 1, "w1")
    append(tokens, chunk_of("job_1", 1, 0, 2))
    fenced = tokens.fence(MODEL, "job_1", 2, "w2")
    assert fenced is not None
    assert (fenced.gen, fenced.next, fenced.is_canceled) == (0, 2, False)
    assert fenced.log == (chunk_of("job_1", 1, 0, 2),)
    assert append(tokens, chunk_of("job_1", 1, 2, 1)) == [STALE]
    assert append(tokens, chunk_of("job_1", 2, 2, 1)) == [LOGGED]
    assert tokens.fence(MODEL, "job_1", 1, "w1") is None
    assert client.hget(keys.job_hash(MODEL, "job_1"), "worker") == b"w2"


def test_fencing_twice_finds_the_same_log(tokens, chunk_of):
    first = tokens.fence(MODEL, "job_1", 4, "w1")
    assert first is not None
    assert first.gen == 3
    append(tokens, chunk_of("job_1", 4, 0, 2, gen=3))
    again = tokens.fence(MODEL, "job_1", 4, "w1")
    assert again is not None
    assert (again.gen, again.next) == (3, 2)


def test_appending_to_a_log_nobody_fenced_is_broken(tokens, chunk_of, client):
    assert append(tokens, chunk_of("job_1", 1, 0, 1)) == [BROKEN]
    assert client.keys("hr:*") == []


def test_states_of_one_flush_are_told_job_by_job(tokens, chunk_of):
    tokens.fence(MODEL, "job_1", 1, "w1")
    tokens.fence(MODEL, "job_2", 2, "w1")
    states = append(
        tokens,
        chunk_of("job_1", 1, 0, 1),
        chunk_of("job_2", 1, 0, 1),
        chunk_of("job_3", 1, 0, 1),
        chunk_of("job_1", 1, 0, 1),
    )
    assert states == [LOGGED, STALE, BROKEN, REPEATED]
    assert tokens.append(MODEL, []) == []


def test_a_lost_log_is_begun_anew_under_another_gen(tokens, chunk_of, client):
    tokens.fence(MODEL, "job_1", 1, "w1")
    append(tokens, chunk_of("job_1", 1, 0, 5))
    client.delete(keys.token_log(MODEL, "job_1"))
    fenced = tokens.fence(MODEL, "job_1", 2, "w2")
    assert fenced is not None
    assert (fenced.gen, fenced.next) == (1, 0)
    assert append(tokens, chunk_of("job_1", 2, 0, 1, gen=1)) == [LOGGED]


def test_tokens_are_charged_to_their_tenant_once(tokens, chunk_of, client):
    tokens.fence(MODEL, "job_1", 1, "w1")
    for _ in range(2):
        append(tokens, chunk_of("job_1", 1, 0, 5))
    append(tokens, chunk_of("job_1", 1, 5, 2))
    assert client.hgetall(keys.prefix(MODEL) + "served") == {b"tenant_a": b"7"}


def test_a_running_log_outlives_an_outage_and_an_ended_one_drains(tokens, chunk_of, client):
    tokens.fence(MODEL, "job_1", 1, "w1")
    append(tokens, chunk_of("job_1", 1, 0, 1))
    assert client.ttl(keys.token_log(MODEL, "job_1")) > 6 * 24 * 3600
    tokens.end(MODEL, [end_of("job_1", 1)])
    assert 0 < client.ttl(keys.token_log(MODEL, "job_1")) <= keys.LOG_TTL_S
    assert 0 < client.ttl(keys.job_hash(MODEL, "job_1")) <= keys.JOB_TTL_S


# -- end -------------------------------------------------------------------------------------


def test_invariant_4_one_end_and_nothing_after_it(tokens, chunk_of):
    tokens.fence(MODEL, "job_1", 1, "w1")
    append(tokens, chunk_of("job_1", 1, 0, 2))
    tokens.end(MODEL, [end_of("job_1", 2)])
    tokens.end(MODEL, [end_of("job_1", 2, status=wire.JobStatus.FAILED)])
    assert append(tokens, chunk_of("job_1", 1, 2, 1)) == [STALE]
    view = tokens.read(MODEL, "job_1")
    assert view.end == end_of("job_1", 2)
    assert view.chunks == (chunk_of("job_1", 1, 0, 2),)


def test_a_missing_end_record_is_told_from_an_unknown_job(tokens, streams, spec_for):
    tokens.fence(MODEL, "job_1", 1, "w1")
    streams.enqueue(spec_for("job_2"), 1)
    tokens.fence(MODEL, "job_3", 1, "w1")
    tokens.end(MODEL, [end_of("job_3")])
    jobs = ["job_1", "job_2", "job_3", "job_4"]
    assert tokens.lacks_end(MODEL, jobs) == [True, True, False, False]
    assert tokens.lacks_end(MODEL, []) == []


def test_a_job_that_never_ran_gets_an_end_record(tokens):
    tokens.end(MODEL, [end_of("job_1", status=wire.JobStatus.CANCELED)])
    view = tokens.read(MODEL, "job_1")
    assert view.chunks == ()
    assert view.end is not None
    assert view.end.status == wire.JobStatus.CANCELED
    assert tokens.read(MODEL, "job_none") == type(view)((), None, 0)


# -- frames ----------------------------------------------------------------------------------


def test_invariant_5_a_flush_is_one_frame_a_shard(tokens, chunk_of, client, shard):
    other = ShardSubscription(client, "g2")
    other.open()
    jobs = ["job_1", "job_2", "job_3"]
    for job in jobs:
        tokens.fence(MODEL, job, 1, "w1")
    tokens.subscribe("g1", [(MODEL, "job_1"), (MODEL, "job_2")])
    tokens.subscribe("g2", [(MODEL, "job_2")])
    chunks = [chunk_of(job, 1, 0, 2) for job in jobs]
    append(tokens, *chunks)
    assert frame(shard) == chunks[:2]
    assert frame(other) == [chunks[1]]
    other.close()


def test_invariant_3_logged_before_seen(tokens, chunk_of, shard, redis_url):
    tokens.fence(MODEL, "job_1", 1, "w1")
    tokens.subscribe("g1", [(MODEL, "job_1")])
    num_chunks, failures = 200, []

    def write():
        with connect(redis_url) as own:
            log = TokenLog(own)
            for first in range(num_chunks):
                append(log, chunk_of("job_1", 1, first, 1))

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while seen < num_chunks:
        messages = frame(shard)
        assert messages, f"no frame after {seen} tokens"
        for message in messages:
            seen = message.next
            logged = tokens.read(MODEL, "job_1").chunks
            if logged[-1].next < seen:
                failures.append((seen, logged[-1].next))
    writer.join(30)
    assert failures == []


def test_repeats_and_refused_chunks_are_not_published(tokens, chunk_of, shard):
    tokens.fence(MODEL, "job_1", 2, "w1")
    tokens.subscribe("g1", [(MODEL, "job_1")])
    append(tokens, chunk_of("job_1", 2, 0, 2))
    append(
        tokens, chunk_of("job_1", 2, 0, 2), chunk_of("job_1", 1, 2, 2), chunk_of("job_1", 2, 9, 1)
    )
    for _ in range(2):
        tokens.end(MODEL, [end_of("job_1", 2)])
    tokens.announce(MODEL, [(started_of("job_1", 2), 5)])
    assert frame(shard) == [chunk_of("job_1", 2, 0, 2)]
    assert frame(shard) == [end_of("job_1", 2)]
    assert frame(shard) == [started_of("job_1", 2)]


def test_only_the_newest_attempt_announces_its_start(tokens, shard):
    tokens.subscribe("g1", [(MODEL, "job_1"), (MODEL, "job_2")])
    tokens.fence(MODEL, "job_1", 2, "w1")
    tokens.fence(MODEL, "job_2", 1, "w1")
    starts = [started_of("job_1", 1), started_of("job_2", 1), started_of("job_none", 1)]
    tokens.announce(MODEL, [(start, 5) for start in starts])
    assert frame(shard) == [started_of("job_2", 1)]


def test_a_shard_that_left_or_ran_out_gets_nothing(tokens, chunk_of, client, shard):
    for job in ("job_1", "job_2", "job_3"):
        tokens.fence(MODEL, job, 1, "w1")
        tokens.subscribe("g1", [(MODEL, job)])
    tokens.unsubscribe("g1", MODEL, "job_1")
    client.zadd(keys.subscribers(MODEL, "job_2"), {"g1": 1})  # as if a minute had passed
    append(tokens, *(chunk_of(job, 1, 0, 1) for job in ("job_1", "job_2", "job_3")))
    assert frame(shard) == [chunk_of("job_3", 1, 0, 1)]


def test_a_broken_shard_connection_is_reported(client, shard):
    client.client_kill_filter(_type="pubsub")
    with pytest.raises(QueueUnavailable):
        frame(shard)


def test_a_redis_that_is_away_is_queue_unavailable(chunk_of):
    away = connect("redis://127.0.0.1:1/0")
    tokens = TokenLog(away)
    calls = [
        lambda: tokens.fence(MODEL, "job", 1, "w"),
        lambda: append(tokens, chunk_of("job", 1, 0, 1)),
        lambda: tokens.announce(MODEL, [(started_of("job", 1), 5)]),
        lambda: tokens.end(MODEL, [end_of("job")]),
        lambda: tokens.read(MODEL, "job"),
        lambda: tokens.subscribe("g", [(MODEL, "job")]),
        lambda: tokens.unsubscribe("g", MODEL, "job"),
        ShardSubscription(away, "g").open,
    ]
    for call in calls:
        with pytest.raises(QueueUnavailable):
            call()


def test_a_redis_that_is_full_is_queue_unavailable(tokens, chunk_of, client):
    tokens.fence(MODEL, "job_1", 1, "w1")
    before = client.config_get("maxmemory")["maxmemory"]
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueUnavailable, match="OutOfMemoryError"):
            append(tokens, chunk_of("job_1", 1, 0, 1))
    finally:
        client.config_set("maxmemory", before)


# -- chunks ----------------------------------------------------------------------------------

pieces = st.lists(st.text(max_size=4), min_size=1, max_size=12)


@given(texts=pieces, first=st.integers(0, 50), cut=st.integers(-5, 70), has_logprobs=st.booleans())
def test_a_chunk_can_be_cut_between_any_two_tokens(texts, first, cut, has_logprobs):
    ends, text = [], ""
    for piece in texts:
        text += piece
        ends.append(len(text))
    probs = tuple(wire.TokenLogprobs(-float(i)) for i in range(len(texts)))
    chunk = wire.TokenChunk(
        job="job_1",
        attempt=1,
        gen=0,
        first=first,
        ids=tuple(range(len(texts))),
        text=text,
        ends=tuple(ends),
        logprobs=probs if has_logprobs else None,
    )
    rest = chunk.since(cut)
    skipped = max(0, cut - first)
    if skipped >= len(texts):
        assert rest is None
        return
    assert rest is not None
    assert (rest.first, rest.next) == (max(cut, first), chunk.next)
    assert rest.text == "".join(texts[skipped:])
    assert rest.ids == chunk.ids[skipped:]
    assert (rest.logprobs is None) == (not has_logprobs)
    starts = (0, *rest.ends)
    assert [rest.text[a:b] for a, b in zip(starts, rest.ends, strict=False)] == texts[skipped:]


def test_the_position_says_how_far_a_log_is(tokens, streams, client, spec_for, chunk_of):
    job = spec_for()
    assert tokens.position(MODEL, job.job) is None
    streams.enqueue(job, 10)
    assert tokens.position(MODEL, job.job) == Position(0, 0, False)
    tokens.fence(MODEL, job.job, 3, "w1")
    append(tokens, chunk_of(job.job, 3, 0, 4, gen=2))
    assert tokens.position(MODEL, job.job) == Position(2, 4, False)
    tokens.end(MODEL, [end_of(job.job, 4, gen=2)])
    assert tokens.position(MODEL, job.job) == Position(2, 4, True)
    client.flushall()
    assert tokens.position(MODEL, job.job) is None


def test_many_logs_are_read_on_in_one_round_trip(tokens, chunk_of, client):
    for job in ("job_1", "job_2"):
        tokens.fence(MODEL, job, 1, "w1")
        append(tokens, chunk_of(job, 1, 0, 2))
        append(tokens, chunk_of(job, 1, 2, 1))
        append(tokens, chunk_of(job, 1, 3, 1))
    client.rpush(keys.token_log(MODEL, "job_3"), b"not a message")
    places = [(MODEL, "job_1", 0), (MODEL, "job_2", 1), (MODEL, "job_3", 0), (MODEL, "none", 7)]
    one, two, three, none = tokens.read_each(places, 2)
    assert one.chunks == (chunk_of("job_1", 1, 0, 2), chunk_of("job_1", 1, 2, 1))
    assert two.chunks == (chunk_of("job_2", 1, 2, 1), chunk_of("job_2", 1, 3, 1))
    assert isinstance(three, wire.WireError), "one that cannot be read spoils no other"
    assert (none.chunks, none.end, none.num_records) == ((), None, 0)
