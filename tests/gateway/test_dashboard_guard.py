"""Who may do what: roles, sessions, CSRF, and the audit row of each action."""

from __future__ import annotations

import logging
import re
import time

import pytest
from flask import Flask, g

from headrace.contract.audit import Audit
from headrace.contract.errors import Conflict, DatabaseUnavailable
from headrace.contract.roles import Role
from headrace.gateway.app import create_app, services_of
from headrace.gateway.dashboard import guard
from headrace.gateway.openapi import SESSION_COOKIE
from headrace.gateway.routes import route_table
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.operators import PASSWORD, Browser, browser_of, make_operator
from headrace.tests.gateway.test_bad_input import check_problem

#: An action without a body, which any operator may do.
ACTION = "/dashboard/logout"


@pytest.fixture(scope="module")
def sessions(app):
    return {role: make_operator(app, f"the-{role}", role) for role in Role}


@pytest.fixture
def browser(app, sessions) -> Browser:
    return browser_of(app, sessions[Role.VIEWER])


@pytest.fixture(scope="module")
def bare(settings, sessions):
    """An app whose views do nothing: what is left is the guard."""
    app = create_app(settings)
    for name in app.view_functions:
        app.view_functions[name] = lambda **_: ("", 204)
    yield app
    services_of(app).close()


def rows(services, action: str = "logout") -> list:
    return list(services.audit.page(limit=100, action=action))


# -- roles -----------------------------------------------------------------------------------


def operations(app: Flask):
    for op in route_table(services_of(app)):
        if not op.is_open:
            yield op, re.sub(r"<[^>]+>", "some-name", op.path)


@pytest.mark.parametrize("role", list(Role))
def test_a_sessions_role_opens_what_it_should_and_nothing_else(bare, sessions, role):
    browser = browser_of(bare, sessions[role])
    for op, path in operations(bare):
        answer = browser.client.open(path, method=op.method, headers=browser.headers)
        if op.role is None:
            wanted = 401  # a tenant's path: a session is no key
        else:
            wanted = 204 if role.includes(op.role) else 403
        assert answer.status_code == wanted, (op.method, op.path)


@pytest.mark.parametrize("role", [None, *Role])
def test_a_keys_role_opens_what_it_should_and_nothing_else(bare, role):
    accounts = services_of(bare).accounts
    client = client_of(bare, accounts.create_key(tenant="roles", name="k", role=role))
    for op, path in operations(bare):
        answer = client.open(path, method=op.method)  # neither Origin nor token: it is no browser
        is_wanted = op.role is None or (role is not None and role.includes(op.role))
        assert answer.status_code == (204 if is_wanted else 403), (op.method, op.path)


def test_nobody_gets_in_anywhere(bare):
    client = bare.test_client()
    for op, path in operations(bare):
        answer = client.open(path, method=op.method)
        if op.is_page and op.method == "GET":
            assert (answer.status_code, answer.location) == (303, f"/dashboard/login?next={path}")
        else:
            assert answer.status_code == 401, (op.method, op.path)


def test_every_operation_that_changes_something_is_an_action(bare):
    for op, _ in operations(bare):
        if op.role is not None:
            assert (op.method != "GET") is (op.action is not None), op.name


def test_a_key_without_a_role_is_told_how_to_get_one(client):
    problem = check_problem(client.get("/v1/admin/me"), 403, "forbidden")
    assert "--role" in problem["detail"]


def test_a_session_says_who_it_is(app, sessions):
    for role in Role:
        answer = browser_of(app, sessions[role]).get("/v1/admin/me")
        assert answer.get_json() == {"name": f"the-{role}", "kind": "operator", "role": role}


# -- sessions --------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "x", "A" * 43, "'; --", "\x7f" * 50, "ü" * 43])
def test_other_cookies_are_nobodys(app, token):
    client = app.test_client()
    answer = client.get("/v1/admin/me", headers={"Cookie": f"{SESSION_COOKIE}={token}"})
    check_problem(answer, 401, "unauthenticated")


def test_a_session_ended_elsewhere_works_no_longer_than_the_cache(app, services, monkeypatch):
    session = make_operator(app, "ended", Role.VIEWER)
    browser = browser_of(app, session)
    assert browser.get("/v1/admin/me").status_code == 200
    services.operators.logout(session.token)
    now = time.monotonic()
    monkeypatch.setattr(guard.time, "monotonic", lambda: now + guard.CACHE_S + 1)
    check_problem(browser.get("/v1/admin/me"), 401, "unauthenticated")


def test_a_known_session_costs_no_look_up_and_the_memory_is_bounded(
    app, services, browser, monkeypatch
):
    assert browser.get("/v1/admin/me").status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(type(services.operators), "session", lambda *_: pytest.fail("asked"))
        assert browser.get("/v1/admin/me").status_code == 200
    monkeypatch.setattr(guard, "MAX_CACHED", 2)
    memory = guard.SessionGuard(services.operators)
    services.operators.create(name="often", password=PASSWORD, role=Role.VIEWER)
    for _ in range(4):
        session = services.operators.login("often", PASSWORD, None)
        assert memory.session(session.token) is not None
        assert len(memory._known) <= 2


# -- CSRF ------------------------------------------------------------------------------------

HOST = "localhost"  # of the test client


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": f"http://{HOST}"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Sec-Fetch-Site": ""}, False),
        ({"Origin": f"http://{HOST}"}, True),
        ({"Origin": f"https://{HOST}"}, True),  # the proxy in front speaks https
        ({"Origin": f"http://{HOST}.evil.example"}, False),
        ({"Origin": f"http://evil.example/{HOST}"}, False),
        ({"Origin": f"http://{HOST}:81"}, False),
        ({"Origin": "http://[::1"}, False),
        ({"Origin": "null"}, False),
        ({"Referer": f"http://{HOST}/dashboard"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("token", ["own", "none", "empty", "another's", "form"])
def test_a_change_needs_our_origin_and_the_sessions_token(
    bare, sessions, headers, is_let_in, token
):
    own = guard.csrf_token(sessions[Role.ADMIN].token)
    other = guard.csrf_token(sessions[Role.VIEWER].token)
    sent = {"own": own, "empty": "", "another's": other}.get(token)
    data = {"csrf_token": own} if token == "form" else None
    headers = headers if sent is None else {**headers, "X-CSRF-Token": sent}
    client = browser_of(bare, sessions[Role.ADMIN]).client
    answer = client.post(ACTION, headers=headers, data=data)
    is_let_in = is_let_in and token in ("own", "form")
    assert answer.status_code == (204 if is_let_in else 403)
    if not is_let_in:
        assert "Csrf refused" in answer.get_data(as_text=True)
        assert own not in answer.get_data(as_text=True)


def test_a_form_that_is_too_large_is_refused_and_audited(bare, sessions):
    client = browser_of(bare, sessions[Role.ADMIN]).client
    headers = {"Sec-Fetch-Site": "same-origin"}
    answer = client.post(ACTION, headers=headers, data={"x": "y" * 70_000})
    assert answer.status_code == 413
    assert rows(services_of(bare))[0]["outcome"] == "body_too_large"


def test_reading_needs_no_token(bare, sessions):
    client = browser_of(bare, sessions[Role.VIEWER]).client
    for method in ("GET", "HEAD"):
        answer = client.open("/v1/admin/me", method=method, headers={"Sec-Fetch-Site": "none"})
        assert answer.status_code == 204


# -- audit -----------------------------------------------------------------------------------


def test_an_action_is_audited_with_its_outcome(bare, sessions):
    services = services_of(bare)
    before = len(rows(services))
    browser = browser_of(bare, sessions[Role.OPERATOR])
    assert browser.post(ACTION).status_code == 204
    row = rows(services)[0]
    assert len(rows(services)) == before + 1
    assert (row["actor"], row["actor_kind"], row["role"]) == (
        "the-operator",
        "operator",
        "operator",
    )
    assert (row["outcome"], row["address"], row["details"]) == ("done", "127.0.0.1", {})


def test_what_the_view_says_of_its_action_is_in_the_row(bare, sessions, monkeypatch):
    def refuse(**_: str):
        g.audit_target = "a\x00target <script>" + "x" * 300
        g.audit_details = {"num_jobs": 3, "text": "\ud800"}
        raise Conflict("the worker is dead: start it")

    monkeypatch.setitem(bare.view_functions, "logout", refuse)
    assert browser_of(bare, sessions[Role.ADMIN]).post(ACTION).status_code == 409
    row = rows(services_of(bare))[0]
    assert row["outcome"] == "conflict"
    assert row["target"].startswith("a\N{REPLACEMENT CHARACTER}target <script>xx")
    assert len(row["target"]) == 200
    assert row["details"] == {"num_jobs": 3, "text": "\N{REPLACEMENT CHARACTER}"}


def test_an_unforeseen_failure_is_audited_as_internal(bare, sessions, monkeypatch):
    def fail(**_: str):
        raise RuntimeError("a prompt")

    monkeypatch.setitem(bare.view_functions, "logout", fail)
    assert browser_of(bare, sessions[Role.ADMIN]).post(ACTION).status_code == 500
    row = rows(services_of(bare))[0]
    assert row["outcome"] == "internal"
    assert "a prompt" not in str(dict(row))


def test_refusals_of_the_guard_are_audited(bare, sessions):
    services = services_of(bare)
    nobody, browser = bare.test_client(), browser_of(bare, sessions[Role.VIEWER])
    assert nobody.post(ACTION).status_code == 401
    row = rows(services)[0]
    assert (row["actor"], row["actor_kind"], row["outcome"]) == ("?", "nobody", "unauthenticated")
    assert browser.client.post(ACTION).status_code == 403
    row = rows(services)[0]
    assert (row["actor"], row["actor_kind"], row["outcome"]) == (
        "the-viewer", "operator", "csrf_refused",
    )  # fmt: skip
    key = services.accounts.create_key(tenant="audit", name="k")
    assert client_of(bare, key).post(ACTION).status_code == 403
    row = rows(services)[0]
    assert (row["actor"], row["actor_kind"], row["outcome"]) == (key.id, "key", "forbidden")


def test_looking_at_an_actions_options_is_no_action(bare, sessions):
    services = services_of(bare)
    before = len(rows(services))
    browser_of(bare, sessions[Role.ADMIN]).client.options(ACTION)
    assert len(rows(services)) == before


def test_nobody_cannot_fill_the_table(settings, monkeypatch):
    monkeypatch.setattr(guard, "NOBODY_PER_MIN", 3)
    app = create_app(settings)
    services, client = services_of(app), app.test_client()
    before = len(rows(services))
    for _ in range(6):
        assert client.post(ACTION).status_code == 401
    assert len(rows(services)) == before + 3
    services.close()


def test_invariant_1_an_action_that_cannot_be_recorded_is_not_done(bare, sessions, monkeypatch):
    def away(*_):
        raise DatabaseUnavailable("write audit: Postgres did not answer: try again in a second")

    monkeypatch.setattr(Audit, "write", away)
    monkeypatch.setitem(bare.view_functions, "logout", lambda: pytest.fail("it was done"))
    assert browser_of(bare, sessions[Role.ADMIN]).post(ACTION).status_code == 503


def test_invariant_2_an_end_that_cannot_be_written_is_logged(
    bare, sessions, services, monkeypatch, caplog
):
    def away(*_):
        raise DatabaseUnavailable("end audit: Postgres did not answer: try again in a second")

    monkeypatch.setattr(Audit, "end", away)
    with caplog.at_level(logging.INFO, logger="headrace"):
        assert browser_of(bare, sessions[Role.ADMIN]).post(ACTION).status_code == 204
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("action.audited") and "outcome=done" in line for line in said)
    assert any(line.startswith("audit.left_begun") for line in said)
    assert rows(services)[0]["outcome"] == "begun"
