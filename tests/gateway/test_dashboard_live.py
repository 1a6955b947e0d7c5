"""Overview and queues over HTTP, on real stores: figures, pauses, purges, refusals, stores away."""

from __future__ import annotations

import html
import json
import re
import uuid

import pytest

from headrace.contract.accounts import Accounts
from headrace.contract.dead_letters import DeadLetters
from headrace.contract.live import Live
from headrace.contract.orders import WorkerOrders
from headrace.contract.pauses import Pauses
from headrace.contract.roles import Role
from headrace.contract.wire import JobStatus
from headrace.gateway.app import create_app, services_of
from headrace.gateway.dashboard.live_answers import OverviewAnswer, PurgeAnswer, QueuesAnswer
from headrace.gateway.dashboard.sampler import Sampler
from headrace.tests.gateway.conftest import card, client_of
from headrace.tests.gateway.courier import MODEL


@pytest.fixture(scope="module")
def operator_key(services):
    return services.accounts.create_key(tenant="mine", name="operator", role=Role.OPERATOR)


@pytest.fixture
def operator(app, operator_key):
    return client_of(app, operator_key)


@pytest.fixture(autouse=True)
def fresh(services, courier):
    """Begin with an empty Redis, no open job and no pause."""
    services.pauses.resume(model="*", job_class="*", tenant_id="*")
    services.pauses.restore()
    with services.engine.begin() as db:
        db.exec_driver_sql("delete from jobs")


def submit(client, num=1, **body):
    body = {"model": MODEL, "prompt": "p"} | body
    return [client.post("/v1/jobs", json=body).get_json()["id"] for _ in range(num)]


def sampler(services):
    return Sampler(
        accounts=Accounts(services.engine),
        streams=services.streams,
        workers=services.workers,
        live=services.live,
        pauses=Pauses(services.engine, Live(services.redis)),
        orders=WorkerOrders(services.engine),
        letters=DeadLetters(services.engine),
        every_s=0.001,
        oldest_target_s=60,
    )


def queue_of(answer, **wanted):
    rows = [
        row
        for row in answer.get_json()["queues"]
        if all(row[name] == value for name, value in wanted.items())
    ]
    assert len(rows) == 1, rows
    return rows[0]


def test_queues_tell_depth_holders_and_takeovers(client, operator, courier, services):
    submit(client, 3)
    submit(client, 1, **{"class": "batch"})
    courier.take(lease_ms=0)
    held = courier.take(lease_ms=0)  # taken over: the first is the oldest whose lease ran out
    answer = operator.get("/v1/admin/queues")
    assert answer.status_code == 200
    QueuesAnswer.model_validate(answer.get_json())
    row = queue_of(answer, job_class="interactive")
    assert (row["num_queued"], row["num_held"], row["num_takeovers"]) == (2, 1, 1)
    assert row["claimed_by"] == [{"worker": "w1", "num_jobs": 1}]
    assert (row["tenant"], row["model"], row["is_paused"]) == ("mine", MODEL, False)
    assert 0 <= row["oldest_s"] < 60
    assert row["lag"] == 2
    assert queue_of(answer, job_class="batch")["num_queued"] == 1
    services.streams.hand_back(MODEL, held.claim.job, held.attempt)
    row = queue_of(operator.get("/v1/admin/queues"), job_class="interactive")
    assert (row["num_queued"], row["num_held"], row["claimed_by"]) == (3, 0, [])


def test_a_paused_queue_gives_nothing_until_it_is_resumed(client, operator, courier, services):
    (job,) = submit(client)
    body = {"model": MODEL, "job_class": "interactive", "tenant": "mine"}
    paused = operator.post("/v1/admin/queues/pause", json=body)
    assert paused.status_code == 200, paused.get_json()
    row = queue_of(paused)
    assert row["is_paused"]
    assert row["paused_by"].startswith("key_")
    assert paused.get_json()["pauses"][0]["tenant"] == "mine"
    with pytest.raises(ValueError, match="not enough values"):
        courier.take()
    services.redis.flushall()  # a Redis that is lost takes no pause with it
    services.pauses.restore()
    services.enqueuer.put(services.ledger.job(job))
    with pytest.raises(ValueError, match="not enough values"):
        courier.take()
    resumed = operator.post("/v1/admin/queues/resume", json={"model": MODEL})
    assert resumed.get_json()["pauses"] == []
    assert courier.take().claim.job == job


def test_a_narrower_resume_than_the_pause_says_what_holds_it(operator):
    assert operator.post("/v1/admin/queues/pause", json={"model": MODEL}).status_code == 200
    body = {"model": MODEL, "job_class": "batch"}
    refused = operator.post("/v1/admin/queues/resume", json=body)
    assert (refused.status_code, refused.get_json()["code"]) == (409, "not_paused")
    assert len(operator.get("/v1/admin/queues").get_json()["pauses"]) == 1


def test_purge_cancels_what_never_ran_and_tells_its_subscribers(
    client, other_client, operator, courier, services
):
    running, handed_back, *queued = submit(client, 5)
    others = submit(other_client, 2)
    first, second = courier.take(), courier.take()
    assert {first.claim.job, second.claim.job} == {running, handed_back}
    services.ledger.hand_back(second.claim.job, second.attempt)
    services.streams.hand_back(MODEL, second.claim.job, second.attempt)
    body = {"model": MODEL, "tenant": "mine", "confirm": MODEL}
    answer = operator.post("/v1/admin/queues/purge", json=body)
    assert answer.get_json() == {"num_canceled": 3, "has_more": False}
    PurgeAnswer.model_validate(answer.get_json())
    status = {job: services.ledger.job(job)["status"] for job in [running, handed_back, *queued]}
    assert status == {running: "running", handed_back: "queued"} | dict.fromkeys(queued, "canceled")
    assert all(services.ledger.job(job)["status"] == "queued" for job in others)
    for job in queued:
        end = services.token_log.read(MODEL, job).end
        assert end is not None
        assert end.status is JobStatus.CANCELED
    unconfirmed = {row["id"] for row in services.ledger.outbox_jobs(older_than_s=0, limit=9)}
    assert not unconfirmed & set(queued)
    left = {
        row["tenant"]: row["num_queued"]
        for row in operator.get("/v1/admin/queues").get_json()["queues"]
    }
    assert left == {"mine": 1, "another": 2}
    assert operator.post("/v1/admin/queues/purge", json=body).get_json()["num_canceled"] == 0


def test_a_purge_of_many_pages_ends_each_job_once(client, operator, services, monkeypatch):
    monkeypatch.setattr("headrace.gateway.dashboard.queues.PURGE_PAGE", 3)
    jobs = submit(client, 8)
    body = {"model": MODEL, "confirm": MODEL}
    assert operator.post("/v1/admin/queues/purge", json=body).get_json()["num_canceled"] == 8
    assert {services.ledger.job(job)["status"] for job in jobs} == {"canceled"}
    assert services.live.counts([MODEL])[MODEL]["ended:canceled"] == 8


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("purge", {"model": MODEL, "confirm": "Tiny"}, 400, "not_confirmed"),
        ("purge", {"model": MODEL}, 400, "missing_field"),
        ("purge", {"confirm": MODEL}, 400, "missing_field"),
        ("pause", {"model": "nobody's"}, 422, "unknown_model"),
        ("pause", {"model": MODEL, "tenant": "nobody"}, 404, "not_found"),
        ("pause", {"model": MODEL, "job_class": "urgent"}, 400, "out_of_range"),
        ("pause", {"model": ["x"]}, 400, "wrong_type"),
        ("resume", {"queue": "x"}, 400, "unknown_field"),
        ("resume", {"model": "x\x00"}, 400, "invalid_text"),
    ],
)
def test_what_cannot_be_meant_is_refused(operator, path, body, status, code):
    answer = operator.post(f"/v1/admin/queues/{path}", json=body)
    assert (answer.status_code, answer.get_json()["code"]) == (status, code)


def test_actions_are_audited_with_what_they_named(client, operator, operator_key, services):
    submit(client, 1)
    operator.post("/v1/admin/queues/purge", json={"model": MODEL, "confirm": MODEL})
    operator.post("/v1/admin/queues/purge", json={"model": MODEL, "confirm": "no"})
    with services.engine.connect() as db:
        rows = db.exec_driver_sql(
            "select actor, target, outcome, details from audit where action = 'queue.purge'"
            " order by id desc limit 2"
        ).all()
    refused, done = rows
    assert (done.actor, done.target, done.outcome) == (operator_key.id, MODEL, "done")
    assert done.details["num_canceled"] == 1
    assert refused.outcome == "not_confirmed"


def test_the_overview_shows_the_sample_the_alarms_and_the_history(client, operator, services):
    silent = operator.get("/v1/admin/overview").get_json()
    assert silent["sample"] is None
    assert [alarm["code"] for alarm in silent["alarms"]] == ["tasks_silent"]
    submit(client, 2)
    assert sampler(services).sample()
    answer = operator.get("/v1/admin/overview")
    assert answer.status_code == 200
    found = answer.get_json()
    OverviewAnswer.model_validate(found)
    assert (found["redis"], found["postgres"]) == ("up", "up")
    assert found["sample"]["num_queued"] == found["sample"]["models"][MODEL]["num_queued"] == 2
    assert [(alarm["code"], alarm["model"]) for alarm in found["alarms"]] == [("no_worker", MODEL)]
    assert found["history"]["num_queued"] == [2.0]
    assert len(found["history"]["at"]) == 1
    day = operator.get("/v1/admin/overview?span=day").get_json()
    assert day["history"] == {"at": []}
    assert operator.get("/v1/admin/overview?span=week").get_json()["code"] == "out_of_range"


def test_with_its_stores_away_the_overview_says_so(settings, operator_key):
    app = create_app(settings.model_copy(update={"redis_url": _away(settings.redis_url)}))
    with app.app_context():
        answer = client_of(app, operator_key).get("/v1/admin/overview")
    services_of(app).close()
    found = answer.get_json()
    assert answer.status_code == 200
    assert (found["redis"], found["sample"], found["history"]) == ("away", None, {"at": []})
    assert [alarm["code"] for alarm in found["alarms"]] == ["redis_away"]


def _away(url):
    return type(url)("redis://127.0.0.1:1/0")


def test_an_unused_name_never_reaches_a_log(operator, capsys):
    secret = uuid.uuid4().hex
    operator.post("/v1/admin/queues/pause", json={"model": MODEL, "tenant": secret})
    assert secret not in capsys.readouterr().err


# -- pages -----------------------------------------------------------------------------------


def page_of(client, path):
    answer = client.get(path, headers={"Accept": "text/html"})
    assert answer.status_code == 200, answer.get_data(as_text=True)
    assert answer.content_type == "text/html; charset=utf-8"
    return answer.get_data(as_text=True)


def test_the_overview_page_shows_alarms_figures_and_curves(client, operator, services):
    empty = page_of(operator, "/dashboard")
    assert "tasks_silent" in empty
    submit(client, 2)
    assert sampler(services).sample()
    page = page_of(operator, "/dashboard")
    assert "no_worker" in page
    assert f'data-live-row="{MODEL}"' in page
    assert 'data-live="overview.num_queued" data-format="count">2<' in page
    history = html.unescape(re.search(r'data-history="([^"]*)"', page)[1])
    assert json.loads(history)["num_queued"] == [2.0]
    assert 'href="/dashboard?span=hour" aria-current="true"' in page
    assert 'href="/dashboard?span=day" aria-current="true"' in page_of(
        operator, "/dashboard?span=day"
    )


def test_the_queues_page_offers_what_the_role_may(app, client, operator, services):
    submit(client, 1)
    operator.post("/v1/admin/queues/pause", json={"model": MODEL, "job_class": "batch"})
    page = page_of(operator, "/dashboard/queues")
    assert (
        page.count('data-post="/v1/admin/queues/purge"') == 2
    )  # the queue, and the template of those to come
    assert 'data-state="active"' in page
    viewer = services.accounts.create_key(tenant="mine", name="viewer", role=Role.VIEWER)
    seen = page_of(client_of(app, viewer), "/dashboard/queues")
    assert "data-post" not in seen
    assert 'action="/v1/admin' not in seen
    assert MODEL in seen


def test_names_of_tenants_and_models_stay_text(app, operator, services, courier):
    name = "<script>alert(1)</script>'\"&"
    services.accounts.register_model(card(name=name))
    key = services.accounts.create_key(tenant=name, name="x")
    job = client_of(app, key).post("/v1/jobs", json={"model": name, "prompt": "p"})
    assert job.status_code == 202
    assert sampler(services).sample()
    for path in ("/dashboard", "/dashboard/queues"):
        page = page_of(operator, path)
        assert "<script>alert" not in page
        assert html.escape(name, quote=False) in page.replace("&#34;", '"').replace("&#39;", "'")
    bodies = re.findall(r'data-body="([^"]*)"', page_of(operator, "/dashboard/queues"))
    assert name in [json.loads(html.unescape(body))["model"] for body in bodies]
