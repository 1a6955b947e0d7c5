"""The playground: an operator asks a model something, through the same path as every client.

The job is an ordinary one of the tenant `operators`, made with a key of its own that opens nothing;
what it says is read from the job's events, and it is canceled as any job (gateway/dashboard/jobs).
The audit log has who ran it and which job it was, and nothing of the prompt.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

from typing import Any

from flask import Response, g, request

from headrace.contract.errors import QueueUnavailable
from headrace.contract.roles import Role
from headrace.gateway import answers
from headrace.gateway.body import read_json_object
from headrace.gateway.dashboard import frame
from headrace.gateway.intake import new_row
from headrace.gateway.job_json import job_json
from headrace.gateway.jobs import hand_over, json_response
from headrace.gateway.openapi import Operation
from headrace.gateway.refusals import validate
from headrace.gateway.schemas import JobRequest
from headrace.gateway.services import Services

#: Whose the jobs are, and the key they are under.
TENANT = "operators"
KEY = "playground"


class Playground:
    """Runs prompts for operators."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def run(self, body: dict[str, Any]) -> dict[str, Any]:
        """Accept a job with this body of `POST /v1/jobs` and return it."""
        services = self._services
        asked = validate(JobRequest, body)
        principal = services.accounts.own_key(tenant=TENANT, name=KEY)
        with services.admission.place(asked, principal.tenant_id) as place:
            row = new_row(asked, principal, services.cards, services.prompts)
            accepted = services.ledger.accept_job(row, idempotency_key=None, request_sha256=b"")
            place.is_accepted = True
        hand_over(services, accepted)
        return job_json(accepted.job)

    def models(self) -> list[dict[str, Any]]:
        """Return what may be asked, those that answer now first."""
        try:
            beats = self._services.workers.alive().values()
            ready = {beat.model for beat in beats if beat.state == "ready"}
        except QueueUnavailable:
            ready = set[str]()  # nobody can be reached without Redis
        found = [
            {
                "name": card.name,
                "is_ready": card.name in ready,
                "has_chat_template": card.has_chat_template,
                "max_seq_tokens": card.max_seq_tokens,
            }
            for card in self._services.cards.all()
        ]
        return sorted(found, key=lambda model: (not model["is_ready"], model["name"]))


class PlaygroundRoutes:
    """The views of the playground."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._playground = Playground(services)

    def run(self) -> Response:
        settings = self._settings
        body = read_json_object(
            request, max_body_bytes=settings.max_body_bytes, max_depth=settings.max_json_depth
        )
        job = self._playground.run(body)
        g.audit_target = job["id"]
        g.audit_details = {"model": job["model"]}
        return json_response(job, status=202)

    def page(self) -> Response:
        return frame.render("playground.html", models=self._playground.models())


def operations(services: Services) -> list[Operation]:
    """Return the playground's row of /v1/admin."""
    routes = PlaygroundRoutes(services)
    return [
        Operation(
            "POST", "/v1/admin/playground", "run_playground", routes.run,
            "Accept a job of the tenant `operators`; follow it with /v1/admin/jobs/{id}/events.",
            {202: answers.Job}, body=JobRequest, problems=(400, 413, 415, 422, 429),
            role=Role.OPERATOR, action="playground.run",
        )
    ]  # fmt: skip


def page_operations(services: Services) -> list[Operation]:
    """Return the page."""
    routes = PlaygroundRoutes(services)
    return [
        Operation(
            "GET", "/dashboard/playground", "playground_page", routes.page, "The playground.",
            {200: "text/html"}, role=Role.OPERATOR, is_page=True,
        )
    ]  # fmt: skip
