"""Workers: who serves, how well, and what an operator wants of each.

Invariants:
1. An action writes what is wanted into Postgres and nothing else; the worker carries it out when it
   reads it, within a second, or when it is back. So an answer shows the state before.
2. An order may be given to any worker seen within the hour, dead or alive, and to one that was ever
   ordered anything; other names are 404, so that no typing error lies in wait for a worker.
3. Only a restart needs a live worker: a dead one has no engine that could be replaced.
4. With Postgres away workers are shown, without their orders.

Called by: gateway/dashboard/admin_routes (operations), feed (`figures`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from flask import Response, g

from headrace.contract import log
from headrace.contract.errors import Conflict, DatabaseUnavailable, NotFound
from headrace.contract.orders import Order, Wanted, WorkerOrders
from headrace.contract.roles import Role
from headrace.contract.streams import SeenWorker, Workers
from headrace.gateway.dashboard import frame
from headrace.gateway.dashboard.worker_answers import Worker, WorkerList
from headrace.gateway.dashboard.worker_figures import unseen_figures, worker_figures
from headrace.gateway.jobs import json_response
from headrace.gateway.openapi import Operation
from headrace.gateway.services import Services

#: What an action makes the worker be; None: it stays what it is (restart).
ACTIONS = {
    "drain": Wanted.DRAINED,
    "resume": Wanted.SERVING,
    "restart": None,
    "quarantine": Wanted.QUARANTINED,
}
_SUMMARIES = {
    "drain": "Let a worker claim nothing more; running jobs finish, or move after its drain time.",
    "resume": "Let a worker claim again; kept for its return if it is dead.",
    "restart": "Drain a worker, replace its engine process, and let it go on as it was wanted.",
    "quarantine": "Take all jobs from a worker at once and give it none until it is resumed.",
}


class WorkerArea:
    """What may be asked and ordered; used by the JSON views, the page and the feed."""

    def __init__(self, workers: Workers, orders: WorkerOrders) -> None:
        self._workers = workers
        self._orders = orders

    def figures(self) -> dict[str, dict[str, Any]]:
        """Return all workers of the last hour, by name."""
        return self._of(self._workers.seen())

    def act(self, worker: str, action: str, *, by: str) -> dict[str, Any]:
        """Order a worker something; return it as it was last seen, with the order."""
        seen = [one for one in self._workers.seen() if one.beat.worker == worker]
        if not seen and worker not in self._orders.all():
            raise NotFound(
                f"{action} of worker {worker[:60]!r} was asked; none of that name was seen within"
                " the hour or was ever ordered anything: see GET /v1/admin/workers"
            )
        wanted = ACTIONS[action]
        if wanted is not None:
            order = self._orders.want(worker, wanted, by=by)
        elif seen and seen[0].is_alive:
            order = self._orders.restart(worker, by=by)
        else:
            raise Conflict(
                f"restart of {worker} was asked; it is dead: start its process where it ran, an"
                " order cannot"
            )
        log.event("worker.ordered", worker=worker, wanted=order.wanted, action=action, by=by)
        return self._of(seen, {worker: order}).get(worker) or unseen_figures(worker, order)

    def _of(
        self, seen: list[SeenWorker], orders: dict[str, Order] | None = None
    ) -> dict[str, dict[str, Any]]:
        dead = [one.beat.worker for one in seen if not one.is_alive]
        num_running: dict[str, int] = {}
        try:
            orders = self._orders.all() if orders is None else orders
            num_running = self._orders.num_running(dead)
        except DatabaseUnavailable as error:
            log.event("orders.unread", level=logging.WARNING, code=error.code)
        return worker_figures(seen, orders or {}, num_running)


def area(services: Services) -> WorkerArea:
    return WorkerArea(services.workers, WorkerOrders(services.engine))


def operations(services: Services) -> list[Operation]:
    found = area(services)
    listed = Operation(
        "GET", "/v1/admin/workers", "admin_workers", lambda: _list(found),
        "List the workers seen within the hour.", {200: WorkerList}, role=Role.VIEWER,
    )  # fmt: skip
    return [listed, *(_ordering(found, action) for action in ACTIONS)]


def page_operations(services: Services) -> list[Operation]:
    found = area(services)
    return [
        Operation(
            "GET", "/dashboard/workers", "workers_page", lambda: _page(found),
            "The workers.", {200: "text/html"}, role=Role.VIEWER, is_page=True,
        )
    ]  # fmt: skip


def _ordering(found: WorkerArea, action: str) -> Operation:
    # A path, because a worker's name may hold a slash.
    view: Callable[..., Response] = partial(_act, found, action)
    return Operation(
        "POST", f"/v1/admin/workers/<path:worker>/{action}", f"admin_worker_{action}", view,
        _SUMMARIES[action], {202: Worker}, problems=(404, 409),
        role=Role.OPERATOR, action=f"worker.{action}",
    )  # fmt: skip


def _list(found: WorkerArea) -> Response:
    return json_response({"workers": list(found.figures().values())})


def _act(found: WorkerArea, action: str, worker: str) -> Response:
    figures = found.act(worker, action, by=g.actor.name)
    g.audit_details = {"state": figures["state"]}
    return json_response(figures, status=202)


def _page(found: WorkerArea) -> Response:
    return frame.render("workers.html", workers=found.figures(), blank=unseen_figures(""))
