"""Operators' jobs over HTTP: all tenants, search, detail, events, and what each action does."""

from __future__ import annotations

import pytest
from flask.testing import FlaskClient

from headrace.contract.ids import new_id
from headrace.contract.roles import Role
from headrace.contract.timings import Timings
from headrace.contract.wire import FinishReason, JobStatus
from headrace.gateway.dashboard.job_schemas import AdminJob, AdminJobList
from headrace.gateway.upkeep import Upkeep
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.reader import Reader
from headrace.tests.gateway.test_bad_input import check_problem

JOBS = "/v1/admin/jobs"
FAILED = {"status": JobStatus.FAILED, "reason": FinishReason.ERROR}


def client_with(app, services, role: Role) -> FlaskClient:
    return client_of(app, services.accounts.create_key(tenant="ops", name="k", role=role))


@pytest.fixture
def admin(app, services) -> FlaskClient:
    return client_with(app, services, Role.OPERATOR)


@pytest.fixture
def submit(client):
    """Return a function that posts a job as a client and returns its id."""

    def submit(**changes) -> str:
        answer = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x", **changes})
        assert answer.status_code == 202, answer.text
        return answer.get_json()["id"]

    return submit


@pytest.fixture
def failed(submit, courier):
    """Return a function that makes a job which failed with a text."""

    def failed(text: str = "out of memory", **changes) -> str:
        job = submit(**changes)
        courier.end(courier.take(), **FAILED, error_code="engine_refused", error_text=text)
        return job

    return failed


def found(admin, **query) -> list[str]:
    answer = admin.get(JOBS, query_string=query)
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.get_json()["jobs"]]


# -- search ----------------------------------------------------------------------------------


def test_jobs_of_all_tenants_are_found_and_say_whose_they_are(
    admin, submit, client, other_client, courier
):
    mine = submit(metadata={"n": "1"})
    theirs = other_client.post("/v1/jobs", json={"model": MODEL, "prompt": "y"}).get_json()["id"]
    answer = admin.get(JOBS, query_string={"limit": 2}).get_json()
    AdminJobList.model_validate(answer)
    tenants = {job["id"]: job["tenant"] for job in answer["jobs"]}
    assert tenants == {mine: "mine", theirs: "another"}
    assert client.get(JOBS).status_code == 403
    assert mine in found(admin, tenant="mine", meta="n:1", status="queued,running", model=MODEL)
    assert theirs not in found(admin, tenant="mine")


def test_a_job_is_found_by_part_of_its_error(admin, failed):
    needle = f"rank {new_id('x')}"
    job = failed(f"NCCL: {needle} gave up")
    assert found(admin, error=needle.upper()) == [job]
    assert found(admin, error=needle, status="canceled") == []
    assert found(admin, id=job, error="engine_refused: ") == []
    assert found(admin, id=f" {job[:30]} ", error="engine_refused nccl") == [job]


def test_pages_join_by_their_cursor(admin, submit, courier):
    jobs = [submit(metadata={"page": "yes"}) for _ in range(5)]
    first = admin.get(JOBS, query_string={"meta": "page:yes", "limit": 3}).get_json()
    assert [job["id"] for job in first["jobs"]] == jobs[:1:-1]
    query = {"meta": "page:yes", "limit": 3, "cursor": first["next_cursor"]}
    second = admin.get(JOBS, query_string=query).get_json()
    assert [job["id"] for job in second["jobs"]] == jobs[1::-1]
    assert second["next_cursor"] is None


def test_a_range_of_time_and_empty_fields_of_a_form(admin, submit, services):
    job = submit()
    at = services.ledger.job(job)["created_at"]
    hour = at.strftime("%Y-%m-%dT%H:00")  # as a form sends it: no zone
    assert job in found(admin, created_after=hour, tenant="", error="", cursor="", status="")
    assert job not in found(admin, created_before=hour)
    assert job not in found(admin, created_after="2999-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"error": "ab"}, "out_of_range"),
        ({"id": "job_XYZ"}, "out_of_range"),
        ({"id": "' OR 1=1 --"}, "out_of_range"),
        ({"meta": "no-colon"}, "out_of_range"),
        ({"status": "queued,sleeping"}, "out_of_range"),
        ({"job_class": "fast"}, "out_of_range"),
        ({"created_after": "yesterday"}, "out_of_range"),
        ({"limit": "101"}, "out_of_range"),
        ({"limit": "many"}, "wrong_type"),
        ({"tenant": "\0"}, "invalid_text"),
        ({"cursor": "nonsense"}, "invalid_cursor"),
        ({"order": "asc"}, "unknown_field"),
        ({"model": "m" * 201}, "out_of_range"),
    ],
)
def test_bad_queries_are_refused_with_a_reason(admin, query, code):
    check_problem(admin.get(JOBS, query_string=query), 400, code)


# -- detail and events -----------------------------------------------------------------------


def test_a_job_shows_its_attempts_and_where_its_time_went(admin, services, submit, courier):
    job = submit()
    held = courier.take()
    services.ledger.hand_back(job, 1, Timings(2, 5, 9, resumed_at=0, num_tokens=3))
    services.streams.hand_back(MODEL, job, 1)
    held = courier.take()
    courier.say(held, 2)
    courier.end(held)
    shown = admin.get(f"{JOBS}/{job}").get_json()
    AdminJob.model_validate(shown)
    assert [a["outcome"] for a in shown["attempts"]] == ["handed_back", "succeeded"]
    assert shown["attempts"][0]["last_token_ms"] == 9
    assert shown["worker"] == "w1"
    assert shown["tenant"] == "mine"
    assert shown["output"]["text"] == held.text
    row = services.ledger.job(job)
    wall_ms = (row["finished_at"] - row["created_at"]).total_seconds() * 1000
    assert sum(s["duration_ms"] for s in shown["timeline"]) == pytest.approx(wall_ms)


@pytest.mark.parametrize("job", ["job_0", "x", new_id("job"), "job_" + "g" * 32, "%00"])
@pytest.mark.parametrize("what", ["", "/events"])
def test_a_job_that_is_not_there_is_404(admin, job, what):
    check_problem(admin.get(f"{JOBS}/{job}{what}"), 404, "not_found")


@pytest.mark.parametrize("action", ["cancel", "retry", "clone", "priority"])
def test_actions_on_a_job_that_is_not_there_are_404(admin, action):
    body = {"priority": "low"} if action == "priority" else {}
    answer = admin.post(f"{JOBS}/{new_id('job')}/{action}", json=body)
    check_problem(answer, 404, "not_found")


def test_the_events_of_any_tenants_job_can_be_followed(admin, submit, courier):
    job = submit()
    with Reader(admin, job, path=f"{JOBS}/{job}/events") as reader:
        assert reader.next().name == "queued"
        held = courier.take()
        courier.say(held, 3)
        courier.end(held)
        events = reader.rest()
    assert [event.name for event in events] == ["started", "token", "succeeded"]
    assert events[1].data["text"] == held.text


# -- actions ---------------------------------------------------------------------------------


def test_an_operators_cancel_is_the_clients(admin, client, submit, courier, services):
    queued = submit()
    answer = admin.post(f"{JOBS}/{queued}/cancel")
    assert (answer.status_code, answer.get_json()["status"]) == (200, "canceled")
    assert services.streams.depths(MODEL) == []
    with Reader(client, queued) as reader:
        assert reader.rest()[-1].name == "canceled"
    running = submit()
    courier.take()
    answer = admin.post(f"{JOBS}/{running}/cancel")
    assert (answer.status_code, answer.get_json()["status"]) == (202, "running")
    assert services.streams.renew(MODEL, "w1", [(running, 1)]) == ["cancel"]
    check_problem(admin.post(f"{JOBS}/{queued}/cancel"), 409, "job_already_ended")


def test_retry_makes_a_new_job_that_runs(admin, failed, courier, services):
    old = failed(sampling={"seed": 5, "max_tokens": 9}, metadata={"a": "b"})
    answer = admin.post(f"{JOBS}/{old}/retry")
    assert answer.status_code == 202
    new = answer.get_json()
    assert (new["made_from"], new["status"], new["tenant"]) == (old, "queued", "mine")
    assert new["sampling"]["seed"] == 5
    assert courier.take().claim.job == new["id"]
    assert admin.get(f"{JOBS}/{old}").get_json()["retried_as"] == [new["id"]]
    assert services.ledger.job(old)["status"] == "failed"
    check_problem(admin.post(f"{JOBS}/{new['id']}/retry"), 409, "job_not_retryable")


def test_clone_takes_edits_and_is_checked_as_a_posted_job(admin, submit, courier):
    sampling = {"max_tokens": 9, "temperature": 0.5, "stop": ["\n"], "logit_bias": {"7": -1.0}}
    old = submit(sampling=sampling, metadata={"a": "b"}, priority="high")
    edits = {"sampling": {"temperature": 0}, "class": "batch"}
    new = admin.post(f"{JOBS}/{old}/clone", json=edits).get_json()
    assert new["sampling"] == new["sampling"] | sampling | {"temperature": 0}
    assert (new["class"], new["priority"], new["metadata"]) == ("batch", "high", {"a": "b"})
    assert (new["input"], new["made_from"]) == ({"prompt": "x"}, old)
    chat = [{"role": "user", "content": "hi"}]
    again = admin.post(f"{JOBS}/{old}/clone", json={"messages": chat}).get_json()
    assert again["input"] == {"messages": chat}
    assert {courier.take().claim.job for _ in range(3)} == {old, new["id"], again["id"]}


@pytest.mark.parametrize(
    ("edits", "status", "code"),
    [
        ({"sampling": {"temperature": 3}}, 400, "out_of_range"),
        ({"sampling": {"heat": 3}}, 400, "unknown_field"),
        ({"sampling": "hot"}, 400, "wrong_type"),
        ({"prompt": 5}, 400, "wrong_type"),
        ({"prompt": "x", "messages": []}, 400, "out_of_range"),
        ({"tenant": "other"}, 400, "unknown_field"),
        ({"model": "none"}, 422, "unknown_model"),
        ({"prompt_token_ids": [5], "sampling": {"max_tokens": 2000}}, 422, "prompt_too_long"),
    ],
)
def test_bad_edits_make_no_job(admin, submit, services, edits, status, code):
    old = submit()
    check_problem(admin.post(f"{JOBS}/{old}/clone", json=edits), status, code)
    assert services.search.made_of(old) == []


def test_a_queued_job_goes_to_another_lane(admin, submit, courier):
    first, second = submit(), submit()
    answer = admin.post(f"{JOBS}/{second}/priority", json={"priority": "high"})
    assert (answer.status_code, answer.get_json()["priority"]) == (200, "high")
    assert admin.post(f"{JOBS}/{second}/priority", json={"priority": "high"}).status_code == 200
    assert [courier.take().claim.job for _ in range(2)] == [second, first]
    answer = admin.post(f"{JOBS}/{first}/priority", json={"priority": "low"})
    check_problem(answer, 409, "job_not_queued")
    check_problem(admin.post(f"{JOBS}/{first}/priority", json={}), 400, "missing_field")
    answer = admin.post(f"{JOBS}/{first}/priority", json={"priority": "now"})
    check_problem(answer, 400, "out_of_range")


def test_a_job_claimed_before_its_pickup_does_not_move(admin, submit, courier, services):
    job = submit()
    services.streams.claim(
        MODEL, "w1", lease_ms=60_000, room_tokens=1 << 20, max_jobs=1, is_idle=True
    )
    answer = admin.post(f"{JOBS}/{job}/priority", json={"priority": "high"})
    check_problem(answer, 409, "job_not_queued")


@pytest.mark.parametrize("path", ["cancel", "retry", "clone", "priority"])
def test_a_viewer_reads_and_does_nothing(app, services, submit, path):
    viewer, job = client_with(app, services, Role.VIEWER), submit()
    assert viewer.get(f"{JOBS}/{job}").status_code == 200
    check_problem(viewer.post(f"{JOBS}/{job}/{path}", json={}), 403, "forbidden")
    check_problem(viewer.post(f"{JOBS}/bulk", json={}), 403, "forbidden")
    assert services.ledger.job(job)["status"] == "queued"


# -- bulk ------------------------------------------------------------------------------------


@pytest.fixture
def bulk(admin):
    def bulk(action: str, **changes):
        run = changes.pop("run", True)
        body = {"action": action, "filter": changes.pop("filter"), "dry_run": not run, **changes}
        return admin.post(f"{JOBS}/bulk", json=body)

    return bulk


@pytest.fixture
def mark() -> dict[str, str]:
    return {"mark": new_id("m")}


def test_a_bulk_cancel_counts_first_and_leaves_the_rest_alone(
    bulk, submit, courier, services, mark, monkeypatch
):
    monkeypatch.setattr("headrace.gateway.dashboard.job_bulk.BATCH", 2)
    jobs = [submit(metadata=mark) for _ in range(5)]
    other = submit()
    held = courier.take()
    wanted = {"meta": f"mark:{mark['mark']}"}
    dry = bulk("cancel", filter=wanted, run=False).get_json()
    assert dry == {"num_matched": 5, "num_done": 0, "num_refused": 0, "stopped": None}
    assert services.ledger.job(jobs[1])["status"] == "queued"
    done = bulk("cancel", filter=wanted, expect=5).get_json()
    assert done == {"num_matched": 5, "num_done": 5, "num_refused": 0, "stopped": None}
    statuses = [services.ledger.job(job)["status"] for job in jobs]
    assert statuses == ["running"] + ["canceled"] * 4
    assert services.streams.renew(MODEL, "w1", [(held.claim.job, 1)]) == ["cancel"]
    assert services.ledger.job(other)["status"] == "queued"
    assert courier.take().claim.job == other  # nothing else is left in the lanes
    entry = services.audit.page(limit=1, action="job.bulk")[0]
    assert entry["outcome"] == "done"
    assert entry["details"]["filter"] == wanted
    assert entry["details"]["num_done"] == 5


def test_a_bulk_retry_makes_each_job_anew_once(bulk, failed, services, courier, mark):
    old = {failed(metadata=mark) for _ in range(3)}
    wanted = {"meta": f"mark:{mark['mark']}", "status": "failed,succeeded"}
    assert bulk("retry", filter=wanted, expect=3).get_json()["num_done"] == 3
    assert bulk("retry", filter=wanted, run=False).get_json()["num_matched"] == 0
    Upkeep(
        ledger=services.ledger,
        operators=services.operators,
        streams=services.streams,
        tokens=services.token_log,
        workers=services.workers,
        pauses=services.pauses,
        lease_s=30,
        retention_days=1,
    ).relay(older_than_s=0)
    new = [courier.take().claim.job for _ in range(3)]
    assert {services.ledger.job(job)["made_from"] for job in new} == old


def test_a_bulk_change_of_priority_moves_what_waits(bulk, submit, courier, mark):
    first = submit()
    jobs = [submit(metadata=mark) for _ in range(3)]
    wanted = {"meta": f"mark:{mark['mark']}"}
    assert bulk("priority", filter=wanted, priority="high", expect=3).status_code == 200
    assert [courier.take().claim.job for _ in range(4)] == [*jobs, first]
    assert bulk("priority", filter=wanted, priority="low", run=False).get_json() == {
        "num_matched": 0, "num_done": 0, "num_refused": 0, "stopped": None,
    }  # fmt: skip


def test_a_count_that_is_off_by_more_than_a_hundredth_is_refused(bulk, submit, services, mark):
    job = submit(metadata=mark)
    wanted = {"meta": f"mark:{mark['mark']}"}
    for expect in (0, 2):
        check_problem(bulk("cancel", filter=wanted, expect=expect), 409, "bulk_changed")
    assert services.ledger.job(job)["status"] == "queued"
    assert bulk("cancel", filter=wanted, expect=1).get_json()["num_done"] == 1


def test_a_bulk_of_too_many_jobs_is_refused(bulk, submit, mark, monkeypatch):
    monkeypatch.setattr("headrace.gateway.dashboard.job_bulk.MAX_JOBS", 1)
    for _ in range(2):
        submit(metadata=mark)
    wanted = {"meta": f"mark:{mark['mark']}"}
    check_problem(bulk("cancel", filter=wanted, run=False), 422, "bulk_too_large")


def test_a_job_that_is_locked_is_tried_again_and_then_counted(bulk, submit, services, mark):
    locked, free = submit(metadata=mark), submit(metadata=mark)
    wanted = {"meta": f"mark:{mark['mark']}"}
    with services.engine.begin() as db:
        db.exec_driver_sql("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", (locked,))
        result = bulk("cancel", filter=wanted, expect=2).get_json()
    assert (result["num_done"], result["num_refused"]) == (1, 1)
    assert services.ledger.job(free)["status"] == "canceled"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_field"),
        ({"action": "cancel"}, "missing_field"),
        ({"action": "cancel", "filter": {}, "dry_run": True}, "missing_field"),
        ({"action": "cancel", "filter": {"tenant": ""}, "dry_run": True}, "missing_field"),
        ({"action": "cancel", "filter": {"model": MODEL}}, "missing_field"),
        ({"action": "priority", "filter": {"model": MODEL}, "dry_run": True}, "missing_field"),
        ({"action": "drop", "filter": {"model": MODEL}}, "out_of_range"),
        ({"action": "cancel", "filter": {"x": 1}, "dry_run": True}, "unknown_field"),
        ({"action": "cancel", "filter": "all", "dry_run": True}, "wrong_type"),
        ({"action": "cancel", "filter": {"model": MODEL}, "dry_run": "no"}, "wrong_type"),
        ({"action": "cancel", "filter": {"model": MODEL}, "expect": -1}, "out_of_range"),
        ({"action": "cancel", "filter": {"model": "\0"}, "dry_run": True}, "invalid_text"),
    ],
)
def test_bad_bulks_are_refused(admin, body, code):
    check_problem(admin.post(f"{JOBS}/bulk", json=body), 400, code)
