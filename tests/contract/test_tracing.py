"""Trace context as its specification wants it, and spans as a collector receives them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from headrace.contract.tracing import CLOSE_S, Traces, checked_traceparent
from headrace.tests.contract.collector import Collector

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector().start()
    yield collector
    collector.stop()


def connect(collector: Collector, share: float = 1.0) -> Traces:
    traces = Traces.connect(collector.url, share, "worker", "w1")
    assert traces is not None
    return traces


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        (GOOD, GOOD),
        (f" {GOOD}\t", GOOD),
        (f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        (f"00-{TRACE}-{SPAN}-ff", GOOD),  # flags we do not know are dropped
        (f"cc-{TRACE}-{SPAN}-01", GOOD),  # a later version is read as far as we know it
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", GOOD),
    ],
)
def test_a_good_traceparent_is_kept_as_version_00_writes_it(header, kept):
    assert checked_traceparent(header) == kept


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f"{GOOD}-more",  # version 00 has no more
        f"cc-{TRACE}-{SPAN}-01.more",
        f"{GOOD},{GOOD}",
        f"{GOOD}\n",
        GOOD.replace("0", "٠"),  # digits of another script
        "0" * 100_000,
    ],
)
def test_invariant_2_a_bad_traceparent_is_as_good_as_none(header):
    assert checked_traceparent(header) is None


def test_invariant_1_off_imports_neither_tracing_nor_exporter():
    code = (
        "import sys\n"
        "import headrace.gateway.jobs, headrace.gateway.services, headrace.worker.endings\n"
        "from headrace.contract.tracing import Traces\n"
        "assert Traces.connect('', 1.0, 'worker') is None\n"
        "ours = 'opentelemetry.sdk.trace', 'opentelemetry.exporter'\n"
        "assert not [name for name in sys.modules if name.startswith(ours)]\n"
    )
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


def test_a_span_has_its_parent_times_attributes_and_service(collector):
    traces = connect(collector)
    traces.add("job.decode", GOOD, 1_000, 3_000, {"headrace.job": "job_1", "n": 3}, error="code")
    traces.close()
    (span,) = collector.spans
    assert (span.trace_id, span.parent_id) == (TRACE, SPAN)
    assert (span.name, span.begin_ns, span.end_ns) == ("job.decode", 1_000, 3_000)
    assert span.attributes == {"headrace.job": "job_1", "n": 3}
    assert span.service == "headrace-worker"
    assert span.is_error
    assert collector.paths == {"/v1/traces"}


def test_a_begun_spans_context_is_its_childrens_parent(collector):
    traces = connect(collector)
    accept = traces.begin("job.accept", GOOD, 1_000)
    traces.add("job.queue", accept.traceparent, 2_000, 3_000, {})
    accept.end({"headrace.job": "job_1"})
    root = traces.begin("job.accept", None, 1_000)
    root.end({})
    traces.close()
    queue, accepted, alone = collector.spans
    assert accepted.trace_id == queue.trace_id == TRACE
    assert (accepted.parent_id, queue.parent_id) == (SPAN, accepted.span_id)
    assert checked_traceparent(accept.traceparent) == accept.traceparent
    assert alone.parent_id == ""
    assert alone.trace_id == root.traceparent.split("-")[1] != TRACE


def test_invariant_3_what_the_client_does_not_record_is_passed_on_and_not_recorded(collector):
    traces = connect(collector)
    span = traces.begin("job.accept", f"00-{TRACE}-{SPAN}-00", 1_000)
    assert span.traceparent.startswith(f"00-{TRACE}-")
    assert span.traceparent.endswith("-00")
    span.end({})
    traces.add("job.queue", span.traceparent, 1, 2, {})
    traces.close()
    assert collector.spans == []


def test_a_share_of_zero_begins_no_traces_and_still_follows_the_clients(collector):
    traces = connect(collector, share=0.0)
    traces.begin("job.accept", None, 1).end({})
    traces.begin("job.accept", GOOD, 1).end({})
    traces.close()
    assert [span.trace_id for span in collector.spans] == [TRACE]


def test_invariant_5_a_collector_that_is_away_holds_nothing_up():
    traces = Traces.connect("http://127.0.0.1:9", 1.0, "worker")
    assert traces is not None
    started = time.monotonic()
    for _ in range(100):
        traces.add("job.queue", GOOD, 1, 2, {})
    traces.close()
    assert time.monotonic() - started < CLOSE_S + 5
