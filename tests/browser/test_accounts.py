"""Keys, operators and the audit log, in Chromium: what an admin does there, and what others see."""

import httpx
import pytest
from playwright.sync_api import expect

from headrace.contract.roles import Role
from headrace.tests.browser.browser_parts import (
    PHONE,
    THEMES,
    check_accessible,
    check_no_sideways_scroll,
    set_theme,
)

PAGES = ("keys", "operators", "audit")
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def me(api: str, key: str) -> httpx.Response:
    return httpx.get(f"{api}/v1/admin/me", headers={"Authorization": f"Bearer {key}"})


def test_a_key_is_made_shown_once_used_and_revoked(as_role, stage):
    page = as_role(Role.ADMIN).page
    page.goto("/dashboard/keys")
    form = page.locator("#new-key")
    form.get_by_label("Name").fill(HOSTILE)
    form.get_by_label("Tenant").fill("team-browser")
    form.get_by_label("Role").select_option("viewer")
    page.get_by_role("button", name="Create key").click()
    shown = page.locator("#made-secret")
    expect(shown).to_be_visible()
    key = shown.inner_text()
    assert me(stage.fleet.api, key).json()["role"] == "viewer"
    row = page.get_by_role("row").filter(has_text="team-browser")
    expect(row).to_contain_text(HOSTILE)
    expect(row).to_contain_text("active")
    page.reload()
    expect(page.locator("#made-secret")).to_be_hidden()
    assert key.rpartition("_")[2] not in page.content()
    row = page.get_by_role("row").filter(has_text="team-browser")
    row.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("dialog")).to_contain_text(HOSTILE)
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row).to_contain_text("revoked")
    expect(row.get_by_role("button", name="Revoke")).to_have_count(0)


def test_an_operator_is_made_changed_and_disabled(as_role):
    page = as_role(Role.ADMIN).page
    page.goto("/dashboard/operators")
    form = page.locator("form[action='/v1/admin/operators']")
    form.get_by_label("Name").fill("browser-made")
    form.get_by_label("Password").fill("correct horse battery")
    form.get_by_role("button", name="Create operator").click()
    row = page.get_by_role("row").filter(has_text="browser-made")
    expect(row).to_contain_text("active")
    row.get_by_label("Role of browser-made").select_option("operator")
    row.get_by_role("button", name="Set role").click()
    page.get_by_role("dialog").get_by_role("button", name="Set role").click()
    expect(page.get_by_text("The role is changed.")).to_be_visible()
    expect(row.get_by_label("Role of browser-made")).to_have_value("operator")
    row.get_by_text("New password").click()
    row.get_by_label("New password of browser-made").fill("another horse battery")
    row.get_by_role("button", name="Set password").click()
    expect(page.get_by_text("The password is changed.")).to_be_visible()
    row.get_by_role("button", name="Disable").click()
    page.get_by_role("dialog").get_by_role("button", name="Disable").click()
    expect(row).to_contain_text("disabled")
    row.get_by_role("button", name="Enable").click()
    expect(row).to_contain_text("active")
    page.goto("/dashboard/audit?action=operator.role")
    expect(page.get_by_role("row").filter(has_text="browser-made")).to_contain_text("done")


def test_what_is_refused_is_said_beside_the_form(as_role):
    visit = as_role(Role.ADMIN)
    visit.watch.expect_status(409)
    page = visit.page
    page.goto("/dashboard/operators")
    form = page.locator("form[action='/v1/admin/operators']")
    form.get_by_label("Name").fill("the-viewer")
    form.get_by_label("Password").fill("correct horse battery")
    form.get_by_role("button", name="Create operator").click()
    expect(form.locator("[data-problem]")).to_contain_text("one exists: choose another name")


@pytest.mark.parametrize("role", [Role.VIEWER, Role.OPERATOR])
@pytest.mark.parametrize("name", PAGES)
def test_others_neither_see_nor_reach_the_pages(as_role, role, name):
    visit = as_role(role)
    visit.watch.expect_status(403)
    page = visit.page
    page.goto("/dashboard/jobs")
    expect(page.get_by_role("link", name="Jobs", exact=True)).to_be_visible()
    expect(page.locator(f"nav a[href='/dashboard/{name}']")).to_have_count(0)
    page.goto(f"/dashboard/{name}")
    expect(page.get_by_role("heading", name="Forbidden")).to_be_visible()


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read_by_everyone_and_on_a_phone(as_role, name, theme):
    page = as_role(Role.ADMIN).page
    page.goto(f"/dashboard/{name}")
    set_theme(page, theme)
    page.reload()
    check_accessible(page)
    page.set_viewport_size(PHONE)
    check_no_sideways_scroll(page)


def test_one_changes_ones_own_password_and_logs_in_with_it(as_role, context, watch, stage):
    admin = as_role(Role.ADMIN).page
    admin.goto("/dashboard/operators")
    form = admin.locator("form[action='/v1/admin/operators']")
    form.get_by_label("Name").fill("browser-own")
    form.get_by_label("Password").fill("correct horse battery")
    form.get_by_role("button", name="Create operator").click()
    expect(admin.get_by_role("row").filter(has_text="browser-own")).to_contain_text("active")

    def log_in(password: str) -> None:
        page.get_by_label("Name").fill("browser-own")
        page.get_by_label("Password").fill(password)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("link", name="browser-own")).to_be_visible()

    watch.expect_status(400)
    page = context.new_page()
    page.goto(f"{stage.fleet.api}/dashboard")
    log_in("correct horse battery")
    page.get_by_role("link", name="browser-own").click()
    page.get_by_label("Old password").fill("not this one")
    page.get_by_label("New password").fill("another horse battery")
    page.get_by_role("button", name="Change password").click()
    expect(page.get_by_text("it is not the one you have")).to_be_visible()
    page.get_by_label("Old password").fill("correct horse battery")
    page.get_by_role("button", name="Change password").click()
    expect(page).to_have_title("Log in · headrace")
    log_in("another horse battery")
