"""The pages of jobs: the search with its bulk panel, and one job with its timeline.

Each page shows what the JSON view of the same name answers; what they do, static/jobs.js sends to
the JSON views. A search that is refused is shown with the form, so that it can be corrected.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

from flask import Response, request

from headrace.contract.errors import HeadraceError
from headrace.contract.roles import Role
from headrace.gateway.dashboard.frame import render
from headrace.gateway.dashboard.job_schemas import JobCriteria, JobSearchQuery
from headrace.gateway.dashboard.jobs import Jobs
from headrace.gateway.openapi import Operation
from headrace.gateway.refusals import validate_query
from headrace.gateway.services import Services

PATH = "/dashboard/jobs"
#: Width of the timeline in its own units; a span is never thinner than MIN_WIDTH of them.
WIDTH = 1000
MIN_WIDTH = 3

STATUSES = ("queued", "running", "succeeded", "failed", "canceled", "expired")
_FIELDS = tuple(JobCriteria.model_fields)


class JobPages:
    """The views of the pages."""

    def __init__(self, services: Services) -> None:
        self._jobs = Jobs(services)

    def search(self) -> Response:
        page: dict[str, Any] = {"jobs": [], "next_cursor": None}
        problem, criteria, status = None, {}, 200
        try:
            query = validate_query(JobSearchQuery, request.args)
            criteria = query.model_dump(mode="json", include=set(_FIELDS), exclude_none=True)
            page = self._jobs.search(query)
        except HeadraceError as error:
            problem, status = {"code": error.code, "detail": error.detail}, error.http_status
        asked = {name: request.args.get(name, "") for name in _FIELDS}
        return render(
            "jobs.html",
            status=status,
            page=page,
            problem=problem,
            asked=asked,
            next_url=_next_url(asked, page["next_cursor"]),
            criteria=json.dumps(criteria),
            has_criteria=bool(criteria),
            statuses=STATUSES,
        )

    def show(self, job_id: str) -> Response:
        job = self._jobs.detail(job_id)
        return render(
            "job.html",
            job=job,
            bars=_bars(job["timeline"]),
            width=WIDTH,
            total_ms=sum(span["duration_ms"] for span in job["timeline"]),
            is_open=job["status"] in ("queued", "running"),
            is_retryable=job["status"] in ("failed", "canceled", "expired"),
            text=(job["output"] or {}).get("text", ""),
        )


def _next_url(asked: dict[str, str], cursor: str | None) -> str | None:
    if cursor is None:
        return None
    given = {name: value for name, value in asked.items() if value}
    return f"{PATH}?{urlencode(given | {'cursor': cursor})}"


def _bars(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the spans with their places in the picture."""
    total_ms = sum(span["duration_ms"] for span in spans) or 1.0
    bars: list[dict[str, Any]] = []
    for span in spans:
        width = max(MIN_WIDTH, round(span["duration_ms"] / total_ms * WIDTH, 1))
        left = min(WIDTH - width, round(span["start_ms"] / total_ms * WIDTH, 1))
        bars.append(span | {"x": left, "width": width})
    return bars


def page_operations(services: Services) -> list[Operation]:
    pages = JobPages(services)
    return [
        Operation(
            "GET", PATH, "jobs_page", pages.search, "Search jobs.", {200: "text/html"},
            role=Role.VIEWER, is_page=True,
        ),
        Operation(
            "GET", f"{PATH}/<job_id>", "job_page", pages.show, "One job.", {200: "text/html"},
            role=Role.VIEWER, is_page=True,
        ),
    ]  # fmt: skip
