"""Operators of the tests: one a role, logged in, as browsers are."""

from __future__ import annotations

from dataclasses import dataclass

from flask import Flask
from flask.testing import FlaskClient

from headrace.contract.operators import NewSession
from headrace.contract.roles import Role
from headrace.gateway.app import services_of
from headrace.gateway.dashboard.guard import csrf_token
from headrace.gateway.openapi import SESSION_COOKIE

PASSWORD = "correct horse battery"


def make_operator(app: Flask, name: str, role: Role) -> NewSession:
    """Make an operator and log it in."""
    operators = services_of(app).operators
    operators.create(name=name, password=PASSWORD, role=role)
    return operators.login(name, PASSWORD, "127.0.0.1")


@dataclass(frozen=True, slots=True)
class Browser:
    """A client with a session's cookie, which sends what the dashboard's pages send."""

    client: FlaskClient
    session: NewSession

    @property
    def headers(self) -> dict[str, str]:
        token = csrf_token(self.session.token)
        return {"Sec-Fetch-Site": "same-origin", "X-CSRF-Token": token}

    def get(self, path: str, **options):
        return self.client.get(path, **options)

    def post(self, path: str, **options):
        headers = self.headers | options.pop("headers", {})
        return self.client.post(path, headers=headers, **options)


def browser_of(app: Flask, session: NewSession) -> Browser:
    client = app.test_client()
    client.set_cookie(SESSION_COOKIE, session.token)
    return Browser(client, session)
