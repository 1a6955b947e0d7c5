"""Fixtures of the browser tests: Chromium and a fleet, once; windows that must have no problems."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    StorageState,
    expect,
    sync_playwright,
)

from headrace.contract.roles import Role
from headrace.tests.browser.browser_parts import PATIENCE_MS, WIDE, Watch, launch, watched
from headrace.tests.browser.stage import PASSWORD, Stage


@dataclass
class Visit:
    """An operator's window and what went wrong in it."""

    page: Page
    watch: Watch


@pytest.fixture(scope="session", autouse=True)
def patience() -> None:
    expect.set_options(timeout=PATIENCE_MS)


def log_in(page: Page, stage: Stage, role: Role, password: str = PASSWORD) -> None:
    """Fill in the form of the login page."""
    page.goto(stage.fleet.api + "/dashboard/login?next=/dashboard/workers")
    page.get_by_label("Name").fill(stage.names[role])
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("button", name="Log out")).to_be_visible()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    with chromium.new_context(viewport=WIDE) as made:
        yield made


@pytest.fixture
def watch(context: BrowserContext) -> Iterator[Watch]:
    """What the test's pages complain of; asking for it checks that they do not."""
    with watched(context) as found:
        yield found


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory, smollm2_folder: Path) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("stage"), smollm2_folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def cookies(stage: Stage, chromium: Browser) -> dict[Role, StorageState]:
    """Each role's session, from a login as people do it."""
    found: dict[Role, StorageState] = {}
    for role in Role:
        with chromium.new_context() as context:
            log_in(context.new_page(), stage, role)
            found[role] = context.storage_state()
    return found


@pytest.fixture
def as_role(
    stage: Stage, chromium: Browser, cookies: dict[Role, StorageState]
) -> Iterator[Callable[[Role], Visit]]:
    """Open a window of an operator; each must have no problems at the end."""
    with contextlib.ExitStack() as stack:

        def visit(role: Role) -> Visit:
            context = chromium.new_context(
                viewport=WIDE, storage_state=cookies[role], base_url=stage.fleet.api
            )
            stack.enter_context(context)
            watch = stack.enter_context(watched(context))
            return Visit(context.new_page(), watch)

        yield visit
