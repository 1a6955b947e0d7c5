"""Operators: who may log in, with which role.

Every change ends the operator's sessions (contract.operators), here at once.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from flask import Response, g
from pydantic import BaseModel, ConfigDict, Field

from headrace.contract.operators import Operators
from headrace.contract.roles import Role
from headrace.gateway.dashboard.frame import render
from headrace.gateway.dashboard.keys import RoleName
from headrace.gateway.dashboard.reading import json_body
from headrace.gateway.jobs import json_response
from headrace.gateway.openapi import Operation
from headrace.gateway.services import Services


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OperatorRequest(_Request):
    """An operator to make."""

    name: str = Field(description="1 to 64 of a-z, 0-9, . _ -")
    password: str = Field(description="12 to 1,024 characters.")
    role: RoleName


class PasswordRequest(_Request):
    password: str = Field(description="12 to 1,024 characters.")


class RoleRequest(_Request):
    role: RoleName


class Operator(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    role: RoleName
    created_at: datetime
    disabled_at: datetime | None
    last_login_at: datetime | None
    num_failures: int = Field(description="Wrong passwords since the last login.")
    locked_until: datetime | None


class OperatorList(BaseModel):
    model_config = ConfigDict(extra="forbid")

    operators: list[Operator]


class OperatorArea:
    """What can be done with operators."""

    def __init__(self, operators: Operators, forget_sessions: Callable[[], None]) -> None:
        self._operators = operators
        self._forget_sessions = forget_sessions

    def list(self) -> dict[str, Any]:
        return {"operators": [_shown(row) for row in self._operators.list()]}

    def create(self, wanted: OperatorRequest) -> dict[str, Any]:
        role = Role(wanted.role)
        row = self._operators.create(name=wanted.name, password=wanted.password, role=role)
        return _shown(row)

    def disable(self, name: str) -> dict[str, Any]:
        self._operators.disable(name)
        return self._changed(name)

    def enable(self, name: str) -> dict[str, Any]:
        """Let a disabled operator log in again; also ends a lock."""
        self._operators.enable(name)
        return self._changed(name)

    def set_password(self, name: str, password: str) -> dict[str, Any]:
        self._operators.set_password(name, password)
        return self._changed(name)

    def set_role(self, name: str, role: Role) -> dict[str, Any]:
        self._operators.set_role(name, role)
        return self._changed(name)

    def _changed(self, name: str) -> dict[str, Any]:
        self._forget_sessions()
        return _shown(self._operators.operator(name))


def _shown(row: Any) -> dict[str, Any]:
    """Return the operator without a lock that is over."""
    locked_until = row["locked_until"]
    is_over = locked_until is not None and locked_until < datetime.now(UTC)
    return {**row, "locked_until": None if is_over else locked_until}


class OperatorRoutes:
    """The views of operators."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._area = OperatorArea(services.operators, services.sessions.forget)

    def list(self) -> Response:
        return json_response(self._area.list())

    def create(self) -> Response:
        wanted = json_body(OperatorRequest, self._settings)
        g.audit_target, g.audit_details = wanted.name, {"role": wanted.role}
        return json_response(self._area.create(wanted), status=201)

    def disable(self, name: str) -> Response:
        return json_response(self._area.disable(name))

    def enable(self, name: str) -> Response:
        return json_response(self._area.enable(name))

    def password(self, name: str) -> Response:
        wanted = json_body(PasswordRequest, self._settings)
        return json_response(self._area.set_password(name, wanted.password))

    def role(self, name: str) -> Response:
        wanted = json_body(RoleRequest, self._settings)
        g.audit_details = {"role": wanted.role}
        return json_response(self._area.set_role(name, Role(wanted.role)))

    def page(self) -> Response:
        return render("operators.html", roles=list(Role), **self._area.list())


def operations(services: Services) -> list[Operation]:
    routes = OperatorRoutes(services)
    return [
        Operation(
            "GET", "/v1/admin/operators", "admin_list_operators", routes.list,
            "List all operators by name.", {200: OperatorList}, role=Role.ADMIN,
        ),
        Operation(
            "POST", "/v1/admin/operators", "admin_create_operator", routes.create,
            "Make an operator.", {201: Operator}, body=OperatorRequest,
            problems=(400, 409, 413, 415), role=Role.ADMIN, action="operator.create",
        ),
        *(
            Operation(
                "POST", f"/v1/admin/operators/<name>/{verb}", f"admin_operator_{verb}", view,
                summary, {200: Operator}, body=body, problems=(400, 404, 409, 413, 415),
                role=Role.ADMIN, action=f"operator.{verb}",
            )
            for verb, view, summary, body in (
                ("disable", routes.disable, "Log out, and let nobody log in as it.", None),
                ("enable", routes.enable, "Let a disabled or locked one log in again.", None),
                ("password", routes.password, "Give a new password.", PasswordRequest),
                ("role", routes.role, "Give another role.", RoleRequest),
            )
        ),
    ]  # fmt: skip


def page_operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET", "/dashboard/operators", "operators_page", OperatorRoutes(services).page,
            "Operators.", {200: "text/html"}, role=Role.ADMIN, is_page=True,
        ),
    ]  # fmt: skip
