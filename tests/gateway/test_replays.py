"""The runner of replays on real stores, and the jobs it makes on their way through the relay."""

from __future__ import annotations

import time

import pytest

from headrace.contract.dead_letters import DeadLetters, LetterFilter
from headrace.contract.ids import new_id
from headrace.contract.replays import Replays
from headrace.gateway.replays import ReplayRunner
from headrace.gateway.upkeep import Upkeep
from headrace.tests.contract.burial import bury
from headrace.tests.gateway.courier import MODEL


@pytest.fixture
def runner(services) -> ReplayRunner:
    return ReplayRunner(Replays(services.engine))


@pytest.fixture
def started(client, services):
    """Return a function that buries jobs and starts their replay; returns jobs and replay."""

    def start(num: int, rate_per_min: int) -> tuple[list[str], str]:
        signature = new_id("sig")
        body = {"model": MODEL, "prompt": "x"}
        jobs = [client.post("/v1/jobs", json=body).get_json()["id"] for _ in range(num)]
        for job in jobs:
            bury(services.engine, job, signature)
        row = Replays(services.engine).start(
            LetterFilter(signature=signature),
            rate_per_min=rate_per_min,
            by="ann",
            num_matched=num,
        )
        return jobs, row["id"]

    return start


def test_every_replay_makes_progress_at_its_own_rate(services, runner, started):
    (quick, fast), (slow, calm) = started(4, 6000), started(2, 1)
    replays, letters = Replays(services.engine), DeadLetters(services.engine)
    deadline = time.monotonic() + 60
    num_made = 0
    while not replays.replay(fast)["ended_at"]:
        num_made += runner.run()
        assert time.monotonic() < deadline
    assert num_made == 5
    assert replays.replay(calm)["num_done"] == 1
    assert all(letters.letter(job)["replayed_as"] for job in quick)
    assert [bool(letters.letter(job)["replayed_as"]) for job in slow] == [True, False]
    replays.stop(calm, by="ann")
    assert runner.run() == 0


def test_a_replayed_job_waits_in_the_outbox_until_the_relay_enqueues_it(services, runner, started):
    (old,), _ = started(1, 60)
    assert runner.run() == 1
    new = DeadLetters(services.engine).letter(old)["replayed_as"]
    upkeep = Upkeep(
        ledger=services.ledger,
        operators=services.operators,
        streams=services.streams,
        tokens=services.token_log,
        workers=services.workers,
        pauses=services.pauses,
        lease_s=1,
        retention_days=1,
    )
    assert services.streams.knows(MODEL, [new]) == [False]
    assert upkeep.relay(older_than_s=0) >= 1
    assert services.streams.knows(MODEL, [new]) == [True]
    assert services.ledger.job(new)["made_from"] == old
