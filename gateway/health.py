"""For orchestrators and Prometheus: alive, ready, counted.

Ready means: a POST would be accepted. That takes Postgres; without Redis jobs are accepted all the
same and run later, so Redis being away is `degraded` and still 200: taking all gateways out of
rotation for it would turn a delay into an outage. Workers being sick is shown and changes nothing:
it is this gateway's readiness, and their own /readyz is theirs. A gateway that is stopping is not
ready, so that a proxy sends new requests elsewhere.

No key is asked for, so workers are numbers here, not names.

Called by: gateway/routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flask import Response
from prometheus_client import CONTENT_TYPE_LATEST

from headrace.contract.errors import QueueUnavailable, Unavailable
from headrace.contract.streams import SeenWorker
from headrace.contract.wire import WorkerState
from headrace.gateway.dashboard.alarms import STEP_SHARE
from headrace.gateway.jobs import json_response
from headrace.gateway.services import Services


class HealthRoutes:
    """The views that need no key."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def alive(self) -> Response:
        return json_response({"status": "alive"})

    def ready(self) -> Response:
        if self._services.closing.is_set():
            raise Unavailable("this gateway is stopping: ask another", retry_after_s=1)
        self._services.ledger.ping()  # raises 503 with Retry-After
        try:
            workers = _summary(self._services.workers.seen())
        except QueueUnavailable:
            return json_response(
                {"status": "degraded", "postgres": "up", "redis": "away", "workers": None}
            )
        body = {"status": "ready", "postgres": "up", "redis": "up", "workers": workers}
        return json_response(body)

    def metrics(self) -> Response:
        return Response(self._services.metrics.render(), content_type=CONTENT_TYPE_LATEST)


def _summary(seen: Sequence[SeenWorker]) -> dict[str, Any]:
    """Count the workers by how they are; the oldest step is of those that have work."""
    alive = [worker.beat for worker in seen if worker.is_alive]
    stuck = [b for b in alive if b.step_age_ms > b.step_timeout_ms * STEP_SHARE]
    ready = [b for b in alive if b.state == WorkerState.READY and b not in stuck]
    return {
        "num_ready": len(ready),
        "num_stuck": len(stuck),
        "num_other": len(alive) - len(ready) - len(stuck),
        "num_silent": len(seen) - len(alive),
        "oldest_step_s": max((beat.step_age_ms for beat in alive), default=0) / 1000,
    }
