"""The audit log, to read: who did what, newest first.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from urllib.parse import urlencode

from flask import Response, request
from pydantic import BaseModel, ConfigDict, Field

from headrace.contract.audit import Audit
from headrace.contract.errors import InvalidCursor
from headrace.contract.roles import Role
from headrace.gateway.dashboard.frame import render
from headrace.gateway.dashboard.keys import RoleName
from headrace.gateway.jobs import json_response
from headrace.gateway.openapi import Operation
from headrace.gateway.refusals import validate_query
from headrace.gateway.services import Services

#: The largest id a row can have.
_MAX_ID = (1 << 63) - 1


class AuditQuery(BaseModel):
    """Which rows, newest first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    actor: str | None = Field(default=None, max_length=200, description="A name, or a key's id.")
    action: str | None = Field(default=None, max_length=200, description="Such as worker.drain.")
    outcome: str | None = Field(default=None, max_length=200, description="done, or a code.")
    limit: int = Field(default=50, ge=1, le=500)
    cursor: str | None = Field(default=None, description="`next_cursor` of the page before.")


class AuditRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: int
    at: datetime
    actor: str = Field(description="An operator's name or a key's id; ?: nobody known.")
    actor_kind: Literal["operator", "key", "nobody"]
    role: RoleName | None
    action: str
    target: str
    outcome: str = Field(description="done, the code of the refusal, or begun: end not known.")
    details: dict[str, Any]
    address: str | None


class AuditPage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    audit: list[AuditRow]
    next_cursor: str | None


class AuditArea:
    """What can be read of the audit log."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    def page(self, query: AuditQuery) -> dict[str, Any]:
        rows = self._audit.page(
            limit=query.limit + 1,  # one more says whether there is a next page
            before=None if query.cursor is None else _before(query.cursor),
            actor=query.actor,
            action=query.action,
            outcome=query.outcome,
        )
        page = [{("at" if k == "created_at" else k): v for k, v in row.items()} for row in rows]
        has_more = len(page) > query.limit
        page = page[: query.limit]
        return {"audit": page, "next_cursor": str(page[-1]["id"]) if has_more else None}


def _before(cursor: str) -> int:
    is_id = cursor.isascii() and cursor.isdigit() and len(cursor) <= 19
    if not is_id or int(cursor) > _MAX_ID:
        raise InvalidCursor(
            f"cursor {cursor[:60]!r} is not one of ours: send the `next_cursor` of a page, or none"
        )
    return int(cursor)


class AuditRoutes:
    """The views of the audit log."""

    def __init__(self, services: Services) -> None:
        self._area = AuditArea(services.audit)

    def list(self) -> Response:
        return json_response(self._area.page(validate_query(AuditQuery, request.args)))

    def page(self) -> Response:
        # An empty field of the page's form is no filter.
        given = request.args.copy()
        for name in [name for name, value in given.items() if not value]:
            del given[name]
        query = validate_query(AuditQuery, given)
        found = self._area.page(query)
        older = None
        if found["next_cursor"] is not None:
            fields = query.model_dump(exclude_none=True) | {"cursor": found["next_cursor"]}
            older = f"{request.path}?{urlencode(fields)}"
        return render("audit.html", query=query, rows=found["audit"], older=older)


def operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET", "/v1/admin/audit", "admin_audit", AuditRoutes(services).list,
            "List what was done to the fleet, newest first.", {200: AuditPage},
            query=AuditQuery, problems=(400,), role=Role.ADMIN,
        ),
    ]  # fmt: skip


def page_operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET", "/dashboard/audit", "audit_page", AuditRoutes(services).page,
            "The audit log.", {200: "text/html"}, role=Role.ADMIN, is_page=True,
        ),
    ]  # fmt: skip
