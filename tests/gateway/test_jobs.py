"""Jobs over HTTP: accepted, shown, listed, canceled."""

import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import text

from headrace.contract.accounts import NewKey
from headrace.contract.ledger import Ledger
from headrace.contract.wire import FinishReason, JobStatus, TokenLogprobs
from headrace.gateway import answers
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL, Courier


def post(client: FlaskClient, headers: dict[str, str] | None = None, **fields: object):
    body = {"model": MODEL, "prompt": "once", **fields}
    return client.post("/v1/jobs", json=body, headers=headers)


def test_a_job_is_accepted_with_its_location_and_defaults(client, courier):
    response = post(client, metadata={"a": "b"}, deadline_s=60)
    assert response.status_code == 202
    job = response.get_json()
    assert response.headers["Location"] == f"/v1/jobs/{job['id']}"
    answers.Job.model_validate(job)
    assert job["status"] == "queued"
    assert job["class"] == "interactive"
    assert job["priority"] == "normal"
    assert job["input"] == {"prompt": "once"}
    assert job["metadata"] == {"a": "b"}
    assert job["deadline_at"].endswith("Z")
    assert job["sampling"]["max_tokens"] == 256
    assert 0 <= job["sampling"]["seed"] < 1 << 63
    assert job["output"] is None
    assert job["usage"] is None
    assert courier.take().claim.job == job["id"]


def test_all_sampling_fields_reach_the_worker(client, courier):
    sampling = {
        "max_tokens": 3,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.1,
        "seed": (1 << 63) - 1,
        "stop": "END",
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.5,
        "logit_bias": {"12": -100, "999": 4.5},
        "logprobs": 20,
    }
    job = post(client, sampling=sampling, **{"class": "batch"}, priority="low").get_json()
    spec = courier.take().spec
    assert spec.job == job["id"]
    assert spec.job_class == "batch"
    assert spec.priority == "low"
    assert spec.sampling.stop == ("END",)
    assert spec.sampling.logit_bias == {12: -100.0, 999: 4.5}
    assert spec.sampling.seed == (1 << 63) - 1
    assert job["sampling"] == sampling | {"stop": ["END"]}


@pytest.mark.parametrize(
    "given",
    [
        {"prompt": "some text"},
        {"prompt_token_ids": [0, 999, 5]},
        {"messages": [{"role": "user", "content": "hi"}]},
    ],
)
def test_each_form_of_prompt_reaches_the_worker_as_sent(client, courier, given):
    job = client.post("/v1/jobs", json={"model": MODEL, **given}).get_json()
    assert job["input"] == given
    spec = courier.take().spec
    assert spec.job == job["id"]
    (name,) = given
    sent = getattr(spec, name)
    assert (sent if isinstance(sent, str) else list(sent)) == given[name]


def test_a_finished_job_shows_output_and_usage(client, courier):
    job = post(client).get_json()
    held = courier.take()
    courier.say(held, 3, logprobs=True)
    logprobs = (TokenLogprobs(-0.5, ((7, -0.5),)),) * 3
    courier.end(held, logprobs=msgspec.to_builtins(logprobs))
    shown = client.get(f"/v1/jobs/{job['id']}").get_json()
    answers.Job.model_validate(shown)
    assert shown["status"] == "succeeded"
    assert shown["finish_reason"] == "stop"
    assert shown["attempt"] == 1
    assert shown["output"]["text"] == held.text
    assert shown["output"]["token_ids"] == held.ids
    assert shown["output"]["logprobs"][0] == {
        "logprob": -0.5,
        "top": [{"token_id": 7, "logprob": -0.5}],
    }
    assert shown["usage"] == {
        "prompt_tokens": 5,
        "cached_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 8,
    }


def test_a_failed_job_shows_its_error(client, courier):
    job = post(client).get_json()
    held = courier.take()
    courier.end(
        held,
        JobStatus.FAILED,
        FinishReason.ERROR,
        error_code="engine_refused",
        error_text="too big",
    )
    shown = client.get(f"/v1/jobs/{job['id']}").get_json()
    assert shown["error"] == {"code": "engine_refused", "detail": "too big"}


def test_invariant_1_accepted_means_durable(client, services, monkeypatch):
    seen: list[str | None] = []

    def look_first(row):
        committed = Ledger(services.engine).job(row["id"])
        seen.append(committed and committed["id"])

    monkeypatch.setattr(type(services.enqueuer), "put", lambda self, row: look_first(row))
    job = post(client).get_json()
    assert seen == [job["id"]]


def test_confirmed_jobs_leave_the_outbox(client, services, courier):
    job = post(client).get_json()
    services.enqueuer.close()  # confirms what it gathered
    with services.engine.connect() as db:
        left = db.execute(
            text("select count(*) from outbox where job_id = :job"), {"job": job["id"]}
        )
        assert left.scalar_one() == 0
    services.enqueuer.__init__(services.ledger, services.streams, services.metrics)
    courier.take()


def test_the_same_idempotency_key_is_the_same_job(client, courier):
    first = post(client, {"Idempotency-Key": "k1"})
    again = client.post(
        "/v1/jobs",
        data=b'{ "prompt": "once",  "model": "tiny" }',
        headers={"Idempotency-Key": "k1", "Content-Type": "application/json; charset=utf-8"},
    )
    assert (first.status_code, again.status_code) == (202, 202)
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.get_json() == first.get_json()
    courier.take()


def test_an_idempotency_key_with_another_body_is_refused(client, courier):
    post(client, {"Idempotency-Key": "k2"})
    response = post(client, {"Idempotency-Key": "k2"}, prompt="twice")
    assert response.status_code == 422
    assert response.get_json()["code"] == "idempotency_mismatch"
    courier.take()


def test_tenants_have_idempotency_keys_of_their_own(client, other_client, courier):
    mine = post(client, {"Idempotency-Key": "k3"}).get_json()
    theirs = post(other_client, {"Idempotency-Key": "k3"}, prompt="other").get_json()
    assert mine["id"] != theirs["id"]
    assert {courier.take().claim.job, courier.take().claim.job} == {mine["id"], theirs["id"]}


def test_concurrent_requests_with_one_key_make_one_job(app: Flask, key: NewKey, courier):
    barrier = threading.Barrier(8)

    def send(_: int):
        client = client_of(app, key)
        barrier.wait(10)
        return post(client, {"Idempotency-Key": "k4"})

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(send, range(8)))
    assert {response.status_code for response in responses} == {202}
    assert len({response.get_json()["id"] for response in responses}) == 1
    assert sum("Idempotent-Replayed" not in response.headers for response in responses) == 1
    courier.take()


def test_prefer_wait_answers_with_the_finished_job(app: Flask, key: NewKey, client, courier):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, client_of(app, key), {"Prefer": "respond-async, wait=999"})
        held = take_when_there(courier)
        courier.say(held, 2)
        courier.end(held)
        response = waiting.result(20)
    assert response.status_code == 200
    assert response.headers["Preference-Applied"] == "wait=20"  # max_wait_s
    assert response.get_json()["output"]["text"] == held.text


def test_prefer_wait_gives_up_in_time(client, courier):
    response = post(client, {"Prefer": "wait=0"})
    assert response.status_code == 202
    assert response.headers["Preference-Applied"] == "wait=0"
    courier.take()


def test_prefer_wait_on_a_replay_of_a_finished_job_answers_at_once(client, courier):
    post(client, {"Idempotency-Key": "k5"})
    courier.end(courier.take())
    response = post(client, {"Idempotency-Key": "k5", "Prefer": "wait=20"})
    assert response.status_code == 200
    assert response.headers["Idempotent-Replayed"] == "true"
    assert response.get_json()["status"] == "succeeded"


def test_jobs_of_others_malformed_and_unknown_ids_are_one_404(client, other_client, courier):
    theirs = post(other_client).get_json()["id"]
    courier.take()
    for job_id in (theirs, "job_" + "0" * 32, "nonsense", "%00", "job_é"):
        for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
            response = client.open(f"/v1/jobs/{job_id}{path}", method=method)
            problem = response.get_json()
            assert (response.status_code, problem["code"]) == (404, "not_found"), (job_id, path)
            wanted = "a name in the path holds a NUL" if job_id == "%00" else "there is no job "
            assert problem["detail"].startswith(wanted)


def test_a_queued_job_is_canceled_at_once(client, services, courier):
    job_id = post(client).get_json()["id"]
    response = client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 200
    assert response.get_json()["status"] == "canceled"
    assert response.get_json()["finish_reason"] == "canceled"
    end = services.token_log.read(MODEL, job_id).end
    assert end is not None
    assert end.status == "canceled"
    claimed = services.streams.claim(
        MODEL, "w", lease_ms=1000, room_tokens=1 << 20, max_jobs=1, is_idle=True
    )
    assert claimed.claims == ()


def test_a_running_job_is_asked_to_end(client, services, courier):
    job_id = post(client).get_json()["id"]
    held = courier.take()
    response = client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 202
    assert response.get_json()["status"] == "running"
    assert services.streams.renew(MODEL, "w1", [(job_id, held.attempt)]) == ["cancel"]
    courier.end(held, JobStatus.CANCELED, FinishReason.CANCELED)


def test_an_ended_job_cannot_be_canceled(client, courier):
    job_id = post(client).get_json()["id"]
    courier.end(courier.take())
    response = client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 409
    assert response.get_json()["code"] == "job_already_ended"


def test_pages_hold_every_job_once_newest_first(app, services):
    client = client_of(app, services.accounts.create_key(tenant="pages", name="test"))
    made = [post(client).get_json()["id"] for _ in range(7)]
    found, cursor = [], None
    while True:
        query = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/jobs", query_string=query).get_json()
        answers.JobList.model_validate(page)
        found += [job["id"] for job in page["data"]]
        assert all("output" not in job for job in page["data"])
        cursor = page["next_cursor"]
        if cursor is None:
            break
        post(client)  # a new job does not shift the pages
    assert found == sorted(made, reverse=True)


def test_lists_are_filtered(app, services):
    client = client_of(app, services.accounts.create_key(tenant="filters", name="test"))
    batch = post(client, **{"class": "batch"}).get_json()["id"]
    canceled = post(client).get_json()["id"]
    client.post(f"/v1/jobs/{canceled}/cancel")

    def ids(query: str) -> list[str]:
        return [job["id"] for job in client.get(f"/v1/jobs?{query}").get_json()["data"]]

    assert ids("class=batch") == [batch]
    assert ids("status=canceled") == [canceled]
    assert ids("status=canceled,queued") == [canceled, batch]
    assert ids(f"model={MODEL}") == [canceled, batch]
    assert ids("model=other") == []


def test_models_say_whether_a_worker_serves_them(client, services):
    from headrace.contract.wire import WorkerBeat

    def ready() -> dict[str, bool]:
        answer = client.get("/v1/models").get_json()
        answers.ModelList.model_validate(answer)
        return {model["id"]: model["ready"] for model in answer["data"]}

    assert ready() == {MODEL: False}
    beat = WorkerBeat(
        worker="w1", model=MODEL, host="h", pid=1, state="ready", started_ms=0, step=0,
        step_age_ms=0, num_running=0, num_waiting=0, free_blocks=1, total_blocks=1,
    )  # fmt: skip
    services.workers.beat(beat, lifetime_ms=60_000)
    assert ready() == {MODEL: True}
    services.workers.leave("w1")
    assert ready() == {MODEL: False}


def take_when_there(courier: Courier):
    """Take the job another thread is posting."""
    import time

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if courier.streams.depths(MODEL):
            return courier.take()
    raise AssertionError("no job came")
