"""What the gateway counts, for Prometheus: the same over all of its processes.

Under gunicorn each process writes its values to files of one folder (gateway/server names it) and
`/metrics`, whichever process answers it, adds them up. Without that folder (tests) one registry
an app holds them.

Called by: gateway/services (one a process); views, stream and outbox count with it.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from headrace.contract import exposition

#: Bounds of the latency histogram, seconds: status polls take milliseconds, waits up to a minute.
LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


class Metrics:
    """All series of one gateway process."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "headrace_http_requests_total",
            "Requests answered.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.latency_s = Histogram(
            "headrace_http_request_seconds",
            "Time to the answer, for streams to its first byte.",
            ["route"],
            buckets=LATENCY_S,
            registry=registry,
        )
        self.live_streams = Gauge(
            "headrace_live_streams",
            "Event streams open now.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.num_streams = 0  # of this process alone: a gauge cannot be asked for its value
        self._streams_lock = threading.Lock()
        self.events = Counter(
            "headrace_events_sent_total",
            "Events sent to subscribers.",
            ["event"],
            registry=registry,
        )
        self.jobs_accepted = Counter(
            "headrace_jobs_accepted_total",
            "Jobs accepted, replays of an Idempotency-Key not counted.",
            ["model", "job_class"],
            registry=registry,
        )
        self.jobs_refused = Counter(
            "headrace_jobs_refused_total",
            "Jobs refused because too much waits: jobs, tokens, tenant, unseen (Redis is away).",
            ["model", "job_class", "reason"],
            registry=registry,
        )
        self.enqueue_failures = Counter(
            "headrace_enqueue_failures_total",
            "Accepted jobs left to the relay because Redis was away.",
            registry=registry,
        )
        self.streams_cut = Counter(
            "headrace_streams_cut_total",
            "Event streams ended because the client took nothing for write_timeout_s.",
            registry=registry,
        )
        self.resyncs = Counter(
            "headrace_stream_log_reads_total",
            "Times a stream had to read the token log to fill a gap.",
            registry=registry,
        )

    def stream_opened(self) -> None:
        self.live_streams.inc()
        with self._streams_lock:
            self.num_streams += 1

    def stream_closed(self) -> None:
        self.live_streams.dec()
        with self._streams_lock:
            self.num_streams -= 1

    def render(self) -> bytes:
        """Return the text exposition of all processes."""
        collected, find = CollectorRegistry(), _gunicorns
        try:
            MultiProcessCollector(collected)
        except ValueError:  # no folder is named: this process is the only one
            collected.register(exposition.Labelled(self._registry, {}))
            find = _this_one
        collected.register(exposition.BuildInfo("gateway"))
        collected.register(exposition.Processes(find))
        return generate_latest(collected)


def _this_one() -> list[tuple[str, int]]:
    return [("gateway", os.getpid())]


def _gunicorns() -> list[tuple[str, int]]:
    """Name gunicorn's master and its workers."""
    master = os.getppid()
    try:
        children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    except OSError:  # no Linux, or one that does not tell: at least this one
        children = [str(os.getpid())]
    return [("gunicorn", master), *(("gateway", int(pid)) for pid in children)]
