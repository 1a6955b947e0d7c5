"""Sample, alarms, feed, pauses and `headrace top` on a running fleet with stub engines."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from headrace.contract import database, keys
from headrace.contract.accounts import Accounts
from headrace.contract.roles import Role
from headrace.fleet.cli import run
from headrace.tests.fleet.fleet_parts import Fleet, wait_for


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_folder) -> Iterator[Fleet]:
    settings = {"HEADRACE_RUNNER": "stub", "HEADRACE_STUB_STEP_MS": "20"}
    made = Fleet(tmp_path_factory.mktemp("live"), smollm2_folder, settings)
    made.start_servers()
    try:
        made.start("tasks", "tasks")
        made.start_gateway()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def cli(fleet: Fleet) -> Callable[..., tuple[int, str]]:
    """Run the CLI with an operator's key; return status and standard output."""
    engine = database.connect(fleet.postgres.url)
    key = Accounts(engine).create_key(tenant="one", name="ops", role=Role.OPERATOR).secret
    engine.dispose()
    environ = {"HEADRACE_API_URL": fleet.api, "HEADRACE_API_KEY": key}

    def call(*arguments: str) -> tuple[int, str]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = run(arguments, environ)
        return status, printed.getvalue()

    return call


def state_of(cli: Callable[..., tuple[int, str]]) -> dict[str, Any]:
    status, printed = cli("top", "--json")
    assert status == 0, printed
    return json.loads(printed)


def codes_of(state: dict[str, Any]) -> list[str]:
    return [alarm["code"] for alarm in state["overview"]["alarms"]]


def test_jobs_without_a_worker_raise_an_alarm_that_goes_when_one_comes(fleet, cli):
    fleet.start_worker("w1")  # registers the model
    fleet.end("w1")
    jobs = [fleet.submit(sampling={"max_tokens": 40}) for _ in range(5)]
    wait_for(lambda: codes_of(state_of(cli)) == ["no_worker"], "the alarm stands", fleet)
    (queue,) = state_of(cli)["queues"].values()
    assert (queue["num_queued"], queue["tenant"]) == (5, "one")
    wait_for(lambda: state_of(cli)["overview"]["num_queued"] == 5, "a sample of all five", fleet)
    fleet.start_worker("w1")
    for job in jobs:
        fleet.wait_status(job["id"], "succeeded")
    wait_for(lambda: codes_of(state_of(cli)) == [], "the alarm is gone", fleet)
    wait_for(lambda: state_of(cli)["overview"].get("ttft_ms") is not None, "latencies", fleet)
    state = state_of(cli)
    assert state["queues"] == {}
    assert state["workers"]["w1"]["state"] == "ready"
    assert state["overview"]["models"][fleet.model.name]["num_workers"] == 1


def test_rates_are_those_of_the_jobs_that_ran(fleet, cli):
    for _ in range(10):
        fleet.submit(sampling={"max_tokens": 10})
    wait_for(lambda: (state_of(cli)["overview"].get("tokens_per_s") or 0) > 0, "tokens", fleet)
    history = fleet.call("GET", "/v1/admin/overview", headers=_bearer(fleet)).json()["history"]
    assert len(history["at"]) >= 2
    assert history["at"] == sorted(history["at"])
    assert {len(values) for values in history.values()} == {len(history["at"])}


def test_a_pause_holds_through_the_loss_of_redis_and_ends_with_resume(fleet, cli):
    model = fleet.model.name
    status, printed = cli("admin", "queues", "pause", "--model", model, "--tenant", "one", "--json")
    assert status == 0
    assert json.loads(printed)["pauses"][0]["tenant"] == "one"
    with redis.Redis.from_url(fleet.valkey.url) as client:
        client.flushall()

    def is_swept() -> bool:
        with redis.Redis.from_url(fleet.valkey.url) as client:
            return client.exists(keys.paused(model)) == 1

    wait_for(is_swept, "a sweep has put the pause back", fleet)
    job = fleet.submit(sampling={"max_tokens": 5})
    other = fleet.call(
        "POST",
        "/v1/jobs",
        json={"model": model, "prompt": "p", "sampling": {"max_tokens": 5}},
        headers={"Authorization": f"Bearer {fleet.other_key}"},
    ).json()

    def other_is_done() -> bool:
        headers = {"Authorization": f"Bearer {fleet.other_key}"}
        answer = fleet.call("GET", f"/v1/jobs/{other['id']}", headers=headers)
        return answer.json()["status"] == "succeeded"

    wait_for(other_is_done, "a job of another tenant has run", fleet)
    assert fleet.job(job["id"])["status"] == "queued"
    assert cli("admin", "queues", "resume", "--model", model)[0] == 0
    fleet.wait_status(job["id"], "succeeded")


def test_purge_wants_the_name_and_cancels_what_waits(fleet, cli, capsys):
    model = fleet.model.name
    assert cli("admin", "queues", "pause", "--model", model)[0] == 0
    jobs = [fleet.submit(sampling={"max_tokens": 5}) for _ in range(3)]
    status, _ = cli("admin", "queues", "purge", model, "--confirm", "another")
    assert status == 1
    assert "not_confirmed" in capsys.readouterr().err
    status, printed = cli("admin", "queues", "purge", model, "--confirm", model, "--json")
    assert (status, json.loads(printed)) == (0, {"num_canceled": 3})
    assert {fleet.job(job["id"])["status"] for job in jobs} == {"canceled"}
    assert cli("admin", "queues", "resume")[0] == 0


def test_top_prints_one_screen_where_there_is_no_terminal(fleet, cli):
    def is_shown() -> bool:  # not at once: the loss of Redis took its last beat along
        status, printed = cli("top")
        assert status == 0
        assert "redis up" in printed
        return any(line.startswith("w1") and "ready" in line for line in printed.splitlines())

    wait_for(is_shown, "top shows the worker", fleet)


def test_a_key_without_a_role_is_refused(fleet, capsys):
    environ = {"HEADRACE_API_URL": fleet.api, "HEADRACE_API_KEY": fleet.key}
    assert run(["top", "--once"], environ) == 1
    assert "forbidden" in capsys.readouterr().err


def test_a_silent_tasks_process_is_an_alarm_of_the_gateway(fleet, cli):
    fleet.kill_group("tasks")
    wait_for(lambda: "tasks_silent" in codes_of(state_of(cli)), "the alarm stands", fleet)
    fleet.start("tasks", "tasks")
    wait_for(lambda: codes_of(state_of(cli)) == [], "the alarm is gone", fleet)


def _bearer(fleet: Fleet) -> dict[str, str]:
    engine = database.connect(fleet.postgres.url)
    key = Accounts(engine).create_key(tenant="one", name="viewer", role=Role.VIEWER).secret
    engine.dispose()
    return {"Authorization": f"Bearer {key}"}
