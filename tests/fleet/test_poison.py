"""A whole fleet with poison among its jobs: each kind kills an engine in its own way.

The stub's tokens are known in advance, so the jobs beside the poison are checked token by token.
And a worker whose engine is broken in itself, which no job is to be blamed for.
"""

import random
import re
from collections.abc import Iterator

import psycopg
import pytest
import redis

from headrace.contract.streams import Workers
from headrace.tests.fleet.fleet_parts import Fleet, wait_for
from headrace.worker.engine.stub import Poison, stub_token

VOCAB = 49152
POISON_ID = 300
NUM_JOBS, NUM_TOKENS = 60, 40
#: Kind of poison -> what its dead letter's signature must be, or begin with.
KINDS = {
    Poison.SEGFAULT: "SIGSEGV",
    Poison.RAISE: "RuntimeError at stub.py:die: the prompt is poison of kind N",
    Poison.HANG: "stalled",  # in C code that holds the interpreter's lock
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_folder) -> Iterator[Fleet]:
    settings = {
        "HEADRACE_RUNNER": "stub",
        "HEADRACE_STUB_STEP_MS": "10",
        "HEADRACE_STUB_POISON": str(POISON_ID),
        "HEADRACE_STEP_TIMEOUT_S": "5",
        "HEADRACE_LEASE_S": "5",
    }
    made = Fleet(tmp_path_factory.mktemp("poison"), smollm2_folder, settings)
    made.start_servers()
    try:
        made.start("tasks", "tasks")
        made.start_gateway()
        for name in ("a", "b"):
            made.start_worker(name)
        yield made
    finally:
        made.stop()


def letters(fleet: Fleet) -> dict[str, tuple[str, int]]:
    with psycopg.connect(fleet.postgres.url.replace("+psycopg", "")) as db:
        rows = db.execute("SELECT job_id, signature, num_runs FROM dead_letters").fetchall()
    return {job: (signature, num_runs) for job, signature, num_runs in rows}


def wait_until_all_ended(fleet: Fleet, num_jobs: int) -> None:
    """Wait for the jobs one after the other: up to nine deaths cost an engine's start each."""
    num_ended = 0
    with psycopg.connect(fleet.postgres.url.replace("+psycopg", ""), autocommit=True) as db:
        query = "SELECT count(*) FROM jobs WHERE finished_at IS NOT NULL"

        def has_more_ended() -> bool:
            return db.execute(query).fetchall()[0][0] > num_ended

        while num_ended < num_jobs:
            wait_for(has_more_ended, f"more than {num_ended} of {num_jobs} jobs have ended", fleet)
            num_ended = db.execute(query).fetchall()[0][0]


def test_invariant_8_poison_is_dead_lettered_and_the_innocent_survive(fleet):
    seeds = [random.randrange(1 << 62) for _ in range(NUM_JOBS)]
    poison_at = dict(zip(random.sample(range(NUM_JOBS), len(KINDS)), KINDS, strict=True))
    jobs = []
    for number, seed in enumerate(seeds):
        kind = poison_at.get(number)
        prompt = [400, 401, 402] if kind is None else [400, POISON_ID, kind, 7]
        sampling = {"max_tokens": NUM_TOKENS, "temperature": 1.0, "seed": seed}
        jobs.append(fleet.submit(prompt_token_ids=prompt, sampling=sampling)["id"])
    poison = {jobs[number]: kind for number, kind in poison_at.items()}
    wait_until_all_ended(fleet, NUM_JOBS)
    ends = {job: fleet.job(job) for job in jobs}
    for seed, job in zip(seeds, jobs, strict=True):
        row, wanted = ends[job], [stub_token(seed, i, VOCAB) for i in range(NUM_TOKENS)]
        if job in poison:
            assert (row["status"], row["error"]["code"]) == ("failed", "poison"), row
            assert row["output"]["token_ids"] == wanted[:7], "what it made before is kept"
            events = list(fleet.events(job))
            assert events[-1].name == "failed"
            assert events[-1].data["error"]["code"] == "poison"
        else:
            assert row["status"] == "succeeded", row
            assert row["output"]["token_ids"] == wanted
    found = letters(fleet)
    assert found.keys() == poison.keys()
    for job, (signature, num_runs) in found.items():
        assert signature.startswith(KINDS[poison[job]])
        assert 2 <= num_runs <= 3
    said = "".join((fleet.folder / f"{name}.log").read_text() for name in ("a", "b"))
    assert said.count("job.dead_lettered") == len(KINDS)
    assert said.count("job.suspected") >= 2 * len(KINDS)
    assert said.count("engine.stuck") >= 2, "each death of the one that hangs was told"
    stands = [line for line in said.splitlines() if "engine.stands" in line]
    assert any(re.search(r"stub.py:\d+ die < ", line) for line in stands), "where it hung is told"
    assert str(POISON_ID) + "," not in said, "no prompt is logged"


def test_an_engine_that_is_broken_in_itself_makes_no_dead_letter(fleet, tmp_path):
    for name in ("a", "b"):
        assert fleet.end(name) == 0
    before, broken = letters(fleet), tmp_path / "broken"
    fleet.start_worker("c", HEADRACE_STUB_BROKEN_BY=str(broken))

    def said(what: str) -> bool:
        return what in (fleet.folder / "c.log").read_text()

    with redis.Redis.from_url(fleet.valkey.url) as client:

        def state() -> str:
            beat = Workers(client).alive().get("c")
            return "" if beat is None else beat.state

        seed = random.randrange(1 << 62)
        sampling = {"max_tokens": 500, "temperature": 1.0, "seed": seed}
        job = fleet.submit(prompt_token_ids=[400], sampling=sampling)["id"]
        for attempt in (1, 2):  # the second is its trial, alone
            wait_for(lambda n=attempt: said(f"job={job} worker=c attempt={n} "), "it runs", fleet)
            broken.touch()
            wait_for(lambda: state() == "broken", "the worker says that it is broken", fleet)
            wait_for(lambda: fleet.job(job)["status"] == "queued", "the job is queued", fleet)
            assert letters(fleet) == before, "its engine was not sane: nothing is proven"
            broken.unlink()
        row = fleet.wait_status(job, "succeeded", "failed")
        assert row["status"] == "succeeded", row
        assert row["output"]["token_ids"] == [stub_token(seed, i, VOCAB) for i in range(500)]
        assert state() == "ready"
    assert letters(fleet) == before
