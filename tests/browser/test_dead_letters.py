"""The pages of dead letters in Chromium: by signature, replayed alone and at a rate, stopped."""

import re

import pytest
from playwright.sync_api import Page, expect

from headrace.contract.roles import Role
from headrace.tests.browser.stage import Stage, unique

PAGE = "/dashboard/dead-letters"


@pytest.fixture
def page(as_role) -> Page:
    page = as_role(Role.OPERATOR).page
    page.goto(PAGE)
    return page


def row(page: Page, text: str):
    return page.locator(".group-row, .letter-row, .replay-row").filter(has_text=text)


def count(page: Page, rate: int) -> None:
    panel = page.locator("#replay")
    panel.locator("summary").click()
    panel.get_by_label("Jobs a minute").fill(str(rate))
    panel.get_by_role("button", name="Count").click()


def answer(page: Page, name: str, typed: str = "") -> None:
    """Press a button and say yes to its question."""
    page.get_by_role("button", name=name).click()
    dialog = page.get_by_role("dialog")
    if typed:
        dialog.get_by_role("textbox").fill(typed)
    dialog.get_by_role("button", name=name).click()


def test_a_letter_is_found_by_its_signature_and_replayed(page, stage: Stage):
    signature = unique("ValueError step.py:run")
    job = stage.bury(signature, "the whole trace")
    page.reload()
    page.get_by_role("link", name=signature).click()
    page.get_by_role("link", name=job).click()
    expect(page.get_by_text("the whole trace")).to_be_visible()
    answer(page, "Replay")
    expect(page.get_by_text("Made from")).to_be_visible()
    expect(page.locator("#job-state .badge")).to_have_text("succeeded")
    made = re.search(r"job_[0-9a-f]{32}", page.url)[0]
    page.get_by_role("link", name=job).click()
    page.get_by_role("link", name="Its dead letter").click()
    expect(page.get_by_role("link", name=made)).to_be_visible()
    expect(page.locator("#letter .badge")).to_have_text("succeeded")
    answer(page, "Replay again")
    expect(page.get_by_text("Made from")).to_be_visible()
    assert len(stage.made_of(job)) == 2


def test_letters_that_are_ticked_are_counted_and_replayed(page, stage: Stage):
    signature = unique("SIGSEGV")
    jobs = [stage.bury(signature) for _ in range(3)]
    page.goto(f"{PAGE}/letters?signature={signature}")
    page.locator("#replay summary").click()
    page.get_by_label("Which").select_option("selection")
    page.get_by_role("button", name="Count").click()
    expect(page.get_by_text("Tick letters in the list first.")).to_be_visible()
    for job in jobs[:2]:
        page.get_by_label(f"Tick {job}").check()
    page.get_by_label("Jobs a minute").fill("6000")
    page.get_by_role("button", name="Count").click()
    expect(page.get_by_text("2 letters to replay.")).to_be_visible()
    answer(page, "Replay: 2", typed="2")
    expect(page).to_have_url(re.compile(f"{PAGE}#replays$"))
    done = page.locator(".replay-row").filter(has_text="2 ticked").first
    expect(done).to_contain_text("2 of 2")
    expect(done.locator(".badge")).to_have_text("done")
    assert [len(stage.made_of(job)) for job in jobs] == [1, 1, 0]


def test_all_of_a_signature_are_replayed_at_a_rate_and_stopped(page, stage: Stage):
    signature = unique("stalled")
    jobs = [stage.bury(signature) for _ in range(3)]
    page.goto(f"{PAGE}?signature={signature}")
    expect(row(page, signature)).to_contain_text("3")
    count(page, 1)
    expect(page.get_by_text("3 letters to replay.")).to_be_visible()
    answer(page, "Replay: 3", typed="3")
    running = page.locator(".replay-row").filter(has_text=signature)
    expect(running).to_contain_text("1 of 3")
    running.get_by_role("button", name="Stop").click()
    page.get_by_role("dialog").get_by_role("button", name="Stop").click()
    expect(running.locator(".badge")).to_have_text("stopped")
    expect(running).to_contain_text(stage.names[Role.OPERATOR])
    assert sum(len(stage.made_of(job)) for job in jobs) == 1


def test_a_search_that_is_refused_says_why(as_role):
    visit = as_role(Role.VIEWER)
    visit.watch.expect_status(400)
    visit.page.goto(f"{PAGE}?created_after=soon")
    expect(visit.page.locator("[data-problem]").first).to_contain_text("created_after")


def test_the_rate_must_be_one(page, stage: Stage):
    stage.bury(unique("rate"))
    page.reload()
    count(page, 0)
    expect(page.locator("#replay-result")).to_be_empty()
    expect(page.locator("#replay-run")).to_be_hidden()


def test_older_letters_come_below_those_that_are_shown(page, stage: Stage):
    signature = unique("many")
    oldest, *_ = [stage.bury(signature) for _ in range(3)]
    page.goto(f"{PAGE}/letters?signature={signature}&limit=2")
    expect(page.locator(".letter-row")).to_have_count(2)
    page.get_by_role("link", name="Older letters").click()
    expect(page.locator(".letter-row")).to_have_count(3)
    expect(page.locator(".letter-row").last).to_contain_text(oldest)
