"""`headrace admin jobs` against a real gateway, Postgres and Valkey; nobody runs the jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from headrace.tests.fleet.fleet_parts import Fleet
from headrace.tests.fleet.nobodys import Cli, admin_cli, nobodys_fleet


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with nobodys_fleet(tmp_path_factory.mktemp("admin-jobs")) as made:
        yield made


@pytest.fixture
def cli(fleet, capfd) -> Cli:
    return admin_cli(fleet, capfd, "jobs")


def submit(fleet: Fleet, **body) -> str:
    return fleet.submit(prompt="x", **body)["id"]


def as_json(cli: Cli, *arguments: str) -> dict:
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_search_prints_a_table_or_json(fleet, cli):
    job = submit(fleet, metadata={"kind": "search"})
    code, out, _ = cli("search", "--meta", "kind:search", "--tenant", "ops", "--status", "queued")
    assert code == 0
    assert job in out
    found = as_json(cli, "search", "--id", job)
    assert [one["id"] for one in found["jobs"]] == [job]
    assert as_json(cli, "search", "--error", "nothing like it")["jobs"] == []


def test_pages_are_joined_up_to_the_limit(fleet, cli):
    jobs = [submit(fleet, metadata={"kind": "pages"}) for _ in range(3)]
    found = as_json(cli, "search", "--meta", "kind:pages", "--limit", "2")
    assert [one["id"] for one in found["jobs"]] == jobs[:0:-1]
    rest = as_json(cli, "search", "--meta", "kind:pages", "--cursor", found["next_cursor"])
    assert [one["id"] for one in rest["jobs"]] == jobs[:1]


def test_a_job_is_shown_moved_canceled_retried_and_cloned(fleet, cli):
    job = submit(fleet)
    code, out, _ = cli("show", job)
    assert code == 0
    assert "queue" in out
    assert as_json(cli, "priority", job, "high")["priority"] == "high"
    assert as_json(cli, "cancel", job)["status"] == "canceled"
    assert as_json(cli, "retry", job)["made_from"] == job
    clone = as_json(cli, "clone", job, "--temperature", "0", "--prompt", "y", "--class", "batch")
    assert (clone["sampling"]["temperature"], clone["input"]) == (0, {"prompt": "y"})
    code, _, err = cli("cancel", job)
    assert code == 1
    assert "job_already_ended" in err


def test_a_bulk_counts_and_with_the_count_acts(fleet, cli):
    jobs = [submit(fleet, metadata={"kind": "bulk"}) for _ in range(2)]
    wanted = ("--meta", "kind:bulk")
    code, _, err = cli("bulk", "cancel", *wanted)
    assert code == 0
    assert "2 jobs match: repeat with --expect 2" in err
    assert fleet.job(jobs[0])["status"] == "queued"
    assert (
        as_json(cli, "bulk", "priority", *wanted, "--to", "low", "--expect", "2")["num_done"] == 2
    )
    assert as_json(cli, "bulk", "cancel", *wanted, "--expect", "2")["num_done"] == 2
    code, _, err = cli("bulk", "cancel", *wanted, "--expect", "2")
    assert code == 1
    assert "bulk_changed" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("show", "../../healthz"), "is no job id"),
        (("show", "job_none"), "not_found"),
        (("bulk", "cancel"), "missing_field"),
        (("search", "--error", "ab"), "out_of_range"),
    ],
)
def test_what_cannot_be_is_said_on_stderr(cli, arguments, said):
    code, out, err = cli(*arguments)
    assert (code, out) == (1, "")
    assert said in err


def test_a_viewer_may_look_and_not_act(fleet, cli):
    job = submit(fleet)
    assert cli("show", job, key=fleet.other_key)[0] == 0
    code, _, err = cli("cancel", job, key=fleet.other_key)
    assert code == 1
    assert "forbidden" in err
