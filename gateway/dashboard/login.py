"""Logging in and out, saying who one is, and changing one's own password.

Invariants:
1. A login is taken only from our own page (guard.check_origin), and makes a new session; the one
   the browser brought ends.
2. Each try is in the audit log, with a name only if an operator has it: people type passwords into
   the wrong field.
3. The cookie is HttpOnly, SameSite=Strict, for the whole host, Secure where the request came by
   https, and goes with the browser or after SESSION_S.
4. One's own password is changed by whoever knows the old one; wrong ones count as failed logins.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

from typing import Literal

from flask import Response, g, redirect, request
from pydantic import BaseModel, ConfigDict, Field

from headrace.contract.audit import DONE, Entry
from headrace.contract.errors import (
    Forbidden,
    HeadraceError,
    LockedOut,
    LoginRefused,
    WrongPassword,
)
from headrace.contract.operators import SESSION_S, NewSession, check_name
from headrace.contract.roles import Role
from headrace.gateway.dashboard.actor import Actor
from headrace.gateway.dashboard.frame import render
from headrace.gateway.dashboard.guard import LOGIN_PATH, AuditTrail, check_origin
from headrace.gateway.dashboard.reading import form_fields, json_body
from headrace.gateway.jobs import json_response
from headrace.gateway.openapi import SESSION_COOKIE, Operation
from headrace.gateway.services import Services

HOME = "/dashboard"


class Me(BaseModel):
    """Who asks."""

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: Literal["operator", "key"]
    role: Role


class OwnPasswordRequest(BaseModel):
    """A new password for whoever asks."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    password: str = Field(description="The password that is to be changed.")
    new_password: str = Field(description="12 to 1,024 characters.")


class LoginRoutes:
    """The views of login, logout and oneself."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._trail = AuditTrail(services.audit)

    def page(self) -> Response:
        wanted = request.args.get("next", "")
        token = request.cookies.get(SESSION_COOKIE)
        if token is not None and self._services.sessions.session(token) is not None:
            return _see(safe_path(wanted))
        return _login_page(wanted)

    def login(self) -> Response:
        check_origin(request)
        fields = form_fields()
        name, password = fields.get("name", ""), fields.get("password", "")
        try:
            session = self._services.operators.login(name, password, request.remote_addr)
        except HeadraceError as error:
            if isinstance(error, LoginRefused | LockedOut):
                self._record(self._known(name), error.code)
            return _login_page(fields.get("next", ""), name=name, error=error)
        self._record(session, DONE)
        if old := request.cookies.get(SESSION_COOKIE):
            self._services.sessions.end(old)
        response = _see(safe_path(fields.get("next", "")))
        _set_cookie(response, session.token, max_age=SESSION_S)
        return response

    def logout(self) -> Response:
        if token := request.cookies.get(SESSION_COOKIE):
            self._services.sessions.end(token)
        response = _see(LOGIN_PATH)
        _set_cookie(response, "", max_age=0)
        return response

    def me(self) -> Response:
        actor: Actor = g.actor
        return json_response(_me(actor))

    def own_password(self) -> Response:
        actor: Actor = g.actor
        wanted = json_body(OwnPasswordRequest, self._services.settings)
        if actor.kind != "operator":
            raise Forbidden("a key has no password: log in as the operator whose it is")
        try:
            self._services.operators.change_password(
                actor.name, wanted.password, wanted.new_password
            )
        except LoginRefused as refused:  # whoever asks is logged in: this is no 401
            raise WrongPassword(
                "password: it is not the one you have: type it again (wrong ones lock the name)"
            ) from refused
        self._services.sessions.forget()
        response = json_response(_me(actor))
        _set_cookie(response, "", max_age=0)
        return response

    def account_page(self) -> Response:
        return render("account.html")

    def _known(self, name: str) -> str | None:
        try:
            check_name(name)
            return self._services.operators.operator(name)["name"]
        except HeadraceError:  # no such operator, or Postgres is away by now
            return None

    def _record(self, who: NewSession | str | None, outcome: str) -> None:
        if isinstance(who, NewSession):
            actor, kind, role = who.operator, "operator", who.role
        else:  # whoever it was has not shown to be that operator
            actor, kind, role = who or "?", "nobody", None
        self._trail.write(Entry(actor, kind, role, "login", request.remote_addr), outcome)


def _me(actor: Actor) -> dict[str, str]:
    return {"name": actor.name, "kind": actor.kind, "role": actor.role}


def safe_path(path: str) -> str:
    """Return where to go after the login: a page of the dashboard, whatever the link said."""
    is_ours = path == HOME or path.startswith((HOME + "/", HOME + "?"))
    is_plain = path.isascii() and path.isprintable() and not {"\\", " "} & set(path)
    return path if is_ours and is_plain and not path.startswith(LOGIN_PATH) else HOME


def _login_page(wanted: str, *, name: str = "", error: HeadraceError | None = None) -> Response:
    status = 200 if error is None else error.http_status
    detail = None if error is None else error.detail
    response = render(
        "login.html", status=status, next=safe_path(wanted), name=name[:64], problem=detail
    )
    if error is not None and error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def _see(path: str) -> Response:
    response = redirect(path, 303)
    response.headers["Cache-Control"] = "no-store"
    assert isinstance(response, Response)
    return response


def _set_cookie(response: Response, value: str, *, max_age: int) -> None:
    response.set_cookie(
        SESSION_COOKIE,
        value,
        max_age=max_age,
        path="/",
        httponly=True,
        samesite="Strict",
        secure=request.is_secure,
    )


def operations(services: Services) -> list[Operation]:
    routes = LoginRoutes(services)
    return [
        Operation(
            "GET", "/v1/admin/me", "admin_me", routes.me, "Say who asks, and with which role.",
            {200: Me}, role=Role.VIEWER,
        ),
        Operation(
            "POST", "/v1/admin/me/password", "admin_own_password", routes.own_password,
            "Change one's own password; ends one's sessions.", {200: Me}, body=OwnPasswordRequest,
            problems=(400, 413, 415, 429), role=Role.VIEWER, action="operator.own_password",
        ),
    ]  # fmt: skip


def page_operations(services: Services) -> list[Operation]:
    routes = LoginRoutes(services)
    return [
        Operation(
            "GET", LOGIN_PATH, "login_page", routes.page, "Where one logs in.",
            {200: "text/html"}, is_open=True, is_page=True,
        ),
        Operation(
            "POST", LOGIN_PATH, "login", routes.login, "Log in.", {303: "text/html"},
            is_open=True, is_page=True,
        ),
        Operation(
            "GET", "/dashboard/account", "account_page", routes.account_page,
            "One's own account.", {200: "text/html"}, role=Role.VIEWER, is_page=True,
        ),
        Operation(
            "POST", "/dashboard/logout", "logout", routes.logout, "Log out.", {303: "text/html"},
            role=Role.VIEWER, action="logout", is_page=True,
        ),
    ]  # fmt: skip
