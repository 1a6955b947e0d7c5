"""Jobs of all tenants, for operators: search, detail, events, cancel, retry, clone, priority, bulk.

Invariants:
1. A cancel by an operator is the client's cancel; a new job made here is validated, checked and
   enqueued as one that was posted, for the tenant and key of the job it is made from.
2. A job ends once: retry and clone make new jobs, with `made_from`.
3. A new priority is committed in the row first, then its entry moves; either may be repeated.

Called by: gateway/dashboard/admin_routes (operations), job_pages and dead_letters (Jobs).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flask import Response, g, request
from sqlalchemy import RowMapping

from headrace.contract import log
from headrace.contract.accounts import Principal
from headrace.contract.dead_letters import DeadLetters
from headrace.contract.errors import (
    JobAlreadyEnded,
    JobNotQueued,
    JobNotRetryable,
    NotFound,
    Poison,
)
from headrace.contract.ids import is_job_id
from headrace.contract.ledger import Cancel
from headrace.contract.roles import Role
from headrace.contract.specs import spec_of
from headrace.contract.streams import Move
from headrace.contract.wire import JobStatus
from headrace.gateway.body import read_json_object
from headrace.gateway.cancel import tell_canceled
from headrace.gateway.dashboard.job_bulk import JobBulk
from headrace.gateway.dashboard.job_schemas import (
    AdminJob,
    AdminJobList,
    BulkRequest,
    BulkResult,
    CloneRequest,
    JobSearchQuery,
    PriorityRequest,
)
from headrace.gateway.dashboard.job_timeline import timeline
from headrace.gateway.dashboard.reading import json_body
from headrace.gateway.intake import new_row
from headrace.gateway.job_json import job_json
from headrace.gateway.jobs import decode_cursor, encode_cursor, json_response
from headrace.gateway.openapi import Operation
from headrace.gateway.refusals import validate, validate_query
from headrace.gateway.schemas import EventsQuery, JobRequest
from headrace.gateway.services import Services
from headrace.gateway.sse import EventRoutes

_ATTEMPT = ("worker", "started_at", "ended_at", "outcome", "admitted_ms", "first_token_ms",
            "last_token_ms", "resumed_at", "num_tokens", "signature")  # fmt: skip
_PROMPTS = ("prompt", "prompt_token_ids", "messages")


class Jobs:
    """The operations, as plain methods."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.bulk = JobBulk(services).run

    def search(self, query: JobSearchQuery) -> dict[str, Any]:
        before = None if query.cursor is None else decode_cursor(query.cursor)
        page = self._services.search.page(query.filter(), limit=query.limit, before=before)
        cursor = None if page.next_before is None else encode_cursor(page.next_before)
        return {"jobs": [_admin_json(row) for row in page.rows], "next_cursor": cursor}

    def detail(self, job_id: str) -> dict[str, Any]:
        services = self._services
        row = find_any_job(services, job_id)
        attempts = services.search.attempts(job_id)
        told = [{"attempt": a["number"]} | {name: a[name] for name in _ATTEMPT} for a in attempts]
        return _admin_json(row) | {
            "cancel_requested_at": row["cancel_requested_at"],
            "retried_as": services.search.made_of(job_id),
            "dead_letter": self._dead_letter(row),
            "attempts": told,
            "timeline": timeline(row, attempts, now=datetime.now(UTC)),
        }

    def cancel(self, job_id: str) -> dict[str, Any]:
        row = find_any_job(self._services, job_id)
        outcome = self._services.ledger.request_cancel(job_id, tenant_id=row["tenant_id"])
        if outcome is Cancel.ENDED:
            raise JobAlreadyEnded(f"cancel of {job_id} was asked; it has ended: read its result")
        row = find_any_job(self._services, job_id)
        tell_canceled(self._services, [row])
        log.event("job.cancel_requested", job=job_id, outcome=outcome.value)
        return self.detail(job_id)

    def retry(self, job_id: str) -> dict[str, Any]:
        row = find_any_job(self._services, job_id)
        made = self._services.edits.retry([job_id])
        if not made:
            raise JobNotRetryable(
                f"retry of {job_id} was asked; it is {row['status']}: only jobs that failed, were "
                "canceled or expired are made anew; clone it instead"
            )
        g.audit_details = {"made": made[0][1]}
        return self.hand_over(find_any_job(self._services, made[0][1]))

    def clone(self, job_id: str, edits: dict[str, Any]) -> dict[str, Any]:
        services = self._services
        row = find_any_job(services, job_id)
        job = validate(JobRequest, _edited(row, edits))
        values = new_row(
            job, Principal(row["tenant_id"], row["key_id"]), services.cards, services.prompts
        )
        accepted = services.ledger.accept_job(
            values | {"made_from": job_id}, idempotency_key=None, request_sha256=b""
        )
        g.audit_details = {"made": values["id"], "edited": sorted(edits)}
        return self.hand_over(find_any_job(services, accepted.job["id"]))

    def set_priority(self, job_id: str, priority: str) -> dict[str, Any]:
        before = find_any_job(self._services, job_id)
        g.audit_details = {"from": before["priority"], "to": priority}
        rows = self._services.edits.set_priority([job_id], priority)
        moved = None
        if rows:
            moved = self._services.streams.move(spec_of(rows[0]), rows[0]["cost_tokens"])
        if moved is None or moved is Move.GIVEN:
            now = find_any_job(self._services, job_id)["status"]
            found = "a worker was given it" if now == JobStatus.QUEUED else f"it is {now}"
            raise JobNotQueued(
                f"priority {priority} for {job_id} was asked; {found}: only jobs that wait move"
            )
        log.event("job.moved", job=job_id, priority=priority)
        return self.detail(job_id)

    def _dead_letter(self, row: RowMapping) -> dict[str, Any] | None:
        if row["error_code"] != Poison.code:
            return None  # as nearly all: nothing more is read
        letter = DeadLetters(self._services.engine).letter(row["id"])
        names = ("signature", "num_runs", "created_at", "replayed_at", "replayed_as")
        return None if letter is None else {name: letter[name] for name in names}

    def hand_over(self, row: RowMapping) -> dict[str, Any]:
        """Enqueue a job that an operator made, as gateway/jobs does; return its detail."""
        self._services.metrics.jobs_accepted.labels(row["model"], row["job_class"]).inc()
        self._services.enqueuer.put(row)
        log.event("job.accepted", job=row["id"], model=row["model"], made_from=row["made_from"])
        return self.detail(row["id"])


def find_any_job(services: Services, job_id: str, *, with_output: bool = True) -> RowMapping:
    """Return a job of any tenant, or raise NotFound."""
    del with_output  # sse.FindJob leaves out what costs; here the whole row is read each time
    row = services.search.job(job_id) if is_job_id(job_id) else None
    if row is None:
        raise NotFound(f"there is no job {job_id[:60]!r}: check the id, or search for it")
    return row


def _admin_json(row: RowMapping) -> dict[str, Any]:
    return job_json(row) | {name: row[name] for name in ("tenant", "worker", "made_from")}


def _edited(row: RowMapping, edits: dict[str, Any]) -> dict[str, Any]:
    """Return the request that makes the job again, with the edits in it."""
    body: dict[str, Any] = {
        "model": row["model"],
        "sampling": row["sampling"],
        "class": row["job_class"],
        "priority": row["priority"],
        "metadata": row["meta"],
    }
    if not any(name in edits for name in _PROMPTS):
        body |= row["input"]
    body |= edits
    if isinstance(sampling := edits.get("sampling"), dict):
        body["sampling"] = row["sampling"] | sampling
    return body


class JobViews:
    """The JSON views."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._jobs = Jobs(services)

    def search(self) -> Response:
        return json_response(self._jobs.search(validate_query(JobSearchQuery, request.args)))

    def detail(self, job_id: str) -> Response:
        return json_response(self._jobs.detail(job_id))

    def cancel(self, job_id: str) -> Response:
        job = self._jobs.cancel(job_id)
        has_ended = JobStatus(job["status"]).is_terminal
        return json_response(job, status=200 if has_ended else 202)

    def retry(self, job_id: str) -> Response:
        return json_response(self._jobs.retry(job_id), status=202)

    def clone(self, job_id: str) -> Response:
        settings = self._settings
        edits = read_json_object(
            request, max_body_bytes=settings.max_body_bytes, max_depth=settings.max_json_depth
        )
        return json_response(self._jobs.clone(job_id, edits), status=202)

    def priority(self, job_id: str) -> Response:
        asked = json_body(PriorityRequest, self._settings)
        return json_response(self._jobs.set_priority(job_id, asked.priority))

    def bulk(self) -> Response:
        asked = json_body(BulkRequest, self._settings)
        wanted = asked.filter.model_dump(mode="json", exclude_none=True)
        g.audit_target = asked.action
        g.audit_details = {"filter": wanted, "action": asked.action, "dry_run": asked.dry_run}
        result = self._jobs.bulk(asked)
        g.audit_details |= result
        return json_response(result)


def operations(services: Services) -> list[Operation]:
    views = JobViews(services)
    one = "/v1/admin/jobs/<job_id>"
    return [
        Operation(
            "GET", "/v1/admin/jobs", "admin_jobs", views.search,
            "Search the jobs of all tenants, newest first.", {200: AdminJobList},
            query=JobSearchQuery, problems=(400,), role=Role.VIEWER,
        ),
        Operation(
            "POST", "/v1/admin/jobs/bulk", "admin_bulk_jobs", views.bulk,
            "Cancel, retry or re-prioritise all jobs that a filter matches.", {200: BulkResult},
            body=BulkRequest, problems=(400, 409, 413, 415, 422), role=Role.OPERATOR,
            action="job.bulk",
        ),
        Operation(
            "GET", one, "admin_job", views.detail, "Show a job, its attempts and its timeline.",
            {200: AdminJob}, problems=(404,), role=Role.VIEWER,
        ),
        Operation(
            "GET", f"{one}/events", "admin_follow_job", EventRoutes(services, find_any_job).events,
            "Follow any job's events, as its client does.", {200: "text/event-stream"},
            query=EventsQuery, problems=(400, 404), role=Role.VIEWER,
            headers={"Last-Event-ID": "Id of the last event seen: go on after it."},
        ),
        Operation(
            "POST", f"{one}/cancel", "admin_cancel_job", views.cancel,
            "Cancel: 200 when it has ended by it, 202 when its worker will end it.",
            {200: AdminJob, 202: AdminJob}, problems=(404, 409), role=Role.OPERATOR,
            action="job.cancel",
        ),
        Operation(
            "POST", f"{one}/retry", "admin_retry_job", views.retry,
            "Make a new job of one that failed, was canceled or expired.", {202: AdminJob},
            problems=(404, 409), role=Role.OPERATOR, action="job.retry",
        ),
        Operation(
            "POST", f"{one}/clone", "admin_clone_job", views.clone,
            "Make a new job of any, with edits.", {202: AdminJob}, body=CloneRequest,
            problems=(400, 404, 413, 415, 422), role=Role.OPERATOR, action="job.clone",
        ),
        Operation(
            "POST", f"{one}/priority", "admin_move_job", views.priority,
            "Give a queued job another priority.", {200: AdminJob}, body=PriorityRequest,
            problems=(400, 404, 409, 413, 415), role=Role.OPERATOR, action="job.priority",
        ),
    ]  # fmt: skip
