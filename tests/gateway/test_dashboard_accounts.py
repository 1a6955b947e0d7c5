"""Keys, operators and the audit log: as JSON, and as pages."""

from __future__ import annotations

import re
import time

import pytest

from headrace.contract.audit import DONE, Entry
from headrace.contract.errors import LoginRefused
from headrace.contract.roles import Role
from headrace.gateway import answers, auth
from headrace.gateway.dashboard import audit, keys, operators
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.operators import PASSWORD, browser_of, make_operator
from headrace.tests.gateway.test_bad_input import SECRET, check_problem

HOSTILE = """<script>alert(1)</script>'"><img src=x onerror=alert(1)>{{ 7 * 7 }}"""


@pytest.fixture(scope="module")
def session(app):
    return make_operator(app, "root", Role.ADMIN)


@pytest.fixture
def admin(app, session):
    return browser_of(app, session)


def last_row(services) -> dict:
    return dict(services.audit.page(limit=1)[0])


# -- keys ------------------------------------------------------------------------------------


def test_a_key_is_made_shown_once_used_and_revoked(app, admin, services, monkeypatch):
    wanted = {"name": "ci", "tenant": "team-a", "role": "viewer"}
    answer = admin.post("/v1/admin/keys", json=wanted)
    assert answer.status_code == 201
    made = answer.get_json()
    keys.NewKeyAnswer.model_validate(made)
    assert {name: made[name] for name in wanted} == wanted
    row = last_row(services)
    assert (row["action"], row["target"], row["outcome"]) == ("key.create", made["id"], "done")
    assert row["details"] == wanted
    secret = made["key"].rpartition("_")[2]
    assert secret not in str(row)

    client = app.test_client()
    headers = {"Authorization": f"Bearer {made['key']}"}
    me = client.get("/v1/admin/me", headers=headers).get_json()
    assert me == {"name": made["id"], "kind": "key", "role": "viewer"}
    listed = admin.get("/v1/admin/keys")
    keys.KeyList.model_validate(listed.get_json())
    (found,) = [key for key in listed.get_json()["keys"] if key["id"] == made["id"]]
    assert found["last_used_at"] is not None
    assert secret not in listed.text

    revoked = admin.post(f"/v1/admin/keys/{made['id']}/revoke")
    keys.Key.model_validate(revoked.get_json())
    assert revoked.get_json()["revoked_at"] is not None
    again = admin.post(f"/v1/admin/keys/{made['id']}/revoke")
    assert again.get_json() == revoked.get_json()
    now = time.monotonic()
    monkeypatch.setattr(auth.time, "monotonic", lambda: now + auth.CACHE_S + 1)
    check_problem(client.get("/v1/admin/me", headers=headers), 401, "unauthenticated")


def test_a_keys_role_changes_nothing_for_its_tenant(app, services):
    plain = client_of(app, services.accounts.create_key(tenant="same", name="a"))
    strong = client_of(app, services.accounts.create_key(tenant="same", name="b", role=Role.ADMIN))
    other = client_of(app, services.accounts.create_key(tenant="not-same", name="c"))
    job = plain.post("/v1/jobs", json={"model": "tiny", "prompt": "x"}).get_json()["id"]
    assert strong.get(f"/v1/jobs/{job}").status_code == 200
    assert other.get(f"/v1/jobs/{job}").status_code == 404
    assert strong.get("/v1/jobs").get_json() == plain.get("/v1/jobs").get_json()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"tenant": "t"}, "missing_field"),
        ({"name": "", "tenant": "t"}, "out_of_range"),
        ({"name": " ", "tenant": "t"}, "out_of_range"),
        ({"name": "a\nb", "tenant": "t"}, "out_of_range"),
        ({"name": "n", "tenant": "t" * 201}, "out_of_range"),
        ({"name": "n", "tenant": 7}, "wrong_type"),
        ({"name": "n", "tenant": "t", "role": "root"}, "out_of_range"),
        ({"name": "n", "tenant": "t", "roles": ["admin"]}, "unknown_field"),
        ({"name": "a\x00b", "tenant": "t"}, "invalid_text"),
    ],
)
def test_a_key_that_cannot_be_meant_is_400_and_none_is_made(admin, services, body, code):
    before = len(services.accounts.list_keys())
    check_problem(admin.post("/v1/admin/keys", json=body), 400, code)
    assert len(services.accounts.list_keys()) == before
    assert last_row(services)["outcome"] == code


def test_a_key_is_revoked_by_its_id_only_and_a_whole_key_is_not_recorded(admin, services):
    made = services.accounts.create_key(tenant="t", name="n")
    for path in ("none", made.secret, made.secret.split("_")[1], "%00", "%E2%98%83"):
        check_problem(admin.post(f"/v1/admin/keys/{path}/revoke"), 404, "not_found")
        row = last_row(services)
        assert row["outcome"] == "not_found"
        assert made.secret.rpartition("_")[2] not in str(row)
    assert services.accounts.authenticate(made.secret) is not None


# -- operators -------------------------------------------------------------------------------


def test_an_operator_is_made_and_changed_and_its_sessions_end_with_each_change(
    app, admin, services
):
    wanted = {"name": "grace", "password": PASSWORD, "role": "viewer"}
    answer = admin.post("/v1/admin/operators", json=wanted)
    assert answer.status_code == 201
    operators.Operator.model_validate(answer.get_json())
    assert last_row(services)["details"] == {"role": "viewer"}
    url = "/v1/admin/operators/grace"
    changes = [
        ("role", {"role": "operator"}, {"role": "operator"}),
        ("password", {"password": PASSWORD + "2"}, {}),
        ("disable", {}, {}),
    ]
    password = PASSWORD
    for verb, body, details in changes:
        session = services.operators.login("grace", password, None)
        browser = browser_of(app, session)
        assert browser.get("/v1/admin/me").status_code == 200
        changed = admin.post(f"{url}/{verb}", json=body)
        assert changed.status_code == 200
        operators.Operator.model_validate(changed.get_json())
        assert browser.get("/v1/admin/me").status_code == 401
        row = last_row(services)
        assert (row["action"], row["target"]) == (f"operator.{verb}", "grace")
        assert row["details"] == details
        password = body.get("password", password)
    with pytest.raises(LoginRefused):
        services.operators.login("grace", password, None)
    enabled = admin.post(f"{url}/enable").get_json()
    assert (enabled["disabled_at"], enabled["role"]) == (None, "operator")
    assert services.operators.login("grace", password, None).role is Role.OPERATOR
    listed = admin.get("/v1/admin/operators")
    operators.OperatorList.model_validate(listed.get_json())
    assert "argon2" not in listed.text


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"name": "x", "password": "short"}, "missing_field"),
        ({"name": "x", "password": SECRET[:11], "role": "viewer"}, "out_of_range"),
        ({"name": "x", "password": SECRET * 60, "role": "viewer"}, "out_of_range"),
        ({"name": "x", "password": [SECRET], "role": "viewer"}, "wrong_type"),
        ({"name": "X", "password": PASSWORD, "role": "viewer"}, "out_of_range"),
        ({"name": "a/b", "password": PASSWORD, "role": "viewer"}, "out_of_range"),
        ({"name": HOSTILE, "password": PASSWORD, "role": "viewer"}, "out_of_range"),
        ({"name": "x", "password": PASSWORD, "role": "owner"}, "out_of_range"),
    ],
)
def test_an_operator_that_cannot_be_meant_is_400(admin, services, body, code):
    problem = check_problem(admin.post("/v1/admin/operators", json=body), 400, code)
    assert PASSWORD not in problem["detail"]
    assert PASSWORD not in str(last_row(services))


def test_a_name_is_taken_once_and_an_unknown_one_is_404(admin):
    body = {"name": "root", "password": PASSWORD, "role": "viewer"}
    check_problem(admin.post("/v1/admin/operators", json=body), 409, "name_taken")
    for verb, sent in (
        ("disable", None),
        ("enable", None),
        ("password", {"password": PASSWORD}),
        ("role", {"role": "viewer"}),
    ):
        answer = admin.post(f"/v1/admin/operators/who/{verb}", json=sent)
        check_problem(answer, 404, "not_found")


def test_the_last_admin_stays(admin):
    for verb, body in (("disable", None), ("role", {"role": "viewer"})):
        answer = admin.post(f"/v1/admin/operators/root/{verb}", json=body)
        check_problem(answer, 409, "last_admin")
    assert admin.get("/v1/admin/me").get_json()["role"] == "admin"


# -- audit -----------------------------------------------------------------------------------


def test_the_log_is_read_in_pages_and_by_filter(admin, services):
    for number in range(5):
        entry = Entry("filtered", "operator", "admin", f"act.{number % 2}", None, str(number))
        services.audit.write(entry, DONE if number else "conflict")
    path, found = "/v1/admin/audit?actor=filtered&limit=2", []
    for _ in range(3):
        page = admin.get(path).get_json()
        audit.AuditPage.model_validate(page)
        found += [row["target"] for row in page["audit"]]
        path = f"/v1/admin/audit?actor=filtered&limit=2&cursor={page['next_cursor']}"
    assert found == ["4", "3", "2", "1", "0"]
    assert page["next_cursor"] is None
    for query, wanted in (("action=act.1", ["3", "1"]), ("outcome=conflict", ["0"])):
        page = admin.get(f"/v1/admin/audit?actor=filtered&{query}").get_json()
        assert [row["target"] for row in page["audit"]] == wanted


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("cursor=x", "invalid_cursor"),
        ("cursor=-1", "invalid_cursor"),
        ("cursor=9999999999999999999", "invalid_cursor"),
        ("cursor=%D9%A3", "invalid_cursor"),
        ("limit=0", "out_of_range"),
        ("limit=x", "wrong_type"),
        ("actor=a&actor=b", "out_of_range"),
        ("actor=%00", "invalid_text"),
        ("who=x", "unknown_field"),
    ],
)
def test_a_query_that_cannot_be_meant_is_400(admin, query, code):
    check_problem(admin.get(f"/v1/admin/audit?{query}"), 400, code)
    assert admin.get(f"/dashboard/audit?{query}").status_code == 400


# -- pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["keys", "operators", "audit"])
def test_a_page_is_a_page_of_the_frame_with_the_policy(admin, page):
    answer = admin.get(f"/dashboard/{page}")
    assert (answer.status_code, answer.mimetype) == (200, "text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self' 'nonce-")
    assert "unsafe" not in policy
    assert answer.headers["Cache-Control"] == "no-store"
    assert f'<a href="/dashboard/{page}" aria-current="page">' in answer.text


def test_what_was_typed_into_names_is_text_on_the_pages(admin, services):
    made = admin.post("/v1/admin/keys", json={"name": HOSTILE, "tenant": HOSTILE}).get_json()
    entry = Entry(HOSTILE, "nobody", None, HOSTILE, HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    services.audit.write(entry, HOSTILE)
    for page in ("keys", "audit", "audit?actor=<script>alert(1)</script>"):
        text = admin.get(f"/dashboard/{page}").text
        assert "<script>alert" not in text
        assert "<img" not in text
        assert ">49<" not in text
    assert f"/v1/admin/keys/{made['id']}/revoke" in admin.get("/dashboard/keys").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in admin.get("/dashboard/audit").text


def test_the_audit_page_leads_to_older_rows_and_keeps_the_filter(admin, services):
    for number in range(3):
        services.audit.write(Entry("paged&co", "operator", "admin", "act", None, str(number)), DONE)
    text = admin.get("/dashboard/audit?actor=paged%26co&action=&limit=2").text
    assert text.count("<code>act</code>") == 2
    (older,) = re.findall(r'href="(/dashboard/audit\?[^"]*cursor=[^"]*)"', text)
    text = admin.get(older.replace("&amp;", "&")).text
    assert text.count("<code>act</code>") == 1
    assert "Older" not in text


def test_errors_below_the_dashboard_are_pages_and_elsewhere_problems(admin, app):
    for path, status in (("/dashboard/nothing", 404), ("/dashboard/audit?limit=0", 400)):
        answer = admin.get(path)
        assert (answer.status_code, answer.mimetype) == (status, "text/html")
        assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
    assert app.test_client().delete("/dashboard/login").status_code == 405
    problem = admin.get("/v1/admin/nothing")
    answers.Problem.model_validate(problem.get_json())
    assert problem.status_code == 404
