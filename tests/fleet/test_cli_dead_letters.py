"""`headrace admin dead-letters` against a real gateway, tasks, Postgres and Valkey; no worker."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from headrace.contract.database import connect
from headrace.contract.ids import new_id
from headrace.tests.contract.burial import bury
from headrace.tests.fleet.fleet_parts import Fleet, wait_for
from headrace.tests.fleet.nobodys import MODEL, Cli, admin_cli, nobodys_fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with nobodys_fleet(tmp_path_factory.mktemp("dead-letters")) as made:
        made.start("tasks", "tasks")
        made.start("more-tasks", "tasks")
        yield made


@pytest.fixture(scope="module")
def engine(fleet) -> Iterator[Engine]:
    engine = connect(fleet.postgres.url)
    yield engine
    engine.dispose()


@pytest.fixture
def dead(fleet, engine):
    """Return a function that makes a dead letter and returns its job's id."""

    def make(signature: str, detail: str = "a trace") -> str:
        return bury(engine, fleet.submit(prompt="x")["id"], signature, detail)

    return make


@pytest.fixture
def cli(fleet, capfd) -> Cli:
    return admin_cli(fleet, capfd, "dead-letters")


def as_json(cli: Cli, *arguments: str) -> dict:
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_groups_lists_and_one_are_printed_as_tables_or_json(cli, dead):
    signature = new_id("sig")
    job = dead(signature, "a trace \x1b[31m of it")
    code, out, _ = cli("groups", "--signature", signature)
    assert code == 0
    assert signature in out
    (group,) = as_json(cli, "groups", "--signature", signature)["groups"]
    assert (group["num_letters"], group["models"], group["tenants"]) == (1, [MODEL], ["ops"])
    code, out, _ = cli("list", "--model", MODEL, "--tenant", "ops", "--no-replayed")
    assert code == 0
    assert job in out
    assert as_json(cli, "list", "--signature", signature, "--replayed")["dead_letters"] == []
    code, out, _ = cli("show", job)
    assert code == 0
    assert "a trace" in out
    assert "\x1b[31m" not in out, "nothing drives the terminal"
    assert as_json(cli, "show", job)["num_runs"] == 2


def test_pages_are_joined_up_to_the_limit(cli, dead):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(3)]
    found = as_json(cli, "list", "--signature", signature, "--limit", "2")
    assert [one["job_id"] for one in found["dead_letters"]] == jobs[:0:-1]
    rest = as_json(cli, "list", "--signature", signature, "--cursor", found["next_cursor"])
    assert [one["job_id"] for one in rest["dead_letters"]] == jobs[:1]


def test_one_is_replayed_once_and_again_when_asked(cli, dead):
    job = dead(new_id("sig"))
    assert as_json(cli, "replay", job)["made_from"] == job
    code, _, err = cli("replay", job)
    assert code == 1
    assert "letter_replayed" in err
    assert as_json(cli, "replay", job, "--again")["made_from"] == job


def test_many_are_counted_and_with_the_count_worked_off_by_the_tasks(fleet, cli, dead, engine):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(20)]
    wanted = ("replay", "--signature", signature, "--rate", "6000")
    code, _, err = cli(*wanted)
    assert code == 0
    assert "20 letters match: repeat with --expect 20" in err
    replay = as_json(cli, *wanted, "--expect", "20")["replay"]["id"]

    def shown() -> dict:
        (one,) = [r for r in as_json(cli, "replays")["replays"] if r["id"] == replay]
        return one

    wait_for(lambda: shown()["state"] == "done", "the replay is done", fleet)
    assert (shown()["num_done"], shown()["num_refused"]) == (20, 0)
    with engine.connect() as db:
        made = db.exec_driver_sql(
            "select made_from, id from jobs where made_from = any(%s)", (jobs,)
        ).all()
    assert sorted(old for old, _ in made) == sorted(jobs), "each once, by two tasks processes"
    left = "select count(*) from outbox where job_id = any(%s)"
    names = [new for _, new in made]

    def is_enqueued() -> bool:
        with engine.connect() as db:
            return db.exec_driver_sql(left, (names,)).scalar_one() == 0

    wait_for(is_enqueued, "the relay has enqueued the new jobs", fleet)
    assert {fleet.job(new)["status"] for new in names} == {"queued"}


def test_tasks_that_are_killed_in_the_middle_of_a_replay_make_each_job_once(
    fleet, cli, dead, engine
):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(30)]
    asked = ("replay", "--signature", signature, "--rate", "600", "--expect", "30")
    replay = as_json(cli, *asked)["replay"]["id"]

    def shown() -> dict:
        (one,) = [r for r in as_json(cli, "replays")["replays"] if r["id"] == replay]
        return one

    wait_for(lambda: shown()["num_done"] > 0, "the replay makes progress", fleet)
    for name in ("tasks", "more-tasks"):
        fleet.kill_group(name)
    fleet.start("tasks", "tasks")
    fleet.start("more-tasks", "tasks")
    wait_for(lambda: shown()["state"] == "done", "the replay is done", fleet)
    assert (shown()["num_done"], shown()["num_refused"]) == (30, 0)
    with engine.connect() as db:
        query = "select made_from from jobs where made_from = any(%s)"
        assert sorted(db.exec_driver_sql(query, (jobs,)).scalars()) == sorted(jobs)


def test_a_selection_is_replayed_and_stopped(cli, dead):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(3)]
    replay = as_json(cli, "replay", *jobs, "--rate", "1", "--expect", "3")["replay"]
    code, out, _ = cli("replays")
    assert code == 0
    assert replay["id"] in out
    code, _, err = cli("stop", replay["id"])
    assert code == 0
    assert " of 3" in err
    code, _, err = cli("stop", replay["id"])
    assert code == 1
    assert "replay_ended" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "../../healthz"), "is no id of a job"),
        (("show", "job_none"), "not_found"),
        (("stop", "rpl_none"), "not_found"),
        (("stop", "a/b"), "is no id of a replay"),
        (("replay", "job_none"), "not_found"),
        (("replay",), "missing_field"),
        (("replay", "--all", "--rate", "9999"), "out_of_range"),
        (("replay", "--signature", "x", "--again"), "it is for one job"),
        (("list", "--created-after", "soon"), "out_of_range"),
    ],
)
def test_what_cannot_be_is_said_on_stderr(cli, arguments, said):
    code, out, err = cli(*arguments)
    assert (code, out) == (1, "")
    assert said in err


def test_a_viewer_may_look_and_not_replay(fleet, cli, dead):
    job = dead(new_id("sig"))
    assert cli("show", job, key=fleet.other_key)[0] == 0
    code, _, err = cli("replay", job, key=fleet.other_key)
    assert code == 1
    assert "forbidden" in err
