"""Logging in and out, in Chromium."""

from playwright.sync_api import BrowserContext, expect

from headrace.contract.roles import Role
from headrace.tests.browser.browser_parts import Watch
from headrace.tests.browser.conftest import log_in
from headrace.tests.browser.stage import Stage


def test_one_logs_in_from_the_page_asked_for_and_out_again(
    context: BrowserContext, watch: Watch, stage: Stage
):
    page = context.new_page()
    page.goto(f"{stage.fleet.api}/dashboard/jobs?status=failed")
    expect(page).to_have_title("Log in · headrace")
    page.get_by_label("Name").fill(stage.names[Role.VIEWER])
    page.get_by_label("Password").fill("correct horse battery staple")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{stage.fleet.api}/dashboard/jobs?status=failed")
    cookie = next(c for c in context.cookies() if c["name"] == "headrace_session")
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_title("Log in · headrace")
    page.goto(f"{stage.fleet.api}/dashboard")
    expect(page.get_by_role("button", name="Log in")).to_be_visible()


def test_a_wrong_password_is_said_and_opens_nothing(
    context: BrowserContext, watch: Watch, stage: Stage
):
    watch.expect_status(401)
    page = context.new_page()
    page.goto(f"{stage.fleet.api}/dashboard")
    page.get_by_label("Name").fill(stage.names[Role.ADMIN])
    page.get_by_label("Password").fill("not the password of anyone")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_label("Name")).to_have_value(stage.names[Role.ADMIN])
    expect(page.get_by_label("Password")).to_have_value("")
    page.goto(f"{stage.fleet.api}/dashboard")
    expect(page.get_by_role("button", name="Log in")).to_be_visible()
    log_in(page, stage, Role.ADMIN)  # one wrong try locks nobody out
