"""The description of the API: complete, valid, and readable without a network."""

import re

import pytest

from headrace.gateway import answers
from headrace.gateway.routes import route_table
from headrace.gateway.schemas import JobRequest, SamplingRequest


@pytest.fixture
def document(client) -> dict:
    return client.get("/openapi.json").get_json()


def test_the_document_is_valid_openapi_in_its_references(document):
    assert document["openapi"] == "3.1.0"
    schemas = document["components"]["schemas"]
    references = re.findall(r"#/components/schemas/(\w+)", str(document))
    assert set(references) <= set(schemas)
    for name in ("JobRequest", "SamplingRequest", "Job", "JobList", "ModelList", "Problem"):
        assert name in schemas


def test_each_schema_is_a_json_schema(document):
    from jsonschema import Draft202012Validator

    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_the_document_describes_every_route_but_pages(app, services, document):
    pages = {op.name for op in route_table(services) if op.is_page}
    described = {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }
    served = {
        (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.endpoint not in pages
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert described == served
    for path, methods in document["paths"].items():
        for op in methods.values():
            is_open = op.get("security") == []
            assert is_open is ("401" not in op["responses"])
            for name in re.findall(r"\{(\w+)\}", path):
                assert any(p["name"] == name and p["in"] == "path" for p in op["parameters"])


def test_the_documented_fields_are_those_that_are_read(document):
    schemas = document["components"]["schemas"]
    names = {field.alias or name for name, field in JobRequest.model_fields.items()}
    assert set(schemas["JobRequest"]["properties"]) == names
    assert set(schemas["SamplingRequest"]["properties"]) == set(SamplingRequest.model_fields)
    assert schemas["JobRequest"]["additionalProperties"] is False


def test_the_page_loads_nothing_and_names_everything(client, document):
    response = client.get("/docs")
    page = response.get_data(as_text=True)
    assert response.mimetype == "text/html"
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", page)
    assert "https://" not in page
    for path in document["paths"]:
        assert path in page
    for name in SamplingRequest.model_fields:
        assert f"<code>{name}</code>" in page
    assert re.search(r"maximum 2(\.0)?\b", page)


def test_the_page_allows_its_own_style_and_nothing_else(client):
    import base64
    import hashlib

    response = client.get("/docs")
    policy = response.headers["Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", response.get_data(as_text=True), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")


def test_health_is_as_described(client):
    assert client.get("/healthz").get_json() == {"status": "alive"}
    ready = client.get("/readyz").get_json()
    answers.Health.model_validate(ready)
    assert ready.pop("workers").keys() == answers.WorkersHealth.model_fields.keys()
    assert ready == {"status": "ready", "postgres": "up", "redis": "up"}


def test_metrics_count_requests_jobs_and_events(client, courier):
    from headrace.tests.gateway.courier import MODEL
    from headrace.tests.gateway.reader import Reader

    def value(line: str) -> float:
        text = client.get("/metrics").get_data(as_text=True)
        found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    accepted = f'headrace_jobs_accepted_total{{job_class="interactive",model="{MODEL}"}}'
    posted = 'headrace_http_requests_total{method="POST",route="/v1/jobs",status="202"}'
    before = value(accepted), value(posted), value('headrace_events_sent_total{event="token"}')
    job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).get_json()["id"]
    with Reader(client, job) as reader:
        reader.next()
        assert value("headrace_live_streams") == 1
        held = courier.take()
        courier.say(held, 2)
        courier.end(held)
        reader.rest()
    assert value("headrace_live_streams") == 0
    after = value(accepted), value(posted), value('headrace_events_sent_total{event="token"}')
    assert after == tuple(number + 1 for number in before)
    assert job not in client.get("/metrics").get_data(as_text=True)
