"""The playground: an operator's jobs go the clients' way, under a key that opens nothing."""

import pytest

from headrace.contract.accounts import NO_SECRET
from headrace.contract.roles import Role
from headrace.gateway.dashboard import playground
from headrace.tests.gateway.conftest import card
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.operators import Browser, browser_of, make_operator
from headrace.tests.gateway.test_bad_input import check_problem

URL = "/v1/admin/playground"


@pytest.fixture(scope="module")
def sessions(app):
    return {role: make_operator(app, f"the-{role}", role) for role in Role}


@pytest.fixture
def browser(app, sessions) -> Browser:
    return browser_of(app, sessions[Role.OPERATOR])


def run(browser: Browser, **body):
    return browser.client.post(URL, json={"model": MODEL} | body, headers=browser.headers)


def test_a_run_is_a_job_of_the_tenant_operators_and_reaches_a_worker(browser, services, courier):
    answer = run(browser, prompt="Once upon", sampling={"max_tokens": 3, "temperature": 0})
    assert answer.status_code == 202
    job = answer.get_json()
    assert job["input"] == {"prompt": "Once upon"}
    row = services.ledger.job(job["id"])
    own = services.accounts.own_key(tenant=playground.TENANT, name=playground.KEY)
    assert (row["tenant_id"], row["key_id"]) == (own.tenant_id, own.key_id)
    assert courier.take().claim.job == job["id"]


def test_runs_share_one_key_and_it_opens_nothing(browser, services, app):
    keys = {services.ledger.job(run(browser, prompt="x").get_json()["id"])["key_id"] for _ in "ab"}
    assert len(keys) == 1
    assert not keys & {key["id"] for key in services.accounts.list_keys()}
    assert not services.accounts.revoke_key(keys.pop())
    assert not services.accounts.revoke_key(playground.KEY)
    assert NO_SECRET == b""
    for guess in (f"hr_{playground.KEY}_", f"hr_{playground.KEY}_{'0' * 48}", playground.KEY):
        check_problem(
            app.test_client().get("/v1/jobs", headers={"Authorization": f"Bearer {guess}"}),
            401,
            "unauthenticated",
        )


def test_a_tenants_key_sees_no_job_of_the_playground(browser, client):
    job = run(browser, prompt="secret").get_json()
    check_problem(client.get(f"/v1/jobs/{job['id']}"), 404, "not_found")


@pytest.mark.parametrize(
    ("body", "status", "code", "begins"),
    [
        ({}, 400, "prompt_choice", ""),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, 400, "prompt_choice", ""),
        ({"prompt": "a", "sampling": {"top_p": 2}}, 400, "out_of_range", "sampling.top_p"),
        ({"prompt": "a", "sampling": {"top_p": "1"}}, 400, "wrong_type", "sampling.top_p"),
        ({"prompt": "a", "tenant": "other"}, 400, "unknown_field", "tenant"),
        ({"prompt": "a", "model": "no-such"}, 422, "unknown_model", "model"),
        ({"prompt": "a\0"}, 400, "invalid_text", "prompt"),
    ],
)
def test_what_cannot_run_is_refused_as_a_clients_job_is(browser, body, status, code, begins):
    answer = run(browser, **body)
    check_problem(answer, status, code)
    assert answer.get_json()["detail"].startswith(begins)  # the page shows it beside that field


def test_the_audit_log_has_the_run_and_not_the_prompt(browser, services):
    job = run(browser, prompt="a secret prompt").get_json()
    entry = next(iter(services.audit.page(limit=1, action="playground.run")))
    assert (entry["actor"], entry["target"], entry["outcome"]) == (
        "the-operator",
        job["id"],
        "done",
    )
    assert entry["details"] == {"model": MODEL}
    assert "secret" not in str(dict(entry))


def test_a_viewer_neither_runs_nor_sees_the_page(app, sessions):
    viewer = browser_of(app, sessions[Role.VIEWER])
    check_problem(run(viewer, prompt="x"), 403, "forbidden")
    assert viewer.client.get("/dashboard/playground").status_code == 403


def test_the_page_names_the_models_as_text(browser, services, courier):
    hostile = "</option><script>alert(1)</script>"
    services.accounts.register_model(card(name=hostile))
    text = browser.client.get("/dashboard/playground").text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert f'value="{MODEL}"' in text
    assert "no worker serves it now" in text
