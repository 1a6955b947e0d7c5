"""A fleet with the stub engine under faults, with a checker that knows every answer.

Token i of the stub is a pure function of (seed, i), so what a job's stream and row must hold is
known before it runs. Subscribers reconnect with the last id they have, as a browser does.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest
import redis

from headrace.tests.fleet.fleet_parts import PATIENCE_S, Event, Fleet, check_stream, wait_for
from headrace.worker.engine.stub import stub_token

VOCAB = 49152
WORKERS = ("a", "b")
ENDS = ("succeeded", "failed", "canceled", "expired")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_folder) -> Iterator[Fleet]:
    settings = {"HEADRACE_RUNNER": "stub", "HEADRACE_STUB_STEP_MS": "25", "HEADRACE_LEASE_S": "2"}
    made = Fleet(tmp_path_factory.mktemp("faults"), smollm2_folder, settings)
    made.start_servers()
    try:
        made.start("tasks", "tasks")
        made.start_gateway()
        for name in WORKERS:
            made.start_worker(name)
        yield made
    finally:
        made.stop()


@dataclass
class Subscriber:
    """Follows one job to its end through whatever happens, and keeps every event."""

    fleet: Fleet
    job: str
    events: list[Event] = field(default_factory=list)
    num_connections: int = 0

    def run(self) -> None:
        last = None
        deadline = time.monotonic() + 2 * PATIENCE_S
        while time.monotonic() < deadline:
            self.num_connections += 1
            try:
                for event in self.fleet.events(self.job, after=last):
                    self.events.append(event)
                    last = event.id if event.id is not None else last
                    if event.name in ENDS:
                        return
            except httpx.HTTPError:
                continue  # the gateway is away or ended the stream


def run_jobs(
    fleet: Fleet, count: int, faults: Callable[[], None], num_tokens: int = 60
) -> list[Subscriber]:
    """Submit jobs, let the faults happen while they run, and check every answer."""
    seeds = [random.randrange(1 << 62) for _ in range(count)]
    sampling = {"max_tokens": num_tokens, "temperature": 1.0}
    jobs = [fleet.submit(prompt="p", sampling={**sampling, "seed": seed})["id"] for seed in seeds]
    subscribers = [Subscriber(fleet, job) for job in jobs]
    threads = [threading.Thread(target=each.run) for each in subscribers]
    for thread in threads:
        thread.start()
    faults()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    for seed, subscriber in zip(seeds, subscribers, strict=True):
        check_answer(fleet, seed, subscriber, num_tokens)
    return subscribers


def check_answer(fleet: Fleet, seed: int, subscriber: Subscriber, num_tokens: int) -> None:
    """One ending; indexes once and in order; the tokens that must come; stored == streamed."""
    row, events = fleet.job(subscriber.job), subscriber.events
    assert row["status"] == "succeeded", row
    assert [e.name for e in events if e.name in ENDS] == ["succeeded"]
    assert events[-1].name == "succeeded"
    assert "reset" not in [e.name for e in events], "no worker and Redis died together"
    text, ids = check_stream(events)
    assert ids == [stub_token(seed, index, VOCAB) for index in range(num_tokens)]
    assert (row["output"]["text"], row["output"]["token_ids"]) == (text, ids)
    assert row["usage"]["completion_tokens"] == num_tokens


def engine_pid(fleet: Fleet, worker: str) -> int:
    said = (fleet.folder / f"{worker}.log").read_text()
    return int(said.rpartition("engine.started")[2].split("pid=")[1].split()[0])


def test_workers_engines_and_both_are_killed_while_jobs_run(fleet):
    def faults() -> None:
        fleet.end("a", signal.SIGKILL)
        fleet.start_worker("a")
        os.kill(engine_pid(fleet, "b"), signal.SIGKILL)
        fleet.kill_group("a")
        fleet.start_worker("a")

    subscribers = run_jobs(fleet, 24, faults, num_tokens=250)
    attempts = [fleet.job(each.job)["attempt"] for each in subscribers]
    assert max(attempts) > 1, "some jobs were taken over"


def test_a_device_lost_twice_ends_its_worker_and_others_finish_the_jobs(fleet):
    for name in WORKERS:
        assert fleet.end(name) == 0
    fleet.start_worker("broken", HEADRACE_STUB_LOST_STEPS="15")

    def faults() -> None:
        broken = fleet.processes["broken"]
        try:
            assert broken.wait(PATIENCE_S) == 3
        finally:
            fleet.kill_group("broken")
        for name in WORKERS:
            fleet.start_worker(name)

    subscribers = run_jobs(fleet, 12, faults)
    said = (fleet.folder / "broken.log").read_text()
    assert said.count("engine.started") == said.count("engine.died") == 2
    assert "headrace worker: the engine died twice" in said.splitlines()[-1]
    assert "worker.stopped" in said, "an orderly stop: no job waits for its lease to run out"
    attempts = [fleet.job(each.job)["attempt"] for each in subscribers]
    assert max(attempts) > 2, "some jobs were in both engines' hands"


def test_a_pool_that_the_machine_does_not_have_ends_the_worker_with_the_bytes(fleet):
    settings = {"HEADRACE_RUNNER": "model", "HEADRACE_KV_CACHE_MB": "4000000"}
    fleet.start("large", "worker", HEADRACE_WORKER_ID="large", **settings)
    assert fleet.processes.pop("large").wait(PATIENCE_S) == 2
    (last,) = (fleet.folder / "large.log").read_text().splitlines()[-1:]
    assert "the engine cannot start: KV pool of 4,194,3" in last


def test_redis_is_unreachable_for_longer_than_a_lease(fleet):
    def faults() -> None:
        fleet.redis_door.cut()
        back_at = time.monotonic() + 3.0  # longer than the lease
        wait_for(lambda: time.monotonic() > back_at, "the lease has run out", fleet)
        fleet.redis_door.join()

    run_jobs(fleet, 16, faults)


def test_redis_is_killed_and_started_again_on_its_file(fleet):
    def faults() -> None:
        fleet.valkey.process.kill()
        fleet.valkey.process.wait()
        fleet.restart_valkey()

    run_jobs(fleet, 16, faults)


def test_postgres_is_killed_and_started_again(fleet):
    def faults() -> None:
        fleet.postgres.process.kill()
        fleet.postgres.process.wait()
        fleet.restart_postgres()

    run_jobs(fleet, 16, faults)


def test_pubsub_connections_are_killed(fleet):
    def faults() -> None:
        with redis.Redis.from_url(fleet.valkey.url) as client:
            killed: list[int] = []

            def kill() -> bool:
                killed.append(client.client_kill_filter(_type="pubsub"))
                return sum(killed) >= 12

            wait_for(kill, "the gateway's and each worker's are killed some four times", fleet)

    run_jobs(fleet, 16, faults)


def test_the_gateway_is_killed_with_streams_open(fleet):
    def faults() -> None:
        fleet.kill_group("gateway")
        fleet.start_gateway()

    subscribers = run_jobs(fleet, 16, faults, num_tokens=150)
    assert max(each.num_connections for each in subscribers) > 1
