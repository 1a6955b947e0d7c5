"""Logging in and out with the form, as a browser does."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import httpx
import pytest
from sqlalchemy import text

from headrace.contract.passwords import Passwords
from headrace.contract.roles import Role
from headrace.gateway.app import create_app, services_of
from headrace.gateway.openapi import SESSION_COOKIE
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.operators import PASSWORD, browser_of, make_operator
from headrace.tests.gateway.test_bad_input import check_problem
from headrace.tests.gateway.test_server import running_gateway

SAME_ORIGIN = {"Sec-Fetch-Site": "same-origin"}
HOSTILE = """"><script>alert(1)</script><img src=x onerror=alert(1)>"""


@pytest.fixture(scope="module")
def operator(app):
    return make_operator(app, "ada", Role.OPERATOR)


@pytest.fixture
def client(app, operator):
    return app.test_client()


def log_in(client, name: str = "ada", password: str = PASSWORD, **fields: str):
    data = {"name": name, "password": password, **fields}
    return client.post("/dashboard/login", data=data, headers=SAME_ORIGIN)


def last_row(services) -> dict:
    return dict(services.audit.page(limit=1)[0])


def test_a_login_leads_to_the_dashboard_with_a_session(client, services):
    page = client.get("/dashboard/login")
    assert page.status_code == 200
    assert "<nav" not in page.text
    answer = log_in(client)
    assert (answer.status_code, answer.location) == (303, "/dashboard")
    assert client.get("/v1/admin/me").get_json()["name"] == "ada"
    row = last_row(services)
    assert (row["actor"], row["actor_kind"], row["role"]) == ("ada", "operator", "operator")
    assert (row["action"], row["outcome"], row["address"]) == ("login", "done", "127.0.0.1")


def test_the_cookie_can_neither_be_read_by_scripts_nor_sent_by_other_sites(client):
    cookie = log_in(client).headers["Set-Cookie"]
    name, *attributes = [part.strip() for part in cookie.split(";")]
    assert re.fullmatch(rf"{SESSION_COOKIE}=[A-Za-z0-9_-]{{43}}", name)
    kept = {part.split("=")[0] for part in attributes} - {"Expires"}
    assert kept == {"HttpOnly", "SameSite", "Path", "Max-Age"}
    assert {"SameSite=Strict", "Path=/", "Max-Age=43200"} <= set(attributes)


@pytest.mark.parametrize(
    ("is_behind_proxy", "proto", "is_secure"),
    [(True, "https", True), (True, "http", False), (False, "https", False)],
)
def test_the_cookie_is_secure_where_the_request_came_by_https(
    settings, operator, is_behind_proxy, proto, is_secure
):
    app = create_app(settings.model_copy(update={"behind_proxy": is_behind_proxy}))
    answer = app.test_client().post(
        "/dashboard/login",
        data={"name": "ada", "password": PASSWORD},
        headers=SAME_ORIGIN | {"X-Forwarded-Proto": proto, "X-Forwarded-For": "9.9.9.9, 10.1.2.3"},
    )
    assert ("Secure" in answer.headers["Set-Cookie"]) is is_secure
    address = last_row(services_of(app))["address"]
    assert address == ("10.1.2.3" if is_behind_proxy else "127.0.0.1")
    services_of(app).close()


def test_a_session_that_a_browser_brought_is_not_taken_over(client, services):
    client.set_cookie(SESSION_COOKIE, "A" * 43)
    log_in(client)
    first = client.get_cookie(SESSION_COOKIE).value
    assert first != "A" * 43
    log_in(client)
    second = client.get_cookie(SESSION_COOKIE).value
    assert second != first
    assert services.operators.session(first) is None
    assert services.operators.session(second) is not None


@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("ada", "wrong password"),
        ("ada", ""),
        ("ada", PASSWORD + "\x7f"),
        ("ada", "x" * 5000),
        ("nobody-here", PASSWORD),
        (HOSTILE, PASSWORD),
        ("", ""),
        ("ADA", PASSWORD),
    ],
)
def test_wrong_words_are_refused_alike_and_said_on_the_page(client, services, name, password):
    services.operators.enable("ada")  # the tries of other cases are forgotten
    answer = log_in(client, name, password)
    assert answer.status_code == 401
    assert "name and password do not belong together" in answer.text
    assert "WWW-Authenticate" not in answer.headers
    assert "Set-Cookie" not in answer.headers
    assert "<script>alert" not in answer.text
    assert "onerror=alert(1)>" not in answer.text
    assert password == "" or password not in answer.text
    row = last_row(services)
    assert (row["actor"], row["actor_kind"]) == ("ada" if name == "ada" else "?", "nobody")
    assert row["outcome"] == "login_refused"
    assert name in ("ada", "") or name not in str(row)


def test_five_wrong_passwords_lock_the_name_also_for_the_right_one(app, client, services):
    make_operator(app, "locked", Role.VIEWER)
    for _ in range(5):
        assert log_in(client, "locked", "wrong password").status_code == 401
    answer = log_in(client, "locked")
    assert answer.status_code == 429
    assert 50 <= int(answer.headers["Retry-After"]) <= 60
    assert "locked" in answer.text
    row = last_row(services)
    assert (row["actor"], row["outcome"]) == ("locked", "locked_out")


def test_more_passwords_than_a_process_checks_at_once_come_back_later(client, services):
    passwords: Passwords = services.operators._passwords
    with passwords.slot(), passwords.slot():
        answer = log_in(client)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert log_in(client).status_code == 303


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_another_sites_page_cannot_log_a_browser_in(client, site):
    answer = client.post(
        "/dashboard/login",
        data={"name": "ada", "password": PASSWORD},
        headers={"Sec-Fetch-Site": site},
    )
    assert answer.status_code == 403
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", ""])
def test_a_login_is_a_form_of_few_bytes(client, kind):
    answer = client.post(
        "/dashboard/login", data=b"{}", headers=SAME_ORIGIN | {"Content-Type": kind}
    )
    assert answer.status_code == 415
    assert log_in(client, password="x" * 100_000).status_code == 413


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("/dashboard/jobs?status=failed", "/dashboard/jobs?status=failed"),
        ("/dashboard", "/dashboard"),
        ("https://evil.example/dashboard", "/dashboard"),
        ("//evil.example", "/dashboard"),
        ("/dashboard.evil.example", "/dashboard"),
        ("/\\evil.example", "/dashboard"),
        ("/dashboard/\r\nSet-Cookie: x=y", "/dashboard"),
        ("/dashboard/login", "/dashboard"),
        ("javascript:alert(1)", "/dashboard"),
        ("", "/dashboard"),
    ],
)
def test_the_login_leads_to_a_page_of_the_dashboard_only(client, wanted, path):
    assert log_in(client, next=wanted).location == path
    assert client.get("/dashboard/login", query_string={"next": wanted}).location == path


def test_a_page_without_a_session_leads_to_the_login_and_back(client):
    answer = client.get("/dashboard/audit?actor=ada&action=")
    assert answer.status_code == 303
    page = client.get(answer.location)
    assert 'name="next" value="/dashboard/audit?actor=ada&amp;action="' in page.text


def test_what_a_script_asks_for_without_a_session_is_no_redirect(client):
    assert client.get("/dashboard/audit", headers={"HX-Request": "true"}).status_code == 401


def test_a_logout_ends_the_session_and_its_cookie(app, services):
    session = make_operator(app, "leaving", Role.VIEWER)
    browser = browser_of(app, session)
    assert browser.get("/v1/admin/me").status_code == 200
    answer = browser.post("/dashboard/logout")
    assert (answer.status_code, answer.location) == (303, "/dashboard/login")
    assert "Max-Age=0" in answer.headers["Set-Cookie"]
    assert services.operators.session(session.token) is None
    browser.client.set_cookie(SESSION_COOKIE, session.token)  # a thief's copy
    assert browser.get("/v1/admin/me").status_code == 401
    row = last_row(services)
    assert (row["actor"], row["action"], row["outcome"]) == ("leaving", "logout", "done")


def test_no_password_and_no_token_is_in_the_audit_log(client, services):
    log_in(client)
    log_in(client, PASSWORD.replace(" ", "-"), "whatever it is")  # into the wrong field
    token = client.get_cookie(SESSION_COOKIE).value
    with services.engine.connect() as db:
        everything = str(db.execute(text("SELECT * FROM audit")).all())
    assert PASSWORD not in everything
    assert PASSWORD.replace(" ", "-") not in everything
    assert token not in everything


def test_a_password_is_compared_while_greenlets_go_on():
    # The work waits for a lock that only another greenlet releases: on the loop it never ends.
    script = """
from gevent import monkey
monkey.patch_all()
import gevent
from headrace.gateway.dashboard.threads import run_in_thread
lock = monkey.get_original("_thread", "allocate_lock")()
lock.acquire()
gevent.spawn_later(0.01, lock.release)
print(run_in_thread(lambda: lock.acquire(timeout=20)))
"""
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("is_behind_proxy", [True, False])
def test_gunicorn_too_believes_a_proxy_only_where_there_is_one(
    settings, operator, tmp_path, is_behind_proxy
):
    settings = settings.model_copy(update={"behind_proxy": is_behind_proxy})
    headers = SAME_ORIGIN | {"X-Forwarded-Proto": "https", "X-Forwarded-For": "10.1.2.3"}
    with running_gateway(settings, tmp_path / "log", num_processes=1) as gateway:
        answer = httpx.post(
            f"{gateway.url}/dashboard/login",
            data={"name": "ada", "password": PASSWORD},
            headers=headers,
        )
    assert answer.status_code == 303
    assert ("Secure" in answer.headers["Set-Cookie"]) is is_behind_proxy


# -- one's own password ----------------------------------------------------------------------


def test_ones_own_password_is_changed_and_the_session_ends(app, services):
    grace = browser_of(app, make_operator(app, "grace", Role.VIEWER))
    new = "another horse battery"
    body = {"password": PASSWORD, "new_password": new}
    answer = grace.post("/v1/admin/me/password", json=body)
    assert answer.get_json() == {"name": "grace", "kind": "operator", "role": "viewer"}
    assert f"{SESSION_COOKIE}=;" in answer.headers["Set-Cookie"]
    row = last_row(services)
    assert (row["actor"], row["action"]) == ("grace", "operator.own_password")
    assert (row["outcome"], new in str(row)) == ("done", False)
    assert grace.get("/v1/admin/me").status_code == 401
    assert log_in(app.test_client(), "grace").status_code == 401
    assert log_in(app.test_client(), "grace", new).status_code == 303


def test_a_wrong_old_password_is_no_401_and_ends_no_session(app):
    alan = browser_of(app, make_operator(app, "alan", Role.VIEWER))
    body = {"password": "not this one", "new_password": "another horse battery"}
    check_problem(alan.post("/v1/admin/me/password", json=body), 400, "wrong_password")
    assert alan.get("/v1/admin/me").get_json()["name"] == "alan"
    assert 'name="new_password"' in alan.get("/dashboard/account").text


def test_a_key_has_no_password(app, services):
    made = services.accounts.create_key(tenant="t", name="n", role=Role.ADMIN)
    client = client_of(app, made)
    body = {"password": PASSWORD, "new_password": "another horse battery"}
    check_problem(client.post("/v1/admin/me/password", json=body), 403, "forbidden")
    assert 'name="new_password"' not in client.get("/dashboard/account").text
