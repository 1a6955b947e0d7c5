"""What the browser tests share: Chromium, a page that tells what went wrong in it, and axe.

The browser is the system's. Playwright brings only the protocol: its own downloads are not used.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, Playwright

#: How long a page may take until it shows what a test waits for, ms; the machine may be busy.
PATIENCE_MS = 20_000
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
THEMES = ("light", "dark")
#: Waits until no colour is on its way to another, for such a one is neither; a transition that
#: gives way to a newer one is rejected, not finished.
SETTLED = """async () => {
  const running = () => document.getAnimations().filter((a) => a.playState === "running");
  while (running().length) await Promise.allSettled(running().map((a) => a.finished));
}"""
#: Every page but the login, by the name of its picture.
PAGES = {
    "overview": "/dashboard",
    "workers": "/dashboard/workers",
    "queues": "/dashboard/queues",
    "jobs": "/dashboard/jobs",
    "job": "/dashboard/jobs/{job}",
    "dead-letters": "/dashboard/dead-letters",
    "dead-letter-list": "/dashboard/dead-letters/letters",
    "dead-letter": "/dashboard/dead-letters/{letter}",
    "playground": "/dashboard/playground",
    "keys": "/dashboard/keys",
    "operators": "/dashboard/operators",
    "audit": "/dashboard/audit",
    "account": "/dashboard/account",
}


def chromium_path() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError(
            f"the browser tests need one of {', '.join(NAMES)}; none is on the PATH: install"
            " Debian's and Ubuntu's package `chromium` (or `chromium-browser`)"
        )
    return found


def launch(playwright: Playwright) -> Browser:
    # The sandbox needs privileges that a container's root has not; the pages are our own.
    return playwright.chromium.launch(
        executable_path=chromium_path(), args=["--no-sandbox", "--disable-dev-shm-usage"]
    )


@dataclass
class Watch:
    """What a page complained of: each is a failure unless the test expects it."""

    problems: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # parts of texts that may be among them

    def on(self, page: Page) -> None:
        page.on("console", lambda m: self._add(m.type, f"{m.text} ({m.location['url']})"))
        page.on("pageerror", lambda error: self._add("error", f"exception: {error}"))
        page.on("dialog", lambda dialog: (self._add("error", "a dialog opened"), dialog.dismiss()))

    def expect_status(self, *statuses: int) -> None:
        """Answers of these statuses may happen: Chromium writes each into the console."""
        self.expected += [f"the server responded with a status of {status}" for status in statuses]

    def check(self) -> None:
        found = [p for p in self.problems if not any(part in p for part in self.expected)]
        assert found == []

    def _add(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(f"{kind}: {text}")


@contextlib.contextmanager
def watched(context: BrowserContext) -> Iterator[Watch]:
    """Watch every page of a context; what was found is checked at the end."""
    watch = Watch()
    context.set_default_timeout(PATIENCE_MS)
    context.on("page", watch.on)
    yield watch
    watch.check()


def set_theme(page: Page, theme: str) -> None:
    """Choose a theme as the switch does, for the pages to come."""
    page.evaluate("theme => localStorage.setItem('headrace-theme', theme)", theme)


def check_accessible(page: Page) -> None:
    """Assert that axe finds nothing serious or critical on what the page shows now."""
    page.evaluate(SETTLED)
    violations = Axe().run(page).response["violations"]
    grave = [
        f"{found['id']}: {node['html']} {node.get('failureSummary', '')}"
        for found in violations
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]
    assert grave == [], page.url


def check_no_sideways_scroll(page: Page) -> None:
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.evaluate("document.documentElement.clientWidth"), page.url
