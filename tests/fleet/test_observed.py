"""What a running fleet tells of itself: metrics, traces and logs of gateway, workers and tasks.

One fleet with all of it switched on: JSON logs, a collector of traces in the test, metrics of every
process. The board's and the alerts' expressions are held against what these processes show.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from headrace.contract.ids import uuid7_hex
from headrace.fleet.server import free_port
from headrace.tests.contract.collector import Collector, Span
from headrace.tests.fleet.fleet_parts import Fleet, wait_for

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PARTS = ("job.queue", "job.prepare", "job.prefill", "job.decode", "job.publish")
SECRET = "the-prompt-that-nobody-may-read"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector().start()
    yield collector
    collector.stop()


@pytest.fixture(scope="module")
def addresses() -> dict[str, str]:
    return {name: f"127.0.0.1:{free_port()}" for name in ("a", "b", "tasks")}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, smollm2_folder, collector, addresses) -> Iterator[Fleet]:
    settings = {
        "HEADRACE_RUNNER": "stub",
        "HEADRACE_STUB_STEP_MS": "20",
        "HEADRACE_LEASE_S": "2",
        "HEADRACE_DRAIN_S": "0",
        "HEADRACE_LOG_FORMAT": "json",
        "HEADRACE_LOG_LEVEL": "DEBUG",
        "HEADRACE_TRACES_URL": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    made = Fleet(tmp_path_factory.mktemp("observed"), smollm2_folder, settings)
    made.start_servers()
    try:
        made.start("tasks", "tasks", HEADRACE_METRICS_BIND=addresses["tasks"])
        made.start_gateway()
        for name in ("a", "b"):
            made.start_worker(name, HEADRACE_METRICS_BIND=addresses[name])
        yield made
    finally:
        made.stop()


def submit(fleet: Fleet, **body: Any) -> tuple[str, str]:
    """Submit a job under a client's trace; return its id and the trace's."""
    trace = uuid7_hex()
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    body.setdefault("sampling", {"max_tokens": 40})
    return fleet.submit(prompt=SECRET, headers=headers, **body)["id"], trace


def wall_s(job: dict[str, Any]) -> float:
    begin, end = (datetime.fromisoformat(job[name]) for name in ("created_at", "finished_at"))
    return (end - begin).total_seconds()


def families(fleet: Fleet, addresses: dict[str, str]) -> dict[str, str]:
    """Return what all processes show: family -> type."""
    urls = [f"{fleet.api}/metrics", *(f"http://{bind}/metrics" for bind in addresses.values())]
    return {
        family.name: family.type
        for url in urls
        for family in text_string_to_metric_families(httpx.get(url, timeout=30).text)
    }


# -- traces ----------------------------------------------------------------------------------


def test_a_jobs_spans_have_one_trace_the_right_parents_and_add_up_to_its_time(fleet, collector):
    job_id, trace = submit(fleet)
    job = fleet.wait_status(job_id, "succeeded")
    spans = {span.name: span for span in collector.wait(trace, "job.accept", *PARTS)}
    assert set(spans) == {"job.accept", *PARTS}
    accept = spans["job.accept"]
    assert (accept.parent_id, accept.service) == ("00f067aa0ba902b7", "headrace-gateway")
    parts = [spans[name] for name in PARTS]
    for span in parts:
        assert (span.parent_id, span.service) == (accept.span_id, "headrace-worker")
        assert span.attributes["headrace.job"] == job_id
        assert span.attributes["headrace.model"] == fleet.model.name
        assert span.attributes["headrace.worker"] in ("a", "b")
        assert span.attributes["headrace.attempt"] == 1
    for before, after in itertools.pairwise(parts):
        assert before.end_ns == after.begin_ns, "a gap between two parts"
    assert spans["job.decode"].attributes["headrace.output_tokens"] == 40
    assert spans["job.decode"].seconds > 39 * 0.02 * 0.9
    assert sum(span.seconds for span in parts) == pytest.approx(wall_s(job), rel=0.05)


def test_with_a_takeover_the_parts_of_all_attempts_still_add_up(fleet, collector, addresses):
    job_id, trace = submit(fleet, sampling={"max_tokens": 150})
    wait_for(lambda: fleet.job(job_id)["status"] == "running", "the job runs", fleet)
    stream = fleet.events(job_id)
    next(event for event in stream if event.name == "token")
    stream.close()
    (victim,) = {
        beat["worker"]
        for line in log_lines(fleet)
        if (beat := line).get("event") == "job.started" and line.get("job") == job_id
    }
    fleet.end(victim, signal.SIGKILL)
    try:
        job = fleet.wait_status(job_id, "succeeded")
        spans = collector.wait(trace, "job.lost", "job.decode", "job.publish")
    finally:
        fleet.start_worker(victim, HEADRACE_METRICS_BIND=addresses[victim])
    parts = [span for span in spans if span.name != "job.accept"]
    assert {span.attributes["headrace.attempt"] for span in parts} == {2}
    assert "job.queue" not in {span.name for span in parts}
    queue_s = first_wait_s(fleet, job_id)
    assert queue_s + sum(span.seconds for span in parts) == pytest.approx(wall_s(job), rel=0.05)


def first_wait_s(fleet: Fleet, job_id: str) -> float:
    """Return how long the job waited for the attempt that died, which could not tell it."""
    job = fleet.job(job_id)
    begin, end = (datetime.fromisoformat(job[name]) for name in ("created_at", "started_at"))
    return (end - begin).total_seconds()


def test_a_handed_back_job_has_the_parts_of_both_attempts(fleet, collector, addresses):
    job_id, trace = submit(fleet, sampling={"max_tokens": 150})
    stream = fleet.events(job_id)
    next(event for event in stream if event.name == "token")
    stream.close()
    worker = next(
        line["worker"]
        for line in log_lines(fleet)
        if line.get("event") == "job.started" and line.get("job") == job_id
    )
    assert fleet.end(worker) == 0  # its drain_s is 0: what runs is handed back at once
    try:
        job = fleet.wait_status(job_id, "succeeded")
        spans = collector.wait(trace, *PARTS, *PARTS)
    finally:
        fleet.start_worker(worker, HEADRACE_METRICS_BIND=addresses[worker])
    parts = [span for span in spans if span.name != "job.accept"]
    outcomes = [attribute(span) for span in parts if span.name == "job.publish"]
    assert sorted(outcomes) == [(1, "handed_back"), (2, "succeeded")]
    assert sum(span.seconds for span in parts) == pytest.approx(wall_s(job), rel=0.05)


def attribute(span: Span) -> tuple[int, str]:
    return span.attributes["headrace.attempt"], span.attributes["headrace.outcome"]


def test_no_span_holds_a_prompt_or_a_secret(fleet, collector):
    assert collector.spans, "the tests before made some"
    sent = b"".join(collector.bodies)
    for secret in (SECRET, fleet.key, fleet.env["HEADRACE_DATABASE_URL"]):
        assert secret.encode() not in sent


# -- metrics ---------------------------------------------------------------------------------


def names_in(expression: str) -> set[str]:
    """Return the metrics that an expression asks for."""
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:headrace|process|vllm:)_?\w+", bare)) - {"headrace"}


def samples_of(found: dict[str, str]) -> set[str]:
    """Return the series names of families, as expressions write them."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {name + suffix for name, kind in found.items() for suffix in suffixes.get(kind, [""])}


def expressions() -> dict[str, str]:
    """Return the expressions of board and rules by where they stand."""
    board = json.loads((DEPLOY / "grafana" / "headrace.json").read_text())
    found = {
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }
    for variable in board["templating"]["list"]:
        found[f"variable {variable['name']}"] = variable["query"]["query"]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    for group in rules["groups"]:
        found |= {f"rule {rule['alert']}": rule["expr"] for rule in group["rules"]}
    return found


def test_each_metric_of_board_and_rules_is_shown_by_the_fleet(fleet, addresses):
    job_id, _ = submit(fleet)
    fleet.wait_status(job_id, "succeeded")
    shown = samples_of(families(fleet, addresses))
    asked = {where: names_in(expression) for where, expression in expressions().items()}
    assert sum(map(len, asked.values())) > 60
    unknown = {where: names - shown for where, names in asked.items() if names - shown}
    assert unknown == {}


def test_each_metric_is_documented_and_no_other(fleet, addresses):
    text = (DEPLOY / "METRICS.md").read_text()
    documented = set(re.findall(r"^\| `((?:headrace_|vllm:)\w+)", text, re.MULTILINE))
    ours = {
        name + ("_total" if kind == "counter" else "")
        for name, kind in families(fleet, addresses).items()
        if name.startswith(("headrace_", "vllm:"))
    }
    assert ours - documented == set(), "add these to deploy/METRICS.md"
    assert documented - ours == set(), "deploy/METRICS.md names what nobody shows"


def test_names_carry_their_units():
    text = (DEPLOY / "METRICS.md").read_text()
    names = re.findall(r"^\| `(headrace_\w+)", text, re.MULTILINE)
    units = r"_(seconds|bytes|total|tokens|blocks|ratio|watts|celsius|jobs|info)(_|$)"
    counts = {  # plain numbers of things, and states
        *("headrace_alarm", "headrace_engine_decodes", "headrace_live_streams"),
        *("headrace_engine_sequences_running", "headrace_engine_sequences_waiting"),
        *("headrace_queue_lanes", "headrace_store_up", "headrace_worker_state"),
        *("headrace_suspects", "headrace_workers"),
    }
    assert [name for name in names if not re.search(units, name) and name not in counts] == []


def test_the_board_is_one_that_grafana_can_load():
    board = json.loads((DEPLOY / "grafana" / "headrace.json").read_text())
    panels = board["panels"]
    assert board["uid"] == "headrace"
    assert len({panel["id"] for panel in panels}) == len(panels)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    for wanted in ("Overview", "Queues", "Workers", "GPUs", "Latency", "Gateway", "Stores"):
        assert any(row.startswith(wanted) for row in rows), wanted
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "prometheus"


# -- logs ------------------------------------------------------------------------------------


def log_lines(fleet: Fleet) -> list[dict[str, Any]]:
    """Return all lines of our own processes that are JSON."""
    lines: list[dict[str, Any]] = []
    for path in fleet.folder.glob("*.log"):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                lines.append(json.loads(line))
    return lines


def test_each_line_names_its_process_and_a_workers_its_worker(fleet):
    job_id, _ = submit(fleet)
    fleet.wait_status(job_id, "succeeded")
    lines = log_lines(fleet)
    assert {"gateway", "worker", "tasks"} <= {line["process"] for line in lines}
    for line in lines:
        assert {"at", "level", "process", "event"} <= line.keys(), line
        if line["process"] in ("worker", "engine"):
            assert line["worker"] in ("a", "b"), line
        if line["event"].startswith("job."):
            assert line["job"].startswith("job_"), line
    of_job = [line for line in lines if line.get("job") == job_id]
    told = {line["event"]: line["process"] for line in of_job}
    assert told.items() >= {
        ("job.accepted", "gateway"),
        ("job.started", "worker"),
        ("job.ended", "worker"),
    }


def test_no_log_holds_a_prompt_an_output_a_key_or_a_password(fleet):
    body = {"model": fleet.model.name, "prompt": SECRET, "sampling": {"max_tokens": SECRET}}
    assert fleet.call("POST", "/v1/jobs", json=body).status_code in (400, 422)
    fleet.call("GET", f"/v1/jobs/{SECRET}")
    job_id, _ = submit(fleet)
    output = fleet.wait_status(job_id, "succeeded")["output"]["text"]
    logs = "".join(path.read_text(errors="replace") for path in fleet.folder.glob("*.log"))
    passwords = [
        httpx.URL(fleet.env[name].replace("+psycopg", "")).password
        for name in ("HEADRACE_REDIS_URL", "HEADRACE_DATABASE_URL")
    ]
    assert len(logs) > 1000
    for secret in (SECRET, output, fleet.key, fleet.other_key, *filter(None, passwords)):
        assert secret not in logs
