"""What a worker finds in Redis and Postgres may be broken: the job ends, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import psycopg
import pytest
import redis

from headrace.contract import redis_client, wire
from headrace.contract.streams import JobStreams
from headrace.tests.fleet.fleet_parts import Fleet, wait_for

ENDS = ("succeeded", "failed", "canceled", "expired")

#: Changes of a good spec that a gateway would never have let in, each fit for the wire.
HOSTILE_SPECS = {
    "token beyond the vocabulary": {"prompt": None, "prompt_token_ids": (1 << 31,)},
    "negative token": {"prompt": None, "prompt_token_ids": (-1,)},
    "token of 63 bits": {"prompt": None, "prompt_token_ids": ((1 << 63) - 1,)},
    "no prompt": {"prompt": None},
    "two prompts": {"prompt_token_ids": (5,)},
    "empty prompt": {"prompt": ""},
    "messages that are none": {"prompt": None, "messages": ({"role": 7, "content": [1]},)},
    "another job's id": {"job": "job_" + "0" * 32},
    "no tokens asked": {"sampling": wire.Sampling(max_tokens=0)},
    "less than none asked": {"sampling": wire.Sampling(max_tokens=-5)},
    "too many asked": {"sampling": wire.Sampling(max_tokens=1 << 62)},
    "not a number": {"sampling": wire.Sampling(temperature=float("nan"), top_p=float("inf"))},
    "negative top_k": {"sampling": wire.Sampling(top_k=-(1 << 40), max_tokens=3)},
    "seed of no kind": {"sampling": wire.Sampling(seed=-(1 << 63), max_tokens=3)},
    "bias beyond all": {"sampling": wire.Sampling(logit_bias={-9: 1e300, 1 << 40: float("nan")})},
    "logprobs beyond all": {"sampling": wire.Sampling(logprobs=1 << 40, max_tokens=3)},
    "empty stop": {"sampling": wire.Sampling(stop=("",), max_tokens=3)},
    "deadline before time": {"deadline_ms": -(1 << 60)},
    "trace of nothing": {"traceparent": "\x00-zz"},
}
#: Bytes in the place of a spec.
HOSTILE_BYTES = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "another message": b"\x81\xa4type\xa3job",
    "deep": b"\x91" * 50_000,
    "long": b"\xdd\xff\xff\xff\xff",
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, smollm2_folder) -> Iterator[Fleet]:
    settings = {"HEADRACE_RUNNER": "stub", "HEADRACE_STUB_STEP_MS": "1"}
    made = Fleet(tmp_path_factory.mktemp("hostile"), smollm2_folder, settings)
    made.start_servers()
    try:
        made.start_gateway()
        made.start_worker()  # tells what model there is
        yield made
    finally:
        made.stop()


@pytest.fixture
def client(fleet: Fleet) -> Iterator[redis_client.Client]:
    client = redis_client.connect(fleet.valkey.url)
    yield client
    client.close()


def queued(fleet: Fleet) -> str:
    """Accept a job that no worker gets: it is in Postgres, and no more in Redis."""
    job = fleet.submit(prompt="x", sampling={"max_tokens": 3})["id"]
    with redis.Redis.from_url(fleet.valkey.url) as client:
        client.flushall()
    return job


def spec(fleet: Fleet, job: str) -> wire.JobSpec:
    with psycopg.connect(fleet.postgres.url.replace("+psycopg", "")) as db:
        (tenant,) = db.execute("select tenant_id from jobs where id = %s", [job]).fetchone() or ()
    return wire.JobSpec(
        job=job,
        tenant=tenant,
        model=fleet.model.name,
        job_class=wire.JobClass.INTERACTIVE,
        priority=wire.Priority.NORMAL,
        sampling=wire.Sampling(max_tokens=3),
        prompt="x",
    )


def test_hostile_specs_end_their_jobs_and_no_worker(fleet, client, monkeypatch):
    fleet.end("worker")
    jobs = {what: queued(fleet) for what in [*HOSTILE_SPECS, *HOSTILE_BYTES]}
    streams, encode = JobStreams(client), wire.encode
    for what, changes in HOSTILE_SPECS.items():
        good = spec(fleet, jobs[what])
        bad = msgspec.structs.replace(good, **changes)
        monkeypatch.setattr(wire, "encode", lambda _, bad=bad: encode(bad))
        assert streams.enqueue(good, 10)
    for what, payload in HOSTILE_BYTES.items():
        monkeypatch.setattr(wire, "encode", lambda _, payload=payload: payload)
        assert streams.enqueue(spec(fleet, jobs[what]), 10)
    monkeypatch.undo()
    fleet.start_worker()
    ended = {what: fleet.wait_status(job, *ENDS)["status"] for what, job in jobs.items()}
    for what in HOSTILE_BYTES:
        assert ended[what] == "failed", what
    check_alive(fleet)


def test_a_hostile_token_log_ends_no_worker(fleet, client):
    """A log of bytes that are no tokens: what was running is made anew, or ends as failed."""
    job = fleet.submit(prompt="x", sampling={"max_tokens": 200})["id"]
    fleet.kill_group("worker")
    for key in client.keys("*"):
        if client.type(key) == b"list" and job.encode() in key:
            client.lpush(key, b"\xff\x00 no message")
    fleet.start_worker()
    check_alive(fleet)


def test_hostile_rows_hold_up_no_other_job(fleet, client):
    """Rows that no gateway wrote, put back into Redis by relay and sweeper: others go on."""
    fleet.end("worker")
    rows = {
        '{"prompt_token_ids": [-5, "x"]}': "{}",
        '{"prompt": 7}': '{"max_tokens": 3}',
        '["prompt"]': '{"max_tokens": 3}',
        '{"messages": "none"}': '{"max_tokens": "many"}',
        '{"prompt": "x"}': '{"no": "such field"}',
    }
    jobs = [queued(fleet) for _ in rows]
    good = queued(fleet)
    with psycopg.connect(fleet.postgres.url.replace("+psycopg", "")) as db:
        for job, (given, sampling) in zip(jobs, rows.items(), strict=True):
            db.execute(
                "update jobs set input = %s::jsonb, sampling = %s::jsonb where id = %s",
                [given, sampling, job],
            )
    fleet.start_worker()
    fleet.start("tasks", "tasks", HEADRACE_SWEEP_EVERY_S="0.5", HEADRACE_RELAY_EVERY_S="0.5")
    assert fleet.wait_status(good, *ENDS)["status"] == "succeeded"
    check_alive(fleet)


def check_alive(fleet: Fleet) -> None:
    """No process has ended, no engine has died, and a good job is served."""
    job = fleet.submit(prompt="x", sampling={"max_tokens": 3})["id"]
    assert fleet.wait_status(job, *ENDS)["status"] == "succeeded"
    wait_for(lambda: True, "nothing has ended", fleet)
    log = (fleet.folder / "worker.log").read_text()
    assert "engine.died" not in log
    assert "Traceback" not in log
