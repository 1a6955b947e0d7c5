"""A Redis that was wiped, lost its last second, or forgot its workers."""

from __future__ import annotations

from headrace.contract import keys, wire
from headrace.contract.streams import Workers
from headrace.contract.tokens import Overlap

MODEL = "tiny/model: a {b}"
LONG_MS = 60_000


def claim(streams, worker, lease_ms=LONG_MS):
    return streams.claim(
        MODEL, worker, lease_ms=lease_ms, room_tokens=1_000, max_jobs=100, is_idle=False
    )


def names_of(client):
    found = {key.decode().removeprefix(keys.prefix(MODEL)) for key in client.keys("hr:*")}
    return sorted(found - {"counts", "takeovers"})  # figures stay


def test_invariant_2_a_worker_restores_its_job_after_flushall(
    streams, tokens, spec_for, chunk_of, client
):
    spec = spec_for()
    streams.enqueue(spec, 7)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")
    log = [chunk_of(spec.job, 1, 0, 3), chunk_of(spec.job, 1, 3, 2)]
    tokens.append(MODEL, [("tenant_a", chunk) for chunk in log])
    client.flushall()
    assert streams.renew(MODEL, "w1", [(spec.job, 1)]) == ["gone"]
    for _ in range(2):  # safe to repeat
        assert streams.restore(spec, "w1", 7, attempt=1, gen=0, log=log)
    assert streams.renew(MODEL, "w1", [(spec.job, 1)]) == ["held"]
    assert tokens.read(MODEL, spec.job).chunks == tuple(log)
    assert [s.name for s in tokens.append(MODEL, [("tenant_a", chunk_of(spec.job, 1, 5, 1))])] == [
        "LOGGED"
    ]
    claims = claim(streams, "w2", lease_ms=0).claims
    assert [(c.job, wire.decode(c.spec), c.cost_tokens) for c in claims] == [(spec.job, spec, 7)]
    streams.finish(MODEL, [(spec.job, claims[0].entry)])
    assert names_of(client) == [f"job:{spec.job}", f"log:{spec.job}", "served"]


def test_restore_replaces_the_entry_a_relay_made_meanwhile(streams, tokens, spec_for):
    spec = spec_for()
    streams.enqueue(spec, 1)
    assert streams.restore(spec, "w1", 1, attempt=1, gen=0, log=[])
    assert claim(streams, "w2").claims == ()
    assert [c.job for c in claim(streams, "w2", lease_ms=0).claims] == [spec.job]


def test_restore_never_shortens_a_log_that_is_there(streams, tokens, spec_for, chunk_of, client):
    # The last append was made and its reply lost: subscribers may have seen what the worker
    # does not know to be logged.
    spec = spec_for()
    streams.enqueue(spec, 1)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")
    log = [chunk_of(spec.job, 1, 0, 3), chunk_of(spec.job, 1, 3, 2)]
    tokens.append(MODEL, [("tenant_a", chunk) for chunk in log])
    assert streams.restore(spec, "w1", 1, attempt=1, gen=0, log=log[:1])
    assert tokens.read(MODEL, spec.job).chunks == tuple(log)
    assert tokens.append(MODEL, [("tenant_a", chunk_of(spec.job, 1, 3, 3))]) == [Overlap(5)]
    client.delete(keys.token_log(MODEL, spec.job))  # evicted: what the worker knows is all there is
    assert streams.restore(spec, "w1", 1, attempt=1, gen=0, log=log[:1])
    assert tokens.read(MODEL, spec.job).chunks == tuple(log[:1])


def test_restore_is_refused_once_a_newer_attempt_has_the_job(streams, tokens, spec_for, chunk_of):
    spec = spec_for()
    streams.enqueue(spec, 1)
    tokens.fence(MODEL, spec.job, 2, "w2")
    tokens.append(MODEL, [("tenant_a", chunk_of(spec.job, 2, 0, 1, gen=1))])
    assert not streams.restore(spec, "w1", 1, attempt=1, gen=0, log=[chunk_of(spec.job, 1, 0, 9)])
    assert tokens.read(MODEL, spec.job).chunks == (chunk_of(spec.job, 2, 0, 1, gen=1),)


def test_a_job_that_ended_is_neither_renewed_nor_restored(streams, tokens, spec_for):
    # The lease thread of a worker may run between its end record and its forgetting the job.
    spec = spec_for()
    streams.enqueue(spec, 1)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")
    tokens.end(MODEL, [end_of(spec.job)])
    streams.finish(MODEL, [(spec.job, "")])
    assert streams.renew(MODEL, "w1", [(spec.job, 1)]) == ["lost"]
    assert not streams.restore(spec, "w1", 1, attempt=1, gen=0, log=[])
    assert claim(streams, "w2", lease_ms=0).claims == ()


def test_a_worker_ahead_of_a_redis_that_lost_its_last_second_restores(
    streams, tokens, spec_for, chunk_of
):
    # The append-only file is synced once a second: the newest fence may be gone after a crash.
    spec = spec_for()
    streams.enqueue(spec, 1)
    claim(streams, "w1")
    tokens.fence(MODEL, spec.job, 1, "w1")  # what Redis came back with; the worker is at 2
    chunk = chunk_of(spec.job, 2, 0, 1)
    assert [s.name for s in tokens.append(MODEL, [("tenant_a", chunk)])] == ["BROKEN"]
    assert streams.renew(MODEL, "w2", [(spec.job, 2)]) == ["gone"]
    assert streams.restore(spec, "w2", 1, attempt=2, gen=0, log=[chunk])
    assert streams.renew(MODEL, "w2", [(spec.job, 2)]) == ["held"]
    assert streams.renew(MODEL, "w1", [(spec.job, 1)]) == ["lost"]


def end_of(job, **changes):
    fields = {
        "job": job,
        "gen": 0,
        "next": 0,
        "status": wire.JobStatus.SUCCEEDED,
        "finish_reason": wire.FinishReason.STOP,
        "prompt_tokens": 1,
        "cached_tokens": 0,
    }
    return wire.JobEnd(**(fields | changes))


def beat_of(worker, **changes):
    fields = dict.fromkeys(
        ("step", "step_age_ms", "num_running", "num_waiting", "free_blocks", "total_blocks"), 0
    )
    fields |= {"worker": worker, "model": MODEL, "host": "h", "pid": 1, "state": "ready"}
    return wire.WorkerBeat(**(fields | {"started_ms": 1} | changes))


def test_a_worker_is_alive_until_its_beat_runs_out_or_it_leaves(client):
    workers = Workers(client)
    assert workers.alive() == {}
    for name in ("w1", "w2", "w3"):
        workers.beat(beat_of(name), lifetime_ms=60_000)
    client.delete(keys.worker_beat("w2"))  # as if it had run out
    workers.leave("w3")
    assert workers.alive() == {"w1": beat_of("w1")}
    assert 0 < client.pttl(keys.worker_beat("w1")) <= 60_000


def test_a_silent_worker_is_seen_for_an_hour_as_it_was_last(client):
    workers = Workers(client)
    assert workers.seen() == []
    for name in ("w3", "w1", "w2"):
        workers.beat(beat_of(name, num_held=4), lifetime_ms=60_000)
    client.delete(keys.worker_beat("w2"))  # as if it had run out
    client.pexpire(keys.worker_last("w2"), keys.WORKER_LAST_S * 1000 - 5_000)
    workers.leave("w3")
    alive, dead = workers.seen()
    assert (alive.beat, alive.is_alive) == (beat_of("w1", num_held=4), True)
    assert alive.beat_age_ms < 60_000
    assert (dead.beat, dead.is_alive) == (beat_of("w2", num_held=4), False)
    assert 5_000 <= dead.beat_age_ms < 60_000
    client.delete(keys.worker_last("w2"))
    assert [each.beat.worker for each in workers.seen()] == ["w1"]


def test_a_beat_of_another_version_hides_no_other_worker(client):
    workers = Workers(client)
    for name in ("new", "w1"):
        workers.beat(beat_of(name), lifetime_ms=60_000)
    client.set(keys.worker_last("new"), b"\x81\xa1v\x63")
    assert [each.beat.worker for each in workers.seen()] == ["w1"]
