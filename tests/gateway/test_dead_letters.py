"""Dead letters over HTTP: groups, search, replay of one and of many, roles, audit, bad input."""

from __future__ import annotations

import pytest
from flask.testing import FlaskClient

from headrace.contract.audit import Audit
from headrace.contract.ids import new_id
from headrace.contract.replays import Replays
from headrace.contract.roles import Role
from headrace.gateway.dashboard.dead_letter_schemas import (
    DeadLetter,
    DeadLetterGroups,
    DeadLetterList,
    Replay,
    ReplayList,
    ReplayStarted,
)
from headrace.gateway.dashboard.job_schemas import AdminJob
from headrace.tests.contract.burial import bury
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.test_bad_input import check_problem

LETTERS, REPLAYS = "/v1/admin/dead-letters", "/v1/admin/replays"


@pytest.fixture(scope="module")
def operator(app, services) -> FlaskClient:
    key = services.accounts.create_key(tenant="ops", name="o", role=Role.OPERATOR)
    return client_of(app, key)


@pytest.fixture(scope="module")
def viewer(app, services) -> FlaskClient:
    return client_of(app, services.accounts.create_key(tenant="ops", name="v", role=Role.VIEWER))


@pytest.fixture
def dead(client, services):
    """Return a function that makes a dead letter of a posted job and returns the job's id."""

    def make(signature: str, detail: str = "a trace", by: FlaskClient = client, **body) -> str:
        answer = by.post("/v1/jobs", json={"model": MODEL, "prompt": "x", **body})
        return bury(services.engine, answer.get_json()["id"], signature, detail)

    return make


def start(operator, **body):
    """Count, then begin a replay with that count; return the answer to the second."""
    counted = operator.post(REPLAYS, json=body | {"dry_run": True})
    assert counted.status_code == 200, counted.text
    ReplayStarted.model_validate(counted.get_json())
    num = counted.get_json()["num_matched"]
    return operator.post(REPLAYS, json=body | {"expect": num})


# -- reading ---------------------------------------------------------------------------------


def test_letters_of_all_tenants_are_listed_and_grouped(viewer, dead, other_client):
    signature = new_id("sig")
    mine, theirs = dead(signature, "first"), dead(signature, "second", by=other_client)
    answer = viewer.get(LETTERS, query_string={"signature": signature}).get_json()
    DeadLetterList.model_validate(answer)
    shown = {one["job_id"]: one for one in answer["dead_letters"]}
    assert {job: one["tenant"] for job, one in shown.items()} == {mine: "mine", theirs: "another"}
    assert shown[mine]["detail"] == "first"
    assert shown[mine]["num_runs"] == 2
    assert shown[mine]["replayed_at"] is None
    groups = viewer.get(f"{LETTERS}/groups", query_string={"signature": signature}).get_json()
    DeadLetterGroups.model_validate(groups)
    (group,) = groups["groups"]
    assert (group["num_letters"], group["num_unreplayed"], groups["num_groups"]) == (2, 2, 1)
    assert group["tenants"] == ["another", "mine"]
    one = viewer.get(f"{LETTERS}/{mine}").get_json()
    DeadLetter.model_validate(one)
    assert one == shown[mine]


def test_pages_of_letters_join_by_their_cursor(viewer, dead):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(3)]
    query = {"signature": signature, "limit": 2}
    first = viewer.get(LETTERS, query_string=query).get_json()
    query |= {"cursor": first["next_cursor"]}
    second = viewer.get(LETTERS, query_string=query).get_json()
    found = [one["job_id"] for page in (first, second) for one in page["dead_letters"]]
    assert found == jobs[::-1]
    assert second["next_cursor"] is None


def test_empty_fields_of_a_form_are_no_filter(viewer, dead):
    signature = new_id("sig")
    job = dead(signature)
    query = {"signature": signature, "model": "", "replayed": "", "created_after": ""}
    (one,) = viewer.get(LETTERS, query_string=query).get_json()["dead_letters"]
    assert one["job_id"] == job
    for name, value in (("replayed", "true"), ("created_after", "2999-01-01T00:00"),
                        ("tenant", "another"), ("model", "other")):  # fmt: skip
        found = viewer.get(LETTERS, query_string={"signature": signature, name: value})
        assert found.get_json()["dead_letters"] == [], name


def test_the_job_leads_to_its_letter(viewer, dead, client):
    signature = new_id("sig")
    job = viewer.get(f"/v1/admin/jobs/{dead(signature)}").get_json()
    AdminJob.model_validate(job)
    assert (job["dead_letter"]["signature"], job["dead_letter"]["num_runs"]) == (signature, 2)
    assert [one["signature"] for one in job["attempts"]] == [signature] * 2
    other = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).get_json()["id"]
    assert viewer.get(f"/v1/admin/jobs/{other}").get_json()["dead_letter"] is None


def test_a_tenant_reads_what_to_do_and_nothing_of_what_it_died_of(client, dead):
    signature = f"IndexError model.py:forward {new_id('x')}"
    job = dead(signature, "File /srv/engine/model.py")
    answer = client.get(f"/v1/jobs/{job}")
    assert answer.get_json()["error"]["code"] == "poison"
    assert "ask the operator" in answer.get_json()["error"]["detail"]
    events = client.get(f"/v1/jobs/{job}/events").text
    for text in (answer.text, events, client.get("/v1/jobs").text):
        assert "model.py" not in text
        assert "IndexError" not in text


# -- one -------------------------------------------------------------------------------------


def test_a_letter_is_replayed_at_once_and_once(operator, services, dead, courier):
    job = dead(new_id("sig"), metadata={"a": "b"}, sampling={"max_tokens": 7})
    services.redis.flushall()  # its own entry, which burial left
    answer = operator.post(f"{LETTERS}/{job}/replay", json={})
    assert answer.status_code == 202, answer.text
    made = answer.get_json()
    AdminJob.model_validate(made)
    assert (made["made_from"], made["tenant"], made["metadata"]) == (job, "mine", {"a": "b"})
    assert made["sampling"]["max_tokens"] == 7
    held = courier.take()
    assert held.claim.job == made["id"], "it was enqueued at once"
    courier.end(held)
    letter = operator.get(f"{LETTERS}/{job}").get_json()
    assert (letter["replayed_as"], letter["replayed_status"]) == (made["id"], "succeeded")
    check_problem(operator.post(f"{LETTERS}/{job}/replay", json={}), 409, "letter_replayed")
    again = operator.post(f"{LETTERS}/{job}/replay", json={"again": True}).get_json()
    assert again["id"] != made["id"]
    (row, *_) = Audit(services.engine).page(limit=1)
    assert (row["action"], row["target"], row["outcome"]) == ("dead_letter.replay", job, "done")
    assert row["details"] == {"made": again["id"], "again": True}


# -- many ------------------------------------------------------------------------------------


def test_a_replay_of_a_signature_is_counted_begun_worked_off_and_told(
    operator, viewer, services, dead
):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(3)]
    body = {"filter": {"signature": signature}, "rate_per_min": 6000}
    answer = start(operator, **body)
    assert answer.status_code == 202, answer.text
    ReplayStarted.model_validate(answer.get_json())
    replay = answer.get_json()["replay"]
    assert (replay["state"], replay["num_matched"], replay["filter"]) == (
        "running", 3, {"signature": signature},
    )  # fmt: skip
    todo = Replays(services.engine)
    for _ in range(10_000):
        if todo.step(replay["id"]).is_ended:
            break
    shown = viewer.get(f"{REPLAYS}/{replay['id']}").get_json()
    Replay.model_validate(shown)
    assert (shown["state"], shown["num_done"], shown["left_s"]) == ("done", 3, None)
    replayed = {"signature": signature, "replayed": "true"}
    found = viewer.get(LETTERS, query_string=replayed).get_json()["dead_letters"]
    assert {one["job_id"] for one in found} == set(jobs)
    listed = viewer.get(REPLAYS, query_string={"limit": 1}).get_json()
    ReplayList.model_validate(listed)
    assert listed["replays"] == [shown]
    nothing = operator.post(REPLAYS, json=body | {"expect": 0})
    check_problem(nothing, 404, "not_found")


def test_a_selection_is_replayed_and_stopped(operator, services, dead):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(3)]
    body = {"filter": {"job_ids": [*jobs[:2], jobs[0]]}, "rate_per_min": 1}
    replay = start(operator, **body).get_json()["replay"]
    assert replay["num_matched"] == 2
    assert 60 < replay["left_s"] <= 120
    assert Replays(services.engine).step(replay["id"]).num_made == 1
    stopped = operator.post(f"{REPLAYS}/{replay['id']}/stop").get_json()
    assert (stopped["state"], stopped["num_done"], stopped["num_refused"]) == ("stopped", 1, 0)
    assert stopped["stopped_by"]
    check_problem(operator.post(f"{REPLAYS}/{replay['id']}/stop"), 409, "replay_ended")
    rows = Audit(services.engine).page(limit=4)
    assert [row["action"] for row in rows] == ["replay.stop"] * 2 + ["replay.start"] * 2
    begun = rows[2]
    assert begun["target"] == replay["id"]
    assert begun["details"]["filter"] == {"num_selected": 2 + 1}


def test_all_letters_are_replayed_only_when_it_is_said(operator, dead, services):
    dead(new_id("sig"))
    body = {"filter": {}, "rate_per_min": 60, "dry_run": True}
    check_problem(operator.post(REPLAYS, json=body), 400, "missing_field")
    counted = operator.post(REPLAYS, json=body | {"all": True})
    assert counted.get_json()["num_matched"] >= 1


def test_the_count_must_be_known_and_still_be_right(operator, dead):
    signature = new_id("sig")
    dead(signature)
    body = {"filter": {"signature": signature}, "rate_per_min": 60}
    check_problem(operator.post(REPLAYS, json=body), 400, "missing_field")
    check_problem(operator.post(REPLAYS, json=body | {"expect": 2}), 409, "bulk_changed")
    first = operator.post(REPLAYS, json=body | {"expect": 1})
    assert first.status_code == 202
    again = operator.post(REPLAYS, json=body | {"expect": 1})
    check_problem(again, 409, "replay_under_way")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"filter": {"signature": "x"}, "expect": 1}, 400, "missing_field"),
        ({"filter": {"signature": "x"}, "rate_per_min": 0}, 400, "out_of_range"),
        ({"filter": {"signature": "x"}, "rate_per_min": 6001}, 400, "out_of_range"),
        ({"filter": {"signature": "x"}, "rate_per_min": "60"}, 400, "wrong_type"),
        ({"filter": {"signature": "x"}, "rate_per_min": 1.5}, 400, "wrong_type"),
        ({"filter": {"signature": "x" * 201}, "rate_per_min": 1}, 400, "out_of_range"),
        ({"filter": {"signature": "\0"}, "rate_per_min": 1}, 400, "invalid_text"),
        ({"filter": {"signature": "x", "replayed": True}}, 400, "out_of_range"),
        ({"filter": {"job_ids": []}, "rate_per_min": 1}, 400, "out_of_range"),
        ({"filter": {"job_ids": ["job_1"]}, "rate_per_min": 1}, 400, "out_of_range"),
        ({"filter": {"job_ids": ["job_" + "0" * 32] * 501}}, 400, "out_of_range"),
        ({"filter": {"id": "x"}, "rate_per_min": 1}, 400, "unknown_field"),
        ({"filter": [], "rate_per_min": 1}, 400, "wrong_type"),
        ({"filter": {}, "all": "yes"}, 400, "wrong_type"),
        ({"filter": {"created_after": "soon"}, "rate_per_min": 1}, 400, "out_of_range"),
    ],
)
def test_bad_orders_are_refused_with_a_reason(operator, body, status, code):
    check_problem(operator.post(REPLAYS, json=body), status, code)


@pytest.mark.parametrize(
    ("path", "query", "code"),
    [
        (LETTERS, {"limit": "101"}, "out_of_range"),
        (LETTERS, {"limit": "many"}, "wrong_type"),
        (LETTERS, {"cursor": "nonsense"}, "invalid_cursor"),
        (LETTERS, {"replayed": "maybe"}, "out_of_range"),
        (LETTERS, {"signature": "s" * 201}, "out_of_range"),
        (LETTERS, {"order": "asc"}, "unknown_field"),
        (LETTERS, {"tenant": "\0"}, "invalid_text"),
        (f"{LETTERS}/groups", {"limit": "501"}, "out_of_range"),
        (f"{LETTERS}/groups", {"cursor": "x"}, "unknown_field"),
        (REPLAYS, {"cursor": "rpl_1"}, "invalid_cursor"),
        (REPLAYS, {"limit": "0"}, "out_of_range"),
    ],
)
def test_bad_queries_are_refused_with_a_reason(viewer, path, query, code):
    check_problem(viewer.get(path, query_string=query), 400, code)


def test_what_is_not_there_is_not_found(operator):
    for path in (f"{LETTERS}/job_none", f"{LETTERS}/job_{'0' * 32}", f"{REPLAYS}/rpl_none"):
        check_problem(operator.get(path), 404, "not_found")
    for path in (f"{LETTERS}/job_none/replay", f"{LETTERS}/job_{'0' * 32}/replay",
                 f"{REPLAYS}/rpl_none/stop"):  # fmt: skip
        check_problem(operator.post(path, json={}), 404, "not_found")


def test_a_viewer_may_look_and_a_tenant_may_not(viewer, client, dead):
    job = dead(new_id("sig"))
    for path in (LETTERS, f"{LETTERS}/groups", f"{LETTERS}/{job}", REPLAYS):
        assert viewer.get(path).status_code == 200
        check_problem(client.get(path), 403, "forbidden")
    for path in (f"{LETTERS}/{job}/replay", REPLAYS, f"{REPLAYS}/rpl_none/stop"):
        check_problem(viewer.post(path, json={}), 403, "forbidden")
        check_problem(client.post(path, json={}), 403, "forbidden")
