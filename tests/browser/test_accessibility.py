"""Every page by axe in both themes, on a phone, and by keyboard alone."""

import pytest
from playwright.sync_api import Page, expect

from headrace.contract.roles import Role
from headrace.tests.browser.browser_parts import (
    PAGES,
    PHONE,
    THEMES,
    WIDE,
    check_accessible,
    check_no_sideways_scroll,
    set_theme,
)
from headrace.tests.browser.stage import Stage

#: What has the focus, and how its outline is drawn.
FOCUSED = """() => {
  const one = document.activeElement;
  if (one === document.body) return null;
  const { outlineStyle, outlineWidth } = getComputedStyle(one);
  const box = one.getBoundingClientRect();
  return { tag: one.tagName, text: one.textContent.trim().slice(0, 40), outlineStyle, outlineWidth,
           isSeen: box.width > 0 && box.height > 0 };
}"""


@pytest.fixture(scope="module")
def job(stage: Stage) -> str:
    return stage.fail("a text that says why", metadata={"user": "42"})


@pytest.fixture(scope="module")
def letter(stage: Stage) -> str:
    return stage.bury("IndexError sampling.py:draw list index out of range", "a trace\n" * 30)


@pytest.mark.parametrize("theme", THEMES)
def test_every_page_and_all_it_unfolds(as_role, job, letter, theme):
    page = as_role(Role.ADMIN).page
    page.goto("/dashboard")
    set_theme(page, theme)
    for path in PAGES.values():
        page.set_viewport_size(WIDE)
        page.goto(path.format(job=job, letter=letter))
        expect(page.locator("#feed")).to_have_text("live")
        for summary in page.locator("main summary").all():
            summary.click()
        check_accessible(page)
        page.set_viewport_size(PHONE)
        check_no_sideways_scroll(page)


@pytest.mark.parametrize("theme", THEMES)
def test_the_login_page(context, watch, stage: Stage, theme):
    page = context.new_page()
    page.goto(f"{stage.fleet.api}/dashboard/login")
    set_theme(page, theme)
    page.reload()
    check_accessible(page)
    page.set_viewport_size(PHONE)
    check_no_sideways_scroll(page)


def test_the_keyboard_reaches_everything_and_shows_where_it_is(as_role, job, letter):
    page = as_role(Role.ADMIN).page
    for path in PAGES.values():
        page.goto(path.format(job=job, letter=letter))
        expect(page.locator("#feed")).to_have_text("live")
        walked = walk(page)
        wanted = page.locator("main :is(a[href], button, input, select, textarea):visible").count()
        reached = [one for one in walked if one["tag"] != "SUMMARY"]
        assert len(reached) >= min(wanted, 60), path
        unseen = [one for one in walked if one["outlineStyle"] == "none" or not one["isSeen"]]
        assert unseen == [], path


def walk(page: Page, most: int = 120) -> list[dict[str, object]]:
    """Press Tab until the page ends, or often enough; return what had the focus."""
    walked: list[dict[str, object]] = []
    while len(walked) < most:
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        if focused is None:
            break
        walked.append(focused)
    return walked


def test_a_worker_is_drained_by_keyboard_alone(as_role):
    page = as_role(Role.OPERATOR).page
    page.goto("/dashboard/workers")
    button = page.locator("tr[data-live-row='stub-a']").get_by_role("button", name="Drain")
    expect(button).to_be_visible()
    button.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(button).to_be_focused()
