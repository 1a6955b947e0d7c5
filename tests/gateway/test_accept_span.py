"""POST /v1/jobs with trace context: kept with the job, carried in its entry, traced if asked."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from flask import Flask

from headrace.contract.settings import GatewaySettings
from headrace.gateway.app import create_app, services_of
from headrace.tests.contract.collector import Collector
from headrace.tests.gateway.conftest import card, client_of
from headrace.tests.gateway.courier import MODEL

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"
SECRET = "the-prompt-nobody-may-see"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector().start()
    yield collector
    collector.stop()


@pytest.fixture
def traced(settings: GatewaySettings, collector: Collector) -> Iterator[Flask]:
    values = settings.model_dump() | {"traces_url": collector.url}
    app = create_app(GatewaySettings.model_validate(values))
    services_of(app).accounts.register_model(card())
    yield app
    services_of(app).close()


def post(client, header: str | None, **headers: str):
    if header is not None:
        headers["traceparent"] = header
    body = json.dumps({"model": MODEL, "prompt": SECRET})
    return client.post("/v1/jobs", data=body, content_type="application/json", headers=headers)


def kept_of(services, response) -> str | None:
    assert response.status_code == 202, response.text
    row = services.ledger.job(response.json["id"])
    assert row is not None
    return row["traceparent"]


def test_without_a_collector_the_clients_context_is_kept_and_carried(client, services, courier):
    response = post(client, GOOD)
    assert kept_of(services, response) == GOOD
    assert courier.take().spec.traceparent == GOOD


@pytest.mark.parametrize("header", [None, "garbage", f"ff-{TRACE}-{SPAN}-01", "0" * 5000])
def test_a_bad_or_no_context_changes_nothing(client, services, header):
    assert kept_of(services, post(client, header)) is None


def test_accept_is_a_child_of_the_client_and_the_parent_of_what_follows(traced, collector, key):
    services = services_of(traced)
    response = post(client_of(traced, key), GOOD)
    kept = kept_of(services, response)
    (span,) = collector.wait(TRACE, "job.accept")
    assert span.parent_id == SPAN
    assert kept == f"00-{TRACE}-{span.span_id}-01"
    assert span.attributes["headrace.job"] == response.json["id"]
    assert span.attributes["headrace.model"] == MODEL
    assert 0 < span.seconds < 60
    assert not span.is_error


def test_a_request_without_context_begins_a_trace(traced, collector, key):
    kept = kept_of(services_of(traced), post(client_of(traced, key), None))
    assert kept is not None
    (span,) = collector.wait(kept.split("-")[1], "job.accept")
    assert span.parent_id == ""


def test_a_refusal_is_traced_with_its_code_and_nothing_of_the_prompt(traced, collector, key):
    client = client_of(traced, key)
    body = json.dumps({"model": "nobody-serves-this", "prompt": SECRET})
    headers = {"traceparent": GOOD}
    refused = client.post("/v1/jobs", data=body, content_type="application/json", headers=headers)
    assert refused.json["code"] == "unknown_model"
    (span,) = collector.wait(TRACE, "job.accept")
    assert span.is_error
    assert SECRET.encode() not in b"".join(collector.bodies)


def test_a_replay_is_traced_and_its_job_keeps_its_first_context(traced, collector, key):
    client, services = client_of(traced, key), services_of(traced)
    first = post(client, GOOD, **{"Idempotency-Key": "again"})
    kept = kept_of(services, first)
    second = post(client, GOOD, **{"Idempotency-Key": "again"})
    assert kept_of(services, second) == kept
    spans = collector.wait(TRACE, "job.accept", "job.accept")
    assert sorted(span.attributes["headrace.is_replay"] for span in spans) == [False, True]
