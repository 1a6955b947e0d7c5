"""An operator's orders to real workers with the stub engine, whose every token is known.

Two workers; what is ordered of one, the other makes up for, and no stream shows a gap.
"""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import redis

from headrace.contract import database
from headrace.contract.accounts import Accounts
from headrace.contract.latency_bounds import KINDS
from headrace.contract.roles import Role
from headrace.contract.streams import Workers
from headrace.fleet.cli import run
from headrace.tests.fleet.fleet_parts import Fleet, wait_for
from headrace.tests.fleet.test_faults import Subscriber, run_jobs

#: Running jobs may finish for so long after a drain was ordered; less than a job here takes.
DRAIN_S = 1.0
#: Of 25 ms each: four times as long as a drain.
NUM_TOKENS = 160


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_folder) -> Iterator[Fleet]:
    settings = {
        "HEADRACE_RUNNER": "stub",
        "HEADRACE_STUB_STEP_MS": "25",
        "HEADRACE_LEASE_S": "30",  # what moves in a test moves because it was handed back
        "HEADRACE_DRAIN_S": str(DRAIN_S),
    }
    made = Fleet(tmp_path_factory.mktemp("orders"), smollm2_folder, settings)
    made.start_servers()
    try:
        made.start("tasks", "tasks")
        made.start_gateway()
        for name in ("a", "b"):
            made.start_worker(name)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def operator(fleet) -> Callable[..., httpx.Response]:
    """Call the operator's API with a key that may act."""
    engine = database.connect(fleet.postgres.url)
    key = Accounts(engine).create_key(tenant="ops", name="test", role=Role.OPERATOR)
    engine.dispose()

    def call(method: str, path: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key.secret}"}
        answer = fleet.call(method, f"/v1/admin/{path}", headers=headers)
        assert answer.is_success, answer.text
        return answer

    return call


@pytest.fixture
def worker(fleet, operator) -> Callable[[str], dict[str, Any]]:
    def find(name: str) -> dict[str, Any]:
        found = operator("GET", "workers").json()["workers"]
        return next((one for one in found if one["worker"] == name), {"state": "unseen"})

    return find


@pytest.fixture
def until(fleet, worker) -> Callable[..., dict[str, Any]]:
    """Wait until a worker is as told; return its figures."""

    def wait(name: str, **wanted: Any) -> dict[str, Any]:
        seen: list[dict[str, Any]] = []

        def is_so() -> bool:
            seen[:] = [worker(name)]
            return all(seen[0].get(key) == value for key, value in wanted.items())

        wait_for(is_so, f"{name} is {wanted}", fleet)
        return seen[0]

    return wait


def num_handed_back(fleet: Fleet) -> int:
    logs = [(fleet.folder / f"{name}.log").read_text() for name in ("a", "b")]
    return sum(log.count(" job.handed_back ") for log in logs)


@pytest.fixture(autouse=True)
def _serving(fleet, operator, until) -> None:
    for name in ("a", "b"):
        operator("POST", f"workers/{name}/resume")
    for name in ("a", "b"):
        until(name, state="ready", num_held=0)


def both_hold_jobs(fleet, worker) -> None:
    wait_for(
        lambda: worker("a").get("num_running", 0) > 0 and worker("b").get("num_running", 0) > 0,
        "both workers run jobs",
        fleet,
    )


def attempts_of(fleet: Fleet, subscribers: list[Subscriber]) -> list[int]:
    return [fleet.job(each.job)["attempt"] for each in subscribers]


def num_starts(fleet: Fleet, name: str) -> int:
    return (fleet.folder / f"{name}.log").read_text().count(" job.started ")


def test_a_worker_tells_what_it_does_and_counts_each_job_once(fleet, operator, worker, until):
    num_jobs, num_tokens = 8, 100

    def counted() -> dict[str, int]:
        with redis.Redis.from_url(fleet.valkey.url) as client:
            beats = Workers(client).alive().values()
        counts = {kind: sum(sum(b.latencies[kind]) for b in beats) for kind in KINDS}
        return counts | {"tokens": sum(beat.tokens_total for beat in beats)}

    def faults() -> None:
        def is_at_work() -> bool:
            both = [worker(name) for name in ("a", "b")]
            seen[:] = [one for one in both if one["tokens_per_s"] and one["step_ms"]]
            return bool(seen)

        seen: list[dict[str, Any]] = []
        wait_for(is_at_work, "figures of a worker at work", fleet)
        found = seen[0]
        assert found["step_ms"] >= 25, "as long as the stub's step at least"
        assert 0 < found["batch"] <= num_jobs
        assert 0 < found["kv_used"] < 1
        assert 0 < found["num_held"] <= num_jobs
        assert found["max_num_seqs"] == 64
        assert found["version"]
        assert (found["gpus"], found["gpu"]) == ([], None)

    before = counted()
    run_jobs(fleet, num_jobs, faults, num_tokens=num_tokens)

    wanted = {
        "ttft_ms": num_jobs,
        "itl_ms": num_jobs * (num_tokens - 1),
        "e2e_ms": num_jobs,
        "tokens": num_jobs * num_tokens,
    }
    grown: dict[str, int] = {}

    def has_all() -> bool:
        grown.update((name, count - before[name]) for name, count in counted().items())
        return all(grown[name] >= count for name, count in wanted.items())

    wait_for(has_all, "the beats tell of all", fleet)
    assert grown == wanted, "each job and each token once"


def test_a_drained_workers_jobs_go_on_elsewhere_and_it_stays_until_it_is_resumed(
    fleet, operator, worker, until
):
    before = worker("a")

    def faults() -> None:
        both_hold_jobs(fleet, worker)
        assert operator("POST", "workers/a/drain").status_code == 202
        until("a", state="draining")
        drained = until("a", state="drained", num_held=0, num_running=0)
        assert (drained["pid"], drained["engine_pid"]) == (before["pid"], before["engine_pid"])
        assert (drained["order"]["wanted"], drained["why"]) == ("drained", "")

    subscribers = run_jobs(fleet, 24, faults, num_tokens=NUM_TOKENS)
    assert set(attempts_of(fleet, subscribers)) == {1, 2}, "those of one worker moved, once"
    log = (fleet.folder / "a.log").read_text()
    assert "job.handed_back" in log
    num_before = num_starts(fleet, "a")
    run_jobs(fleet, 6, lambda: None, num_tokens=10)
    assert num_starts(fleet, "a") == num_before, "a drained worker claims nothing"
    assert worker("a")["state"] == "drained"

    operator("POST", "workers/a/resume")
    until("a", state="ready")
    operator("POST", "workers/b/drain")
    until("b", state="drained")
    run_jobs(fleet, 3, lambda: None, num_tokens=10)
    assert num_starts(fleet, "a") == num_before + 3


def test_a_quarantine_moves_jobs_at_once_and_survives_the_worker(fleet, operator, worker, until):
    def faults() -> None:
        both_hold_jobs(fleet, worker)
        operator("POST", "workers/a/quarantine")
        until("a", state="quarantined", num_held=0)

    subscribers = run_jobs(fleet, 24, faults, num_tokens=NUM_TOKENS)
    assert 2 in attempts_of(fleet, subscribers)
    old = worker("a")

    fleet.end("a", signal.SIGKILL)
    fleet.start_worker("a")
    new = until("a", state="quarantined")
    wait_for(lambda: worker("a")["pid"] != old["pid"], "the new process has beaten", fleet)
    assert new["order"]["wanted"] == "quarantined"
    num_before = num_starts(fleet, "a")
    run_jobs(fleet, 12, lambda: None, num_tokens=10)
    assert num_starts(fleet, "a") == num_before, "nothing runs where an operator forbade it"


def test_a_restart_drains_replaces_the_engine_and_serves_again(fleet, operator, worker, until):
    before = worker("a")

    def faults() -> None:
        both_hold_jobs(fleet, worker)
        operator("POST", "workers/a/restart")
        wait_for(
            lambda: worker("a").get("engine_pid") not in (None, before["engine_pid"]),
            "another engine",
            fleet,
        )
        after = until("a", state="ready")
        assert after["pid"] == before["pid"], "the worker itself lives on"
        assert after["engine_restarts"] == before["engine_restarts"], "it is no death"

    subscribers = run_jobs(fleet, 24, faults, num_tokens=NUM_TOKENS)
    assert set(attempts_of(fleet, subscribers)) <= {1, 2, 3}
    operator("POST", "workers/b/drain")
    until("b", state="drained")
    num_before = num_starts(fleet, "a")
    run_jobs(fleet, 3, lambda: None, num_tokens=10)
    assert num_starts(fleet, "a") == num_before + 3, "the new engine serves"


def test_a_restart_of_a_quarantined_worker_leaves_it_in_quarantine(fleet, operator, until, worker):
    operator("POST", "workers/a/quarantine")
    before = until("a", state="quarantined")
    operator("POST", "workers/a/restart")
    wait_for(
        lambda: worker("a").get("engine_pid") not in (None, before["engine_pid"]),
        "another engine",
        fleet,
    )
    assert worker("a")["state"] == "quarantined"


def test_orders_outlive_a_redis_that_is_wiped_between(fleet, operator, worker, until):
    starts = num_starts(fleet, "a") + num_starts(fleet, "b") - num_handed_back(fleet)

    def all_moved() -> bool:
        return num_starts(fleet, "a") + num_starts(fleet, "b") - num_handed_back(fleet) == (
            starts + 12
        )

    def faults() -> None:
        both_hold_jobs(fleet, worker)
        operator("POST", "workers/a/drain")
        until("a", state="drained")
        # A job that nobody runs while Redis is wiped begins anew, and says so.
        wait_for(all_moved, "what was handed back runs again", fleet)
        with redis.Redis.from_url(fleet.valkey.url) as client:
            client.flushall()
        until("a", state="drained")

    subscribers = run_jobs(fleet, 12, faults, num_tokens=NUM_TOKENS)
    assert 2 in attempts_of(fleet, subscribers)
    num_before = num_starts(fleet, "a")
    run_jobs(fleet, 6, lambda: None, num_tokens=10)
    assert num_starts(fleet, "a") == num_before
    operator("POST", "workers/a/resume")
    until("a", state="ready")


def test_with_postgres_away_a_worker_goes_on_as_it_was_told(fleet, operator, worker, until):
    operator("POST", "workers/a/drain")
    until("a", state="drained")
    fleet.postgres_door.cut()
    log = fleet.folder / "a.log"
    wait_for(lambda: "order.unread" in log.read_text(), "the worker cannot read its order", fleet)
    fleet.postgres_door.join()
    until("a", state="drained")
    operator("POST", "workers/a/resume")
    until("a", state="ready")


@pytest.mark.parametrize(("action", "state"), [("drain", "drained"), ("quarantine", "quarantined")])
def test_sigterm_ends_a_worker_in_each_state_and_the_order_waits_for_its_return(
    fleet, operator, worker, until, action, state
):
    operator("POST", f"workers/a/{action}")
    until("a", state=state)
    assert fleet.end("a") == 0
    assert worker("a")["state"] == "unseen", "who leaves in good order is not dead"
    fleet.start_worker("a")
    until("a", state=state)


def test_sigterm_while_it_drains_hands_back_and_ends(fleet, operator, worker, until):
    ended: list[int] = []

    def faults() -> None:
        both_hold_jobs(fleet, worker)
        operator("POST", "workers/a/drain")
        until("a", state="draining")
        ended.append(fleet.end("a"))

    subscribers = run_jobs(fleet, 12, faults, num_tokens=NUM_TOKENS)
    assert ended == [0]
    assert 2 in attempts_of(fleet, subscribers)
    fleet.start_worker("a")


def test_the_command_line_lists_and_orders(fleet, operator, until, capsys):
    engine = database.connect(fleet.postgres.url)
    keys = {
        role: Accounts(engine).create_key(tenant="cli", name="cli", role=role).secret
        for role in (Role.VIEWER, Role.OPERATOR)
    }
    engine.dispose()

    def headrace(role: Role, *arguments: str) -> tuple[int, str, str]:
        environ = {"HEADRACE_API_URL": fleet.api, "HEADRACE_API_KEY": keys[role]}
        code = run(["admin", "workers", *arguments], environ)
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = headrace(Role.VIEWER)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["worker", "state", "model"]
    assert [line.split()[:2] for line in lines[1:]] == [["a", "ready"], ["b", "ready"]]
    code, out, err = headrace(Role.VIEWER, "drain", "a")
    assert (code, out) == (1, "")
    assert err.startswith("forbidden: ")
    code, out, err = headrace(Role.OPERATOR, "drain", "a")
    assert (code, out) == (0, "")
    assert "wanted: drained" in err
    until("a", state="drained")
    code, out, _ = headrace(Role.OPERATOR, "list", "--json")
    assert code == 0
    assert '"state": "drained"' in out
    code, _, err = headrace(Role.OPERATOR, "restart", "nobody")
    assert (code, err.split(":")[0]) == (1, "not_found")
    code, out, _ = headrace(Role.OPERATOR, "resume", "a", "--json")
    assert code == 0
    assert '"wanted": "serving"' in out
