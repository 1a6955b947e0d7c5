"""The Flask app: routes, guard, problems, counters.

Invariants:
1. Deny by default: a request whose route is not marked open in gateway/routes is authenticated
   before anything of it is read. Paths and methods that do not exist are 404 and 405 for all.
2. Making an app opens nothing; connections and threads begin with the first request that needs
   them.

Called by: gunicorn (`create_app_from_env`, in each process after the fork), tests.
"""

from __future__ import annotations

import os
import time

from flask import Flask, Response, g, request

from headrace.contract import log
from headrace.contract.settings import GatewaySettings
from headrace.gateway.problems import handle_problems
from headrace.gateway.routes import route_table
from headrace.gateway.services import Services

#: Where an app's services are found, for those that must close them.
EXTENSION = "headrace"


def create_app_from_env() -> Flask:
    """Make the app of a gunicorn process."""
    settings = GatewaySettings.from_env(os.environ)
    log.configure(settings.log_level, "gateway")
    return create_app(settings)


def create_app(settings: GatewaySettings) -> Flask:
    """Make an app; whoever makes it closes `services_of(app)`."""
    services = Services.build(settings)
    app = Flask("headrace.gateway", static_folder=None, template_folder=None)
    app.extensions[EXTENSION] = services
    app.url_map.strict_slashes = False
    open_endpoints: set[str] = set()
    for op in route_table(services):
        app.add_url_rule(op.path, endpoint=op.name, view_func=op.view, methods=[op.method])
        if op.is_open:
            open_endpoints.add(op.name)
    handle_problems(app)
    _count(app, services)  # before the guard, so that its refusals are counted too
    _guard(app, services, frozenset(open_endpoints))
    return app


def services_of(app: Flask) -> Services:
    return app.extensions[EXTENSION]


def _guard(app: Flask, services: Services, open_endpoints: frozenset[str]) -> None:
    @app.before_request
    def authenticate() -> None:
        if request.endpoint is not None and request.endpoint not in open_endpoints:
            g.principal = services.keys.principal(request.headers.get("Authorization"))


def _count(app: Flask, services: Services) -> None:
    metrics = services.metrics

    @app.before_request
    def start_clock() -> None:
        g.started_s = time.perf_counter()

    @app.after_request
    def count(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "none"
        metrics.requests.labels(request.method, route, response.status_code).inc()
        if "started_s" in g:
            metrics.latency_s.labels(route).observe(time.perf_counter() - g.started_s)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response
