"""Overview, queues and feed over HTTP: thin views on the areas, for programs and for browsers.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from flask import Response, g, request

from headrace.contract.errors import DatabaseUnavailable, HeadraceError
from headrace.contract.pauses import ALL
from headrace.contract.roles import Role
from headrace.gateway.dashboard import frame, workers
from headrace.gateway.dashboard.feed import Feed, Paced, State
from headrace.gateway.dashboard.live_answers import (
    ModelSample,
    OverviewAnswer,
    OverviewQuery,
    PurgeAnswer,
    PurgeRequest,
    QueueChoice,
    QueuesAnswer,
)
from headrace.gateway.dashboard.overview import Overview
from headrace.gateway.dashboard.queues import Queues, blank_row
from headrace.gateway.dashboard.reading import json_body
from headrace.gateway.jobs import json_response
from headrace.gateway.openapi import SESSION_COOKIE, Operation
from headrace.gateway.refusals import validate_query
from headrace.gateway.services import Services
from headrace.gateway.sse import HEADERS

#: Queues the feed carries, the fullest first; the page and its JSON show all.
MAX_FED_QUEUES = 200
#: What pages show before the first sample, and of a model that has none.
NOTHING: State = {name: None for name in (*ModelSample.model_fields, "live_streams")} | {
    "models": {}
}

Choice = TypeVar("Choice", QueueChoice, PurgeRequest)


class LiveRoutes:
    """The views of overview, queues and feed."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._overview = Overview(services.live, services.ledger)
        self._queues = Queues(services)
        sections: Mapping[str, Callable[[], State]] = {
            "overview": self._overview.figures,
            "workers": Paced(workers.area(services).figures),
            "queues": Paced(lambda: self._queues.figures(limit=MAX_FED_QUEUES)),
        }
        self._feed = Feed(sections, services.closing)

    def overview(self) -> Response:
        query = validate_query(OverviewQuery, request.args)
        return json_response(self._overview.show(query.span))

    def queues(self) -> Response:
        return json_response(self._queues.list())

    def pause(self) -> Response:
        choice = self._choice(QueueChoice)
        return json_response(
            self._queues.pause(
                model=choice.model,
                job_class=choice.job_class,
                tenant=choice.tenant,
                by=g.actor.name,
            )
        )

    def resume(self) -> Response:
        choice = self._choice(QueueChoice)
        return json_response(
            self._queues.resume(
                model=choice.model, job_class=choice.job_class, tenant=choice.tenant
            )
        )

    def purge(self) -> Response:
        choice = self._choice(PurgeRequest)
        done = self._queues.purge(
            model=choice.model,
            job_class=choice.job_class,
            tenant=choice.tenant,
            confirm=choice.confirm,
        )
        g.audit_details = {**g.audit_details, **done}
        return json_response(done)

    def overview_page(self) -> Response:
        query = validate_query(OverviewQuery, request.args)
        state = self._overview.show(query.span)
        return frame.render(
            "overview.html",
            state=state,
            s=state["sample"] or NOTHING,
            blank=NOTHING,
            span=query.span.value,
        )

    def queues_page(self) -> Response:
        pauses = self._queues.list()["pauses"]  # first: it asks Postgres anew
        return frame.render(
            "queues.html",
            queues=self._queues.figures(limit=MAX_FED_QUEUES),
            pauses=pauses,
            models=[card.name for card in self._services.cards.all()],
            tenants=sorted(self._services.accounts.tenant_names().values()),
            blank=blank_row(),
            max_queues=MAX_FED_QUEUES,
        )

    def feed(self) -> Response:
        if request.method == "HEAD":
            return Response(headers=HEADERS)
        stream = self._feed.stream(
            may_listen=self._still_admitted(), heartbeat_s=self._services.settings.heartbeat_s
        )
        return Response(stream, headers=HEADERS)

    def _choice(self, model: type[Choice]) -> Choice:
        """Return which queues the body names, and note them for the audit log."""
        choice = json_body(model, self._services.settings)
        g.audit_target = choice.model or ALL
        g.audit_details = {"job_class": choice.job_class, "tenant": choice.tenant}
        return choice

    def _still_admitted(self) -> Callable[[], bool]:
        """Return the question whether the one who asks now would be let in again."""
        services, header = self._services, request.headers.get("Authorization")
        token = request.cookies.get(SESSION_COOKIE)

        def ask() -> bool:
            try:
                if header is not None:
                    return services.keys.principal(header).role is not None
                return token is not None and services.sessions.session(token) is not None
            except DatabaseUnavailable:
                return True  # nobody can be asked; who was let in stays
            except HeadraceError:
                return False

        return ask


def operations(services: Services) -> list[Operation]:
    """Return the routes of overview, queues and feed, and their pages: all over one feed."""
    live = LiveRoutes(services)
    return [
        Operation(
            "GET", "/dashboard", "overview_page", live.overview_page,
            "Whether the fleet is well.", {200: "text/html"}, role=Role.VIEWER, is_page=True,
        ),
        Operation(
            "GET", "/dashboard/queues", "queues_page", live.queues_page,
            "The queues.", {200: "text/html"}, role=Role.VIEWER, is_page=True,
        ),
        Operation(
            "GET", "/v1/admin/overview", "show_overview", live.overview,
            "Show whether the fleet is well: sample, alarms, stores, history.",
            {200: OverviewAnswer}, query=OverviewQuery, problems=(400,), role=Role.VIEWER,
        ),
        Operation(
            "GET", "/v1/admin/feed", "follow_fleet", live.feed,
            "Follow the live figures: `state`, then `delta`s (RFC 7396).",
            {200: "text/event-stream"}, role=Role.VIEWER,
        ),
        Operation(
            "GET", "/v1/admin/queues", "list_queues", live.queues,
            "List the queues that hold anything, and what is paused.",
            {200: QueuesAnswer}, role=Role.VIEWER,
        ),
        Operation(
            "POST", "/v1/admin/queues/pause", "pause_queue", live.pause,
            "Give no new job of these queues to a worker; what runs goes on.",
            {200: QueuesAnswer}, body=QueueChoice, problems=(400, 404, 413, 415, 422),
            role=Role.OPERATOR, action="queue.pause",
        ),
        Operation(
            "POST", "/v1/admin/queues/resume", "resume_queue", live.resume,
            "Lift the pauses within these queues.",
            {200: QueuesAnswer}, body=QueueChoice, problems=(400, 404, 409, 413, 415, 422),
            role=Role.OPERATOR, action="queue.resume",
        ),
        Operation(
            "POST", "/v1/admin/queues/purge", "purge_queue", live.purge,
            "Cancel every job that waits in these queues and never ran.",
            {200: PurgeAnswer}, body=PurgeRequest, problems=(400, 404, 413, 415, 422),
            role=Role.OPERATOR, action="queue.purge",
        ),
    ]  # fmt: skip
