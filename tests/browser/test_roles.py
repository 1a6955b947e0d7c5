"""What a role may not do is neither offered by a page nor taken from a forged request."""

import pytest
from playwright.sync_api import expect

from headrace.contract.roles import Role
from headrace.tests.browser.browser_parts import PAGES
from headrace.tests.browser.stage import STUB_WORKERS, Stage

FOR_OPERATORS = ("playground",)
#: What everybody may change is one's own password.
FOR_ONESELF = ("account",)
FOR_ADMINS = ("keys", "operators", "audit")
#: Sends what the page's own buttons would, with the page's own token.
FORGED = """async ([method, url, body]) => {
  const answer = await headrace.send(method, url, body);
  return [answer.status, answer.data.code];
}"""


def test_a_viewer_sees_every_page_of_his_without_a_button_that_acts(as_role, stage: Stage):
    visit = as_role(Role.VIEWER)
    job, letter = stage.submit(1), stage.bury("a signature")
    for name, path in PAGES.items():
        if name in (*FOR_OPERATORS, *FOR_ADMINS, *FOR_ONESELF):
            continue
        visit.page.goto(path.format(job=job, letter=letter))
        expect(visit.page.locator("h1")).to_be_visible()
        assert visit.page.locator("[data-post], form[data-json], #bulk, #replay").count() == 0, name
    labels = visit.page.get_by_role("navigation").get_by_role("link").all_inner_texts()
    assert labels == ["Overview", "Workers", "Queues", "Jobs", "Dead letters"]


@pytest.mark.parametrize(
    ("role", "names"),
    [(Role.VIEWER, FOR_OPERATORS + FOR_ADMINS), (Role.OPERATOR, FOR_ADMINS)],
)
def test_a_page_above_the_role_is_refused_as_a_page(as_role, role, names):
    visit = as_role(role)
    visit.watch.expect_status(403)
    for name in names:
        answer = visit.page.goto(PAGES[name])
        assert answer.status == 403, name
        expect(visit.page.locator("[data-problem]").first).to_contain_text("role")


@pytest.mark.parametrize(
    ("method", "url", "body"),
    [
        ("POST", f"/v1/admin/workers/{STUB_WORKERS[0]}/drain", {}),
        ("POST", "/v1/admin/playground", {"model": "stub", "prompt": "x"}),
        ("POST", "/v1/admin/jobs/{job}/cancel", {}),
        ("POST", "/v1/admin/queues/pause", {"model": "stub"}),
        ("POST", "/v1/admin/dead-letters/{job}/replay", {}),
        ("POST", "/v1/admin/replays", {"all": True, "rate_per_min": 1, "dry_run": True}),
        ("POST", "/v1/admin/keys", {"name": "x", "tenant": "x"}),
        ("GET", "/v1/admin/audit", None),
    ],
)
def test_a_viewers_forged_request_is_refused(as_role, stage: Stage, method, url, body):
    visit = as_role(Role.VIEWER)
    visit.watch.expect_status(403)
    job = stage.submit(1)
    visit.page.goto("/dashboard/workers")
    argument = [method, url.format(job=job)] + ([] if body is None else [body])
    assert visit.page.evaluate(FORGED, argument) == [403, "forbidden"]
    stage.fleet.wait_status(job, "succeeded")


def test_an_operators_request_without_the_token_is_refused(as_role):
    visit = as_role(Role.OPERATOR)
    visit.watch.expect_status(403)
    visit.page.goto("/dashboard/workers")
    visit.page.evaluate("document.querySelector('meta[name=csrf-token]').content = 'another'")
    url = f"/v1/admin/workers/{STUB_WORKERS[0]}/drain"
    assert visit.page.evaluate(FORGED, ["POST", url, {}]) == [403, "csrf_refused"]


def test_what_was_refused_stands_in_the_audit_log(as_role, stage: Stage):
    viewer = as_role(Role.VIEWER)
    viewer.watch.expect_status(403)
    viewer.page.goto("/dashboard/workers")
    viewer.page.evaluate(FORGED, ["POST", f"/v1/admin/workers/{STUB_WORKERS[1]}/quarantine", {}])
    page = as_role(Role.ADMIN).page
    page.goto("/dashboard/audit")
    row = page.get_by_role("row").filter(has_text="worker.quarantine").first
    expect(row).to_contain_text(stage.names[Role.VIEWER])
    expect(row).to_contain_text("forbidden")
    expect(row).to_contain_text(STUB_WORKERS[1])
