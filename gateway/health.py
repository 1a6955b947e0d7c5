"""For orchestrators and Prometheus: alive, ready, counted.

Ready means: a POST would be accepted. That takes Postgres; without Redis jobs are accepted all the
same and run later, so Redis being away is `degraded` and still 200: taking all gateways out of
rotation for it would turn a delay into an outage.

Called by: gateway/routes.
"""

from __future__ import annotations

from flask import Response
from prometheus_client import CONTENT_TYPE_LATEST

from headrace.contract.errors import QueueUnavailable
from headrace.gateway.jobs import json_response
from headrace.gateway.services import Services


class HealthRoutes:
    """The views that need no key."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def alive(self) -> Response:
        return json_response({"status": "alive"})

    def ready(self) -> Response:
        self._services.ledger.ping()  # raises 503 with Retry-After
        try:
            self._services.workers.ping()
        except QueueUnavailable:
            return json_response({"status": "degraded", "postgres": "up", "redis": "away"})
        return json_response({"status": "ready", "postgres": "up", "redis": "up"})

    def metrics(self) -> Response:
        return Response(self._services.metrics.render(), content_type=CONTENT_TYPE_LATEST)
