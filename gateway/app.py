"""The Flask app: routes, guard, problems, counters.

Invariants:
1. Deny by default: a request whose route is not marked open in gateway/routes is authenticated
   before anything of it is read. Paths and methods that do not exist are 404 and 405 for all.
   What a role is needed for, gateway/dashboard/guard admits and audits.
   No view sees a name with a NUL, which Postgres cannot be asked for.
2. Making an app opens nothing; connections and threads begin with the first request that needs
   them.

Called by: gunicorn (`create_app_from_env`, in each process after the fork), tests.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from flask import Flask, Response, g, request
from werkzeug.middleware.proxy_fix import ProxyFix

from headrace.contract import log
from headrace.contract.errors import NotFound
from headrace.contract.settings import GatewaySettings
from headrace.gateway.dashboard.guard import OperatorGuard
from headrace.gateway.openapi import Operation
from headrace.gateway.problems import handle_problems
from headrace.gateway.routes import route_table
from headrace.gateway.services import Services

#: Where an app's services are found, for those that must close them.
EXTENSION = "headrace"


def create_app_from_env() -> Flask:
    """Make the app of a gunicorn process."""
    settings = GatewaySettings.from_env(os.environ)
    log.configure(settings.log_level, "gateway", settings.log_format)
    return create_app(settings)


def create_app(settings: GatewaySettings) -> Flask:
    """Make an app; whoever makes it closes `services_of(app)`."""
    services = Services.build(settings)
    app = Flask(__name__, static_folder=None, template_folder=None)
    app.extensions[EXTENSION] = services
    app.url_map.strict_slashes = False
    if settings.behind_proxy:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=1, x_proto=1)
    table = {op.name: op for op in route_table(services)}
    for op in table.values():
        app.add_url_rule(op.path, endpoint=op.name, view_func=op.view, methods=[op.method])
    handle_problems(app)
    _count(app, services)  # before the guard, so that its refusals are counted too
    _guard(app, services, table)
    return app


def services_of(app: Flask) -> Services:
    return app.extensions[EXTENSION]


def _guard(app: Flask, services: Services, table: Mapping[str, Operation]) -> None:
    operators = OperatorGuard(services.keys, services.sessions, services.audit)

    @app.before_request
    def authenticate() -> None:
        if request.endpoint is None:
            return
        op = g.operation = table.get(request.endpoint)
        if op is not None and op.is_open:
            return
        if op is not None and op.role is not None:
            operators.admit(op)
        else:
            g.principal = services.keys.principal(request.headers.get("Authorization"))
        if any("\x00" in str(value) for value in (request.view_args or {}).values()):
            raise NotFound("a name in the path holds a NUL; no name here does: correct the path")

    app.after_request(operators.finish)


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
