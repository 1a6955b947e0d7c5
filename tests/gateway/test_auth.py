"""Keys: every route needs one, except the few that say so."""

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from headrace.contract.accounts import Principal
from headrace.contract.errors import Unauthenticated
from headrace.gateway import auth
from headrace.gateway.routes import route_table
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.test_bad_input import check_problem

OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"}
#: Where one logs in, and what that page is made of.
OPEN_PAGES = {"login_page", "login", "dashboard_asset"}


def test_every_route_answers_401_without_a_key(app: Flask, services):
    client, walked = app.test_client(), set()
    table = {op.name: op for op in route_table(services)}
    for rule in app.url_map.iter_rules():
        op = table[rule.endpoint]
        path = re.sub(r"<[^>]+>", "job_" + "0" * 32, rule.rule)
        for method in rule.methods or ():
            response = client.open(path, method=method)
            if op.is_open:
                wanted = (403,) if (op.name, method) == ("login", "POST") else (200, 404)
                assert response.status_code in wanted, (method, path)
            elif op.is_page and method in ("GET", "HEAD", "OPTIONS"):
                assert response.status_code == 303, (method, path)
                assert response.location.startswith("/dashboard/login?next=/dashboard")
            else:
                assert response.status_code == 401, (method, path)
                if not op.is_page:
                    assert response.headers["WWW-Authenticate"].startswith("Bearer")
                if method not in ("HEAD", "OPTIONS") and not op.is_page:
                    check_problem(response, 401, "unauthenticated")
            response.close()
        walked.add(rule.rule)
    assert walked >= OPEN | {"/v1/jobs", "/v1/jobs/<job_id>/events", "/v1/admin/me"}


def test_only_the_listed_routes_are_open(app: Flask, services):
    table = route_table(services)
    assert {op.path for op in table if op.is_open and not op.is_page} == OPEN
    assert {op.name for op in table if op.is_open and op.is_page} <= OPEN_PAGES
    assert {op.name for op in table} == {rule.endpoint for rule in app.url_map.iter_rules()}
    for op in table:
        is_operators = op.path.startswith(("/v1/admin", "/dashboard"))
        assert op.is_open or is_operators is (op.role is not None), op.path


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic aHI6eA==",
        "Bearer hr_000000000000_" + "0" * 48,
        "Bearer hr_x",
        "Bearer \x80\xff",
        "hr_000000000000_" + "0" * 48,
        "Bearer " + "k" * 5000,
    ],
)
def test_other_headers_are_401(app: Flask, header: str):
    client = app.test_client()
    response = client.get("/v1/jobs", headers={"Authorization": header})
    problem = check_problem(response, 401, "unauthenticated")
    assert "hr_0" not in problem["detail"]


def test_the_body_is_not_read_without_a_key(app: Flask):
    response = app.test_client().post("/v1/jobs", data=b"x" * 100_000)
    check_problem(response, 401, "unauthenticated")


def test_a_wrong_secret_is_401(app: Flask, key):
    wrong = key.secret[:-1] + ("0" if key.secret[-1] != "0" else "1")
    response = app.test_client().get("/v1/jobs", headers={"Authorization": f"Bearer {wrong}"})
    check_problem(response, 401, "unauthenticated")


def test_a_revoked_key_works_no_longer_than_the_cache(app: Flask, services, monkeypatch):
    key = services.accounts.create_key(tenant="revoked", name="test")
    client = client_of(app, key)
    assert client.get("/v1/jobs").status_code == 200
    services.accounts.revoke_key(key.id)
    now = time.monotonic()
    monkeypatch.setattr(auth.time, "monotonic", lambda: now + auth.CACHE_S + 1)
    check_problem(client.get("/v1/jobs"), 401, "unauthenticated")


def test_a_known_key_costs_no_look_up(client, services, monkeypatch):
    assert client.get("/v1/models").status_code == 200
    monkeypatch.setattr(type(services.accounts), "authenticate", lambda *_: pytest.fail("asked"))
    assert client.get("/v1/models").status_code == 200


def test_the_memory_of_keys_is_bounded(services, key, monkeypatch):
    monkeypatch.setattr(auth, "MAX_CACHED", 2)
    guard = auth.KeyGuard(services.accounts)
    for n in range(5):
        made = services.accounts.create_key(tenant="bounded", name=f"k{n}")
        assert guard.principal(f"bearer {made.secret}").key_id == made.id
        assert len(guard._known) <= 2


@pytest.mark.parametrize("is_known", [True, False])
def test_a_burst_with_one_key_asks_once(services, key, is_known, monkeypatch):
    """Each of a thousand POSTs that asked would hold a connection that the others wait for."""
    accounts, may_answer = type(services.accounts), threading.Event()
    asked: list[str] = []

    def slowly(_: object, secret: str) -> Principal | None:
        asked.append(secret)
        assert may_answer.wait(20)
        return Principal("tenant", "key") if is_known else None

    monkeypatch.setattr(accounts, "authenticate", slowly)
    guard = auth.KeyGuard(services.accounts)
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(guard.principal, f"Bearer {key.secret}") for _ in range(8)]
        (waiting,) = wait_until(lambda: list(guard._asked.values()))
        wait_until(lambda: waiting._condition._waiters and len(waiting._condition._waiters) == 7)
        may_answer.set()
        for answer in answers:
            if is_known:
                assert answer.result(20) == Principal("tenant", "key")
            else:
                with pytest.raises(Unauthenticated):
                    answer.result(20)
    assert len(asked) == 1
    assert not guard._asked


def wait_until(look: Callable[[], Any]) -> Any:
    """Return what a look finds, once it finds something."""
    deadline = time.monotonic() + 20
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found
