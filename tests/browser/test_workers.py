"""The page of workers in Chromium: an order is given by a click, and jobs move."""

import threading

import pytest
from playwright.sync_api import Locator, Page, expect

from headrace.contract.roles import Role
from headrace.tests.browser.stage import STUB_WORKERS, Stage
from headrace.tests.fleet.fleet_parts import Event, check_stream

NUM_JOBS, NUM_TOKENS = 6, 300


@pytest.fixture
def page(as_role) -> Page:
    page = as_role(Role.OPERATOR).page
    page.goto("/dashboard/workers")
    return page


def row(page: Page, worker: str) -> Locator:
    return page.locator(f"tr[data-live-row='{worker}']")


def order(page: Page, worker: str, action: str) -> None:
    row(page, worker).get_by_role("button", name=action).click()
    if action != "Resume":
        page.get_by_role("dialog").get_by_role("button", name=action).click()
    expect(page.locator("#toasts")).to_contain_text("the worker obeys")


def test_a_drained_workers_jobs_move_and_their_streams_have_no_gap(page, stage: Stage):
    leaving, staying = STUB_WORKERS
    jobs = [stage.submit(NUM_TOKENS) for _ in range(NUM_JOBS)]
    streams: dict[str, list[Event]] = {job: [] for job in jobs}
    readers = [
        threading.Thread(target=lambda job=job: streams[job].extend(stage.fleet.events(job)))
        for job in jobs
    ]
    for reader in readers:
        reader.start()
    for worker in STUB_WORKERS:
        expect(row(page, worker)).not_to_contain_text(" 0 jobs held")
    order(page, leaving, "Drain")
    expect(row(page, leaving).locator(".badge")).to_have_text("drained")
    expect(row(page, leaving)).to_contain_text(f"by {stage.names[Role.OPERATOR]}")
    expect(row(page, leaving)).to_contain_text(" 0 jobs held")
    for reader in readers:
        reader.join(60)
    for job in jobs:
        _, ids = check_stream(streams[job])
        assert len(ids) == NUM_TOKENS
    workers = {stage.row(job)["worker"] for job in jobs}
    attempts = [stage.row(job)["attempt"] for job in jobs]
    assert workers == {staying}  # they take 12 s at least, and the drain ends after 1 s
    assert max(attempts) == 2

    order(page, leaving, "Resume")
    expect(row(page, leaving).locator(".badge")).to_have_text("ready")


def test_a_worker_that_dies_is_shown_dead_and_one_that_comes_appears(page, stage: Stage):
    stage.start_stub("stub-c")
    expect(row(page, "stub-c").locator(".badge")).to_have_text("ready")
    stage.fleet.kill_group("stub-c")
    expect(row(page, "stub-c").locator(".badge")).to_have_text("dead")


def test_the_overview_says_how_many_work(page):
    page.get_by_role("link", name="Overview").click()
    expect(page.locator("[data-live='overview.num_workers']")).to_have_text("3")
    expect(page.locator("[data-live='overview.redis']")).to_have_text("up")
