"""Jobs over HTTP: accept, show, list, cancel.

Invariants:
1. Accepted means durable (design invariant 1): the 202 is made from the row Postgres committed.
   Redis being away changes nothing about the answer; the relay enqueues the job later.
2. A job of another tenant, one that never was and a malformed id are the same 404.
3. What would only wait is refused before it costs anything (gateway/admission).
4. A job canceled in the queue ends its stream here, because no worker will.

Called by: gateway/routes; find_job also by gateway/sse, hand_over by gateway/dashboard/playground.
"""

from __future__ import annotations

import base64
import binascii
from functools import partial
from typing import Any

import msgspec
from flask import Response, g, request
from sqlalchemy import RowMapping

from headrace.contract import log
from headrace.contract.errors import InvalidCursor, JobAlreadyEnded, NotFound
from headrace.contract.ids import is_job_id
from headrace.contract.ledger import Accepted, Cancel
from headrace.contract.wire import JobStatus
from headrace.gateway.accept_span import accept_span
from headrace.gateway.body import read_json_object
from headrace.gateway.cancel import tell_canceled
from headrace.gateway.intake import checked_idempotency_key, new_row, request_sha256
from headrace.gateway.job_json import job_json
from headrace.gateway.refusals import validate, validate_query
from headrace.gateway.schemas import JobRequest, JobsQuery
from headrace.gateway.services import Services
from headrace.gateway.wait import wait_for_end, wanted_wait_s


class JobRoutes:
    """The views of jobs."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def create(self) -> Response:
        services, settings = self._services, self._services.settings
        key = checked_idempotency_key(request.headers.get("Idempotency-Key"))
        wait_s = wanted_wait_s(request.headers.get("Prefer"), settings.max_wait_s)
        body = read_json_object(
            request,
            max_body_bytes=settings.max_body_bytes,
            max_depth=settings.max_json_depth,
        )
        job = validate(JobRequest, body)
        accepted = self._accept(job, key, request_sha256(body) if key else b"")
        if wait_s is None:
            hand_over(services, accepted)
            return _accepted(accepted.job, accepted)
        with services.follower.follow(accepted.job["model"], accepted.job["id"]) as box:
            hand_over(services, accepted)
            found = accepted.job
            if accepted.is_replay:
                found = services.ledger.job(found["id"]) or found
            is_done = JobStatus(found["status"]).is_terminal
            if not is_done and wait_for_end(box, services.ledger, services.token_log, wait_s):
                found = services.ledger.job(found["id"]) or found
        return _accepted(found, accepted, wait_s)

    def _accept(self, job: JobRequest, key: str | None, sha256: bytes) -> Accepted:
        services, tenant_id = self._services, g.principal.tenant_id
        header = request.headers.get("traceparent")
        find = None if key is None else partial(services.ledger.has_key, tenant_id, key)
        with (
            accept_span(services.traces, header, g.started_s) as span,
            services.admission.place(job, tenant_id, find) as place,
        ):
            row = new_row(job, g.principal, services.cards, services.prompts)
            span.accepted = accepted = services.ledger.accept_job(
                row | {"traceparent": span.traceparent}, idempotency_key=key, request_sha256=sha256
            )
            place.is_accepted = not accepted.is_replay
        return accepted

    def show(self, job_id: str) -> Response:
        return json_response(job_json(find_job(self._services, job_id, with_output=True)))

    def page(self) -> Response:
        query = validate_query(JobsQuery, request.args)
        rows = self._services.ledger.list_jobs(
            g.principal.tenant_id,
            limit=query.limit + 1,  # one more says whether there is a next page
            before=None if query.cursor is None else decode_cursor(query.cursor),
            status=query.status,
            model=query.model,
            job_class=query.job_class,
        )
        page = rows[: query.limit]
        has_more = len(rows) > query.limit
        return json_response(
            {
                "object": "list",
                "data": [job_json(row) for row in page],
                "next_cursor": encode_cursor(page[-1]["id"]) if has_more else None,
            }
        )

    def cancel(self, job_id: str) -> Response:
        services = self._services
        find_job(services, job_id, with_output=False)
        outcome = services.ledger.request_cancel(job_id, tenant_id=g.principal.tenant_id)
        if outcome is Cancel.ENDED:
            raise JobAlreadyEnded(
                f"cancel of {job_id} was asked; it has ended: read it with GET /v1/jobs/{job_id}"
            )
        row = find_job(services, job_id, with_output=True)
        tell_canceled(services, [row])
        log.event("job.cancel_requested", job=job_id, outcome=outcome.value)
        return json_response(job_json(row), status=200 if outcome is Cancel.CANCELED else 202)


def hand_over(services: Services, accepted: Accepted) -> None:
    """Enqueue a job that was committed, unless another request did."""
    if accepted.is_replay:
        return  # the request that made it, or the relay, enqueues it
    row = accepted.job
    services.metrics.jobs_accepted.labels(row["model"], row["job_class"]).inc()
    services.enqueuer.put(row)
    log.event("job.accepted", job=row["id"], model=row["model"], tenant=row["tenant_id"])


def find_job(services: Services, job_id: str, *, with_output: bool) -> RowMapping:
    """Return the asking tenant's job, or raise the one NotFound for every reason."""
    row = None
    if is_job_id(job_id):
        tenant_id = g.principal.tenant_id
        if with_output:
            row = services.ledger.job(job_id, tenant_id=tenant_id)
        else:
            row = services.ledger.summary(job_id, tenant_id=tenant_id)
    if row is None:
        raise NotFound(f"there is no job {job_id[:60]!r} under this key: check the id and the key")
    return row


def encode_cursor(job_id: str) -> str:
    return base64.urlsafe_b64encode(job_id.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> str:
    """Return the job a page begins after."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        job_id = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii")
    except (UnicodeError, binascii.Error):
        job_id = ""
    if not is_job_id(job_id):
        raise InvalidCursor(
            f"cursor {cursor[:60]!r} is not one of ours: send the `next_cursor` of a page, or none"
        )
    return job_id


def json_response(
    data: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    response = Response(msgspec.json.encode(data), status, headers, mimetype="application/json")
    response.headers.setdefault("Cache-Control", "no-store")
    return response


def _accepted(row: RowMapping, accepted: Accepted, wait_s: int | None = None) -> Response:
    """Answer a POST: 200 with the job if it was waited for and has ended, else 202."""
    headers = {"Location": f"/v1/jobs/{row['id']}"}
    if accepted.is_replay:
        headers["Idempotent-Replayed"] = "true"
    if wait_s is not None:
        headers["Preference-Applied"] = f"wait={wait_s}"
    is_done = wait_s is not None and JobStatus(row["status"]).is_terminal
    return json_response(job_json(row), status=200 if is_done else 202, headers=headers)
