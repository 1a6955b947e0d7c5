"""gunicorn's configuration: gevent workers, sized by the settings.

    python -m gunicorn -c python:headrace.gateway.server \\
        "headrace.gateway.app:create_app_from_env()"

Invariants:
1. Connections and threads are each process's own: the app is not preloaded, so it is made after the
   fork and after gevent has patched the standard library.
2. A stop ends event streams at once (clients resume elsewhere by their last event id) and lets
   other requests finish within graceful_timeout; what was enqueued is confirmed before the exit.
3. Nothing of a request is logged: no access log (queries and headers could carry keys), and no
   text of what cannot be parsed (gateway/connections).

Called by: the CLI (`headrace gateway`), compose.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

from headrace.contract import log
from headrace.contract.settings import GatewaySettings
from headrace.gateway.connections import QuietLogger, StreamingWorker

_settings = GatewaySettings.from_env(os.environ)

# prometheus_client decides when it is imported whether values are shared, by this variable: so it
# must not be imported in this process before this line.
_metrics_folder = tempfile.mkdtemp(prefix="headrace-metrics-")
os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics_folder

bind = _settings.bind
workers = _settings.gateway_processes
worker_class = StreamingWorker
logger_class = QuietLogger
worker_connections = _settings.max_connections
backlog = 2048
#: Seconds a worker may be silent before its master replaces it; its loop never computes so long.
timeout = 60
#: Seconds a stop waits for answers under way: streams, waits and connections that idle between two
#: requests end at once, the rest takes milliseconds.
graceful_timeout = 5
#: Seconds for the wait for a request, and for the whole of its head.
keepalive = 75
#: A head is at most 64 x 8 KiB; cookies and keys need a tenth of it. What is long goes into bodies.
limit_request_line = 4094
limit_request_fields = 64
limit_request_field_size = 8190
preload_app = False
#: Whose X-Forwarded-Proto gunicorn would believe by itself: nobody's. The setting behind_proxy says
#: whether there is a proxy (gateway/app); by default gunicorn believes whoever comes by loopback.
forwarded_allow_ips = ""
accesslog = None
errorlog = "-"
loglevel = "warning"
proc_name = "headrace-gateway"


def worker_exit(server: Any, worker: Any) -> None:
    """Close what the process holds: streams, confirmations, connections."""
    from headrace.gateway.app import services_of

    if worker.wsgi is not None:
        services_of(worker.wsgi).close()
    log.event("gateway.stopped", pid=worker.pid)


def child_exit(server: Any, worker: Any) -> None:
    """Stop counting the live streams of a process that is gone."""
    from prometheus_client.multiprocess import mark_process_dead  # see _metrics_folder

    mark_process_dead(worker.pid)


def on_exit(server: Any) -> None:
    shutil.rmtree(_metrics_folder, ignore_errors=True)
