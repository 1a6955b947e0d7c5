"""What every process says to Prometheus beside its own metrics, and how it is served.

Invariants:
1. Labels that are the same on all series of a process (its model, its name) are put on when it is
   asked, not when something is counted.
2. A process that is gone, or may not be looked at, is left out; being asked never fails for it.
3. `serve` shows metrics, and the checks it was given, from a thread of its own; where there are
   checks, other paths are 404.

Called by: gateway/metrics, gateway/tasks_metrics, worker/metrics.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import (
    CollectorRegistry,
    Metric,
    make_wsgi_app,  # pyright: ignore[reportUnknownVariableType]
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from headrace.contract.errors import ConfigurationError


def package_version() -> str:
    """Return the version that is installed; `unknown` when the code runs from a plain folder."""
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"


class BuildInfo(Collector):
    """`headrace_build_info`: what runs here, as labels of a 1."""

    def __init__(self, process: str) -> None:
        self._labels = [process, package_version(), platform.python_version()]

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "headrace_build_info", "What runs here.", labels=["process", "version", "python"]
        )
        family.add_metric(self._labels, 1)
        yield family


@dataclass(frozen=True, eq=False)
class Processes(Collector):
    """CPU, memory and open files of the named processes, under Prometheus' usual names.

    `process` says what it is, `pid` which: of several gunicorn workers each has its own counters.
    """

    find: Callable[[], Iterable[tuple[str, int]]]  # (what it is, pid)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, pid in self.find():
            for metric in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    labels = {"process": name, "pid": str(pid)}
                    family.add_sample(sample.name, labels, sample.value)
        yield from families.values()


def own_process(name: str) -> Processes:
    return Processes(lambda: [(name, os.getpid())])


@dataclass(frozen=True, eq=False)
class Labelled(Collector):
    """All that another registry holds, with labels that all its series share."""

    inner: CollectorRegistry
    labels: Mapping[str, str]

    def collect(self) -> Iterator[Metric]:
        for metric in self.inner.collect():
            shown = Metric(metric.name, metric.documentation, metric.type)
            shown.samples = [
                sample._replace(labels={**self.labels, **sample.labels})
                for sample in metric.samples
                if not sample.name.endswith("_created")  # a restart shows in the counter itself
            ]
            yield shown


class Gaps(Collector):
    """A histogram that takes many equal values at once: the tokens of one step.

    One owner observes; whoever collects sees each value in both sum and buckets, or is one
    observation behind in one of them, which the next scrape mends.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, num: int) -> None:
        """Count a value `num` times."""
        self._counts[bisect_left(self._bounds, value)] += num
        self._sum += value * num

    def collect(self) -> Iterator[Metric]:
        total, buckets = 0, list[tuple[str, float]]()
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == math.inf else str(bound), total))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum)


#: Answers a check by path and query: status and JSON; None: it is no check.
Checks = Callable[[str, str], "tuple[int, dict[str, Any]] | None"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # a slow reader holds up neither the others nor the end


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Silent(WSGIRequestHandler):
    timeout = 10.0  # seconds a connection may take for its request

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: Prometheus asks every few seconds."""


def serve(bind: str, registry: CollectorRegistry, checks: Checks | None = None) -> None:
    """Serve a registry at `host:port` until the process ends; ConfigurationError if it cannot."""
    host, _, port = bind.rpartition(":")
    kind = _Server6 if host.startswith("[") else _Server
    app = cast("Any", make_wsgi_app(registry))
    if checks is not None:
        app = _with_checks(app, checks)
    try:
        server = make_server(host.strip("[]"), int(port), app, kind, _Silent)
    except OSError as error:
        raise ConfigurationError(
            f"HEADRACE_METRICS_BIND is {bind}; nothing can listen there ({error.strerror}): name a "
            "free port of this host, or leave it empty"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _with_checks(metrics: Any, checks: Checks) -> Any:
    """Return the WSGI app of metrics and checks."""

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path in ("/", "/metrics"):
            return metrics(environ, start_response)
        answer = checks(path, environ.get("QUERY_STRING", ""))
        status, body = answer or (
            404,
            {"status": "not found", "paths": "/metrics /healthz /readyz"},
        )
        reason = {200: "OK", 404: "Not Found"}.get(status, "Service Unavailable")
        headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
        start_response(f"{status} {reason}", headers)
        return [json.dumps(body).encode()]

    return app
