"""What strangers typed stays text on every page: no script, no markup, no broken address.

A script that ran would open a dialog, change the title, or break the Content-Security-Policy; each
fails a test by itself (browser_parts.Watch).
"""

import pytest
from playwright.sync_api import Page, expect

from headrace.contract.roles import Role
from headrace.tests.browser.stage import Stage

SCRIPTS = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</textarea></template><svg onload=alert(1)>",
    "{{7919*7919}}${7919*7919}<b>bold</b>",
    "javascript:alert(1)",
)
HOSTILE = " ".join(SCRIPTS)


@pytest.fixture
def page(as_role) -> Page:
    return as_role(Role.ADMIN).page


def check_inert(page: Page) -> None:
    assert page.locator("b:text-is('bold'), img[src=x], svg[onload]").count() == 0
    assert page.locator("script:not([src])").count() == 0
    assert page.locator("a[href^='javascript:']").count() == 0
    # A product that no age or count on a page happens to be.
    assert str(7919 * 7919) not in page.locator("main").inner_text()


def test_prompt_metadata_and_error_of_a_job(page, stage: Stage):
    job = stage.fail(HOSTILE, metadata={"<i>key</i>": HOSTILE})
    stage.sql(
        "update jobs set input = jsonb_build_object('messages', jsonb_build_array("
        "jsonb_build_object('role', 'user', 'content', %s::text))), output_text = %s where id = %s",
        HOSTILE, HOSTILE, job,
    )  # fmt: skip
    page.goto("/dashboard/jobs?error=onerror")
    expect(page.locator(".job-row").first).to_contain_text("<script>alert(1)</script>")
    check_inert(page)
    page.goto(f"/dashboard/jobs/{job}")
    expect(page.locator(".problem:visible")).to_contain_text(HOSTILE)
    expect(page.locator("#job-events")).to_contain_text("failed")
    for summary in ("Prompt", "Parameters and metadata", "Clone with edits"):
        page.locator("summary", has_text=summary).click()
    expect(page.get_by_text("metadata <i>key</i>")).to_be_visible()
    expect(page.locator("details pre", has_text=HOSTILE)).to_be_visible()
    check_inert(page)


def test_the_signature_and_detail_of_a_dead_letter(page, stage: Stage):
    job = stage.bury(HOSTILE[:200], HOSTILE)
    page.goto("/dashboard/dead-letters")
    expect(page.locator(".group-row").first).to_contain_text("<script>alert(1)</script>")
    check_inert(page)
    page.locator(".group-row").filter(has_text=SCRIPTS[0]).get_by_role("link").first.click()
    expect(page.locator(".letter-row").first).to_contain_text(HOSTILE)
    page.locator("summary", has_text="Replay many").click()
    page.get_by_role("button", name="Count").click()
    expect(page.get_by_text("1 letter to replay.")).to_be_visible()
    check_inert(page)
    page.goto(f"/dashboard/dead-letters/{job}")
    expect(page.locator("main pre")).to_have_text(HOSTILE)
    check_inert(page)
    page.goto(f"/dashboard/jobs/{job}")
    expect(page.locator("#dead-letter")).to_contain_text(SCRIPTS[0])
    check_inert(page)


def test_a_filter_in_the_address(page):
    page.goto("/dashboard/jobs")
    page.get_by_label("Tenant").fill(HOSTILE)
    page.get_by_label("Metadata").fill(f"k:{SCRIPTS[1]}")
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_label("Tenant")).to_have_value(HOSTILE)
    check_inert(page)


def test_the_name_and_tenant_of_a_key_and_the_audit_log(page):
    page.goto("/dashboard/keys")
    page.get_by_label("Name", exact=True).fill(SCRIPTS[1])
    page.get_by_label("Tenant").fill(SCRIPTS[0])
    page.get_by_role("button", name="Create key").click()
    expect(page.locator("#made-secret")).to_contain_text("hr_")
    row = page.get_by_role("row").filter(has_text=SCRIPTS[1])
    expect(row).to_contain_text(SCRIPTS[0])
    check_inert(page)
    row.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("dialog")).to_contain_text(SCRIPTS[1])
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row).to_contain_text("revoked")
    page.goto("/dashboard/audit")
    expect(page.get_by_role("row").filter(has_text="key.revoke").first).to_be_visible()
    check_inert(page)


def test_the_names_of_a_model_and_a_tenant_that_queue(page, stage: Stage):
    name = SCRIPTS[0] + SCRIPTS[1]
    stage.sql(
        "insert into models (name, card) select %s, card || jsonb_build_object('name', %s::text)"
        " from models limit 1", name, name,
    )  # fmt: skip
    page.goto("/dashboard/queues")
    expect(page.locator("#feed")).to_have_text("live")
    job = stage.fleet.submit(model=name, prompt="p", sampling={"max_tokens": 1})
    row = page.locator("tr[data-live-row]").filter(has_text=name)  # the feed brings it
    row.get_by_role("button", name="Pause").click()
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    expect(row.locator(".badge")).to_have_text("paused")
    for path in ("/dashboard", "/dashboard/playground", "/dashboard/queues"):
        page.goto(path)
        expect(page.locator("main")).to_contain_text(name)
        check_inert(page)
    row.get_by_role("button", name="Purge").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("textbox").fill(name)
    dialog.get_by_role("button", name="Purge").click()
    stage.fleet.wait_status(job["id"], "canceled")
    check_inert(page)
