"""The pages of jobs in Chromium: find, look at, cancel one, cancel many."""

import re

import pytest
from playwright.sync_api import Page, expect

from headrace.contract.roles import Role
from headrace.tests.browser.stage import Stage, unique

#: Tokens of a job that runs for longer than the test.
LONG = 4000


@pytest.fixture
def page(as_role) -> Page:
    page = as_role(Role.OPERATOR).page
    page.goto("/dashboard/jobs")
    return page


def search(page: Page, label: str, text: str) -> None:
    page.get_by_label(label).fill(text)
    page.get_by_role("button", name="Search").click()


def test_a_job_is_found_by_a_part_of_its_error(page, stage: Stage):
    word = unique("device")
    wanted = stage.fail(f"The {word} was lost after 3 steps")
    stage.fail("another error altogether")
    search(page, "Error text", word.upper()[:-2])
    expect(page.locator(".job-row")).to_have_count(1)
    expect(page.locator(".job-row")).to_contain_text(f"The {word} was lost")
    page.get_by_role("link", name=wanted).click()
    expect(page.get_by_role("heading", name=wanted)).to_be_visible()
    expect(page.locator(".problem:visible")).to_contain_text(f"The {word} was lost")
    page.get_by_role("button", name="Retry").click()
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    expect(page.get_by_text("Made from")).to_be_visible()
    expect(page.locator("#job-state").get_by_role("link", name=wanted)).to_be_visible()
    expect(page.locator("#job-state .badge")).to_have_text("succeeded")


def test_a_refused_search_says_why(as_role):
    visit = as_role(Role.VIEWER)
    visit.watch.expect_status(400)
    page = visit.page
    page.goto("/dashboard/jobs?error=ab")
    expect(page.locator("[data-problem]").first).to_contain_text("error")
    expect(page.get_by_text("The search was refused.")).to_be_visible()


def test_jobs_of_a_filter_are_counted_first_and_then_canceled(page, stage: Stage):
    run = unique("run")
    jobs = [stage.submit(LONG, metadata={"run": run}) for _ in range(5)]
    others = stage.submit(LONG, metadata={"run": unique("other")})
    search(page, "Metadata", f"run:{run}")
    expect(page.locator(".job-row")).to_have_count(len(jobs))
    page.get_by_text("Act on all jobs that match").click()
    page.get_by_role("button", name="Count").click()
    expect(page.get_by_text(f"{len(jobs)} jobs match.")).to_be_visible()
    assert {stage.fleet.job(job)["status"] for job in jobs} <= {"queued", "running"}
    page.get_by_role("button", name=f"Cancel: {len(jobs)}").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("textbox").fill(str(len(jobs)))
    dialog.get_by_role("button", name=f"Cancel: {len(jobs)}").click()
    expect(page.get_by_text(f"{len(jobs)} done, 0 refused.")).to_be_visible()
    for job in jobs:
        stage.fleet.wait_status(job, "canceled")
    assert stage.fleet.job(others)["status"] in ("queued", "running")
    stage.fleet.call("POST", f"/v1/jobs/{others}/cancel")


def test_a_jobs_output_streams_in_and_its_cancel_is_shown(page, stage: Stage):
    job = stage.submit(LONG)
    page.goto(f"/dashboard/jobs/{job}")
    expect(page.locator("#job-output")).not_to_be_empty()
    expect(page.locator("#job-events")).to_contain_text("started: attempt 1")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-events")).to_contain_text("canceled")
    expect(page.locator("#job-state .badge")).to_have_text("canceled")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    for part in ("queue", "prefill", "decode"):
        expect(page.get_by_role("cell", name=part, exact=True)).to_be_visible()


def test_a_clone_takes_its_edits_and_nothing_else(page, stage: Stage):
    seed = (1 << 62) + 1  # more digits than a browser's numbers have
    made = stage.fleet.submit(
        model="stub", prompt="p", sampling={"max_tokens": 2, "seed": seed}, metadata={"a": "b"}
    )
    stage.fleet.wait_status(made["id"], "succeeded")
    page.goto(f"/dashboard/jobs/{made['id']}")
    page.get_by_text("Clone with edits").click()
    page.get_by_label("Most tokens").fill("5")
    page.get_by_role("button", name="Make the clone").click()
    page.get_by_role("dialog").get_by_role("button", name="Make the clone").click()
    expect(page.get_by_text("Made from")).to_be_visible()
    clone = stage.row(re.search(r"job_[0-9a-f]{32}", page.url)[0])
    assert clone["sampling"]["seed"] == seed
    assert clone["sampling"]["max_tokens"] == 5
    assert (clone["metadata"], clone["made_from"]) == ({"a": "b"}, made["id"])


def test_older_jobs_come_below_those_that_are_shown(page, stage: Stage):
    run = unique("many")
    oldest, *_ = [stage.submit(1, metadata={"run": run}) for _ in range(3)]
    page.goto(f"/dashboard/jobs?meta=run:{run}&limit=2")
    expect(page.locator(".job-row")).to_have_count(2)
    page.get_by_role("link", name="Older jobs").click()
    expect(page.locator(".job-row")).to_have_count(3)
    expect(page.locator(".job-row").last).to_contain_text(oldest)
    expect(page.get_by_role("link", name="Older jobs")).to_have_count(0)
