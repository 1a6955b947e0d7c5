"""Postgres or Redis away: what still works, and what is said of the rest."""

import time
from collections.abc import Iterator

import pytest
from flask import Flask

from headrace.contract.settings import GatewaySettings
from headrace.gateway import outbox
from headrace.gateway.app import create_app, services_of
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.reader import Reader, tokens_of
from headrace.tests.gateway.test_bad_input import check_problem

#: Port 1 of loopback: nothing listens there, so a connection is refused at once.
AWAY_REDIS = "redis://127.0.0.1:1/0"
AWAY_POSTGRES = "postgresql+psycopg://postgres:x@127.0.0.1:1/headrace"


def app_of(settings: GatewaySettings, **changes: object) -> Flask:
    return create_app(GatewaySettings.model_validate(dict(settings) | changes))


@pytest.fixture
def no_redis(app: Flask, settings: GatewaySettings) -> Iterator[Flask]:
    """An app whose Redis is away; models and keys are those of `app`."""
    made = app_of(settings, redis_url=AWAY_REDIS)
    yield made
    services_of(made).close()


@pytest.fixture
def no_postgres(settings: GatewaySettings) -> Iterator[Flask]:
    made = app_of(settings, database_url=AWAY_POSTGRES)
    yield made
    services_of(made).close()


def test_invariant_2_a_job_is_accepted_without_redis(no_redis, key, services, courier):
    client = client_of(no_redis, key)
    job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"})
    assert job.status_code == 202
    rows = services.ledger.outbox_jobs(older_than_s=0, limit=1000)
    assert job.get_json()["id"] in {row["id"] for row in rows}  # the relay will enqueue it
    assert services.streams.depths(MODEL) == []


def test_only_one_post_a_second_waits_for_a_redis_that_is_away(no_redis, key, monkeypatch):
    asked = []
    enqueue = type(services_of(no_redis).streams).enqueue
    monkeypatch.setattr(
        type(services_of(no_redis).streams),
        "enqueue",
        lambda *args: (asked.append(1), enqueue(*args)),
    )
    client = client_of(no_redis, key)
    for _ in range(5):
        assert client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).status_code == 202
    assert len(asked) == 1
    now = time.monotonic()
    monkeypatch.setattr(outbox.time, "monotonic", lambda: now + outbox.RETRY_S + 1)
    client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"})
    assert len(asked) == 2


def test_without_redis_it_is_degraded_and_ready(no_redis, key):
    client = client_of(no_redis, key)
    response = client.get("/readyz")
    assert response.status_code == 200
    away = {"status": "degraded", "postgres": "up", "redis": "away", "workers": None}
    assert response.get_json() == away
    assert [m["ready"] for m in client.get("/v1/models").get_json()["data"]] == [False]


def test_without_redis_cancel_is_kept_in_postgres(no_redis, key, services, courier):
    client = client_of(no_redis, key)
    job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).get_json()["id"]
    services.ledger.pick_up([job], "w1")
    assert client.post(f"/v1/jobs/{job}/cancel").status_code == 202
    row = services.ledger.job(job)
    assert row["cancel_requested_at"] is not None


def test_without_redis_a_stream_stays_and_finds_the_end_in_postgres(
    no_redis, app, key, services, courier
):
    client_of(app, key).post("/v1/jobs", json={"model": MODEL, "prompt": "x"})
    held = courier.take()
    courier.say(held, 3)
    with Reader(client_of(no_redis, key), held.claim.job) as reader:
        assert reader.next().name == "started"
        reader.wait_for_ping()
        courier.end(held)
        events = reader.rest()
    assert tokens_of(events) == (held.ids, held.text)


def test_without_redis_a_wait_ends_with_the_row(no_redis, key, services, monkeypatch):
    monkeypatch.setattr("headrace.gateway.wait.CHECK_S", 0.05)
    cancel = type(services_of(no_redis).enqueuer).put

    def put_and_cancel(self, row):
        cancel(self, row)
        services.ledger.request_cancel(row["id"], tenant_id=row["tenant_id"])

    monkeypatch.setattr(type(services_of(no_redis).enqueuer), "put", put_and_cancel)
    response = client_of(no_redis, key).post(
        "/v1/jobs", json={"model": MODEL, "prompt": "x"}, headers={"Prefer": "wait=15"}
    )
    assert response.status_code == 200
    assert response.get_json()["status"] == "canceled"


def test_without_postgres_nothing_is_accepted(no_postgres, key):
    client = client_of(no_postgres, key)
    for method, path in (("POST", "/v1/jobs"), ("GET", "/v1/jobs"), ("GET", "/v1/models")):
        response = client.open(path, method=method, json={"model": MODEL, "prompt": "x"})
        problem = check_problem(response, 503, "database_unavailable")
        assert problem["retryable"] is True
        assert int(response.headers["Retry-After"]) >= 1
        assert "postgres:x" not in problem["detail"]


def test_without_postgres_a_known_key_gets_503_and_no_job(no_postgres, app, key, services):
    guard, cards = services_of(no_postgres).keys, services_of(no_postgres).cards
    guard._accounts = cards._accounts = services.accounts  # keys and cards are still remembered
    response = client_of(no_postgres, key).post(
        "/v1/jobs", json={"model": MODEL, "prompt": "x"}, headers={"Idempotency-Key": "outage"}
    )
    check_problem(response, 503, "database_unavailable")
    again = client_of(app, key).post(
        "/v1/jobs", json={"model": MODEL, "prompt": "x"}, headers={"Idempotency-Key": "outage"}
    )
    assert "Idempotent-Replayed" not in again.headers


def test_without_postgres_it_lives_but_is_not_ready(no_postgres):
    client = no_postgres.test_client()
    assert client.get("/healthz").status_code == 200
    check_problem(client.get("/readyz"), 503, "database_unavailable")


def test_a_stream_outlives_an_absence_of_postgres(client, services, courier, monkeypatch):
    from headrace.contract.errors import DatabaseUnavailable

    job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).get_json()["id"]
    with Reader(client, job) as reader:
        reader.until("queued")
        held = courier.take()
        reader.until("started")
        with monkeypatch.context() as patch:

            def away(*_: object, **__: object):
                raise DatabaseUnavailable("away")

            patch.setattr(type(services.ledger), "job", away)
            services.redis.client_kill_filter(_type="pubsub")
            reader.wait_for_ping()
        courier.say(held, 2)
        courier.end(held)
        assert tokens_of(reader.rest()) == (held.ids, held.text)


def test_settings_refuse_a_typo():
    from headrace.contract.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="HEADRACE_HEARTBEATS"):
        GatewaySettings.from_env({"HEADRACE_HEARTBEATS": "1"})
