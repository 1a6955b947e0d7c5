"""The route table: every path, what answers it, and whether it needs a key.

The app's rules, the guard and /openapi.json are all made from these rows, so none can forget one.
Open are only: /healthz and /readyz (orchestrators have no key), /metrics (Prometheus; counts only,
keep it inside by the proxy in front), /openapi.json and /docs (they describe, and tell nothing of
this fleet), and the login of the dashboard with what it shows. What is under /v1/admin and
/dashboard needs a role (gateway/dashboard/guard).

Called by: gateway/app.
"""

from __future__ import annotations

from headrace.gateway import answers
from headrace.gateway.dashboard import admin_routes
from headrace.gateway.health import HealthRoutes
from headrace.gateway.jobs import JobRoutes
from headrace.gateway.models import ModelRoutes
from headrace.gateway.openapi import Operation, document
from headrace.gateway.pages import PageRoutes
from headrace.gateway.schemas import EventsQuery, JobRequest, JobsQuery
from headrace.gateway.services import Services
from headrace.gateway.sse import EventRoutes

#: Version of the API's description.
API_VERSION = "1"


def route_table(services: Services) -> list[Operation]:
    """Return all operations of the gateway."""
    return [
        *_job_routes(services),
        *_open_routes(services),
        *admin_routes.operations(services),
    ]


def _job_routes(services: Services) -> list[Operation]:
    jobs, events, models = JobRoutes(services), EventRoutes(services), ModelRoutes(services)
    return [
        Operation(
            "POST", "/v1/jobs", "create_job", jobs.create,
            "Accept a job: 202 at once, or 200 when it was waited for and has ended.",
            {202: answers.Job, 200: answers.Job},
            body=JobRequest,
            headers={
                "Idempotency-Key": "1-255 visible ASCII; the same key and body is the same job.",
                "Prefer": "`wait=N`: hold the answer up to N seconds for the job's end.",
            },
            problems=(400, 413, 415, 422, 429),
        ),
        Operation(
            "GET", "/v1/jobs", "list_jobs", jobs.page, "List jobs, newest first, without output.",
            {200: answers.JobList}, query=JobsQuery, problems=(400,),
        ),
        Operation(
            "GET", "/v1/jobs/<job_id>", "get_job", jobs.show, "Show a job with its output.",
            {200: answers.Job}, problems=(404,),
        ),
        Operation(
            "POST", "/v1/jobs/<job_id>/cancel", "cancel_job", jobs.cancel,
            "Cancel: 200 when it has ended by it, 202 when its worker will end it.",
            {200: answers.Job, 202: answers.Job}, problems=(404, 409),
        ),
        Operation(
            "GET", "/v1/jobs/<job_id>/events", "follow_job", events.events,
            "Follow a job's events, or replay those of one that has ended.",
            {200: "text/event-stream"}, query=EventsQuery,
            headers={"Last-Event-ID": "Id of the last event seen: go on after it."},
            problems=(400, 404),
        ),
        Operation(
            "GET", "/v1/models", "list_models", models.page, "List the models.",
            {200: answers.ModelList},
        ),
    ]  # fmt: skip


def _open_routes(services: Services) -> list[Operation]:
    health = HealthRoutes(services)
    pages = PageRoutes(lambda: document(route_table(services), version=API_VERSION))
    return [
        Operation(
            "GET", "/healthz", "alive", health.alive, "Say that the process lives.",
            {200: answers.Health}, is_open=True,
        ),
        Operation(
            "GET", "/readyz", "ready", health.ready, "Say whether jobs are accepted.",
            {200: answers.Health}, is_open=True, problems=(503,),
        ),
        Operation(
            "GET", "/metrics", "metrics", health.metrics, "Counts, for Prometheus.",
            {200: "text/plain"}, is_open=True,
        ),
        Operation(
            "GET", "/openapi.json", "openapi", pages.openapi, "This description.",
            {200: "application/json"}, is_open=True,
        ),
        Operation(
            "GET", "/docs", "docs", pages.docs, "This description, to read.",
            {200: "text/html"}, is_open=True,
        ),
    ]  # fmt: skip
