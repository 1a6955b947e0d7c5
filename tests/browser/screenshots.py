"""Take the pictures of docs/screenshots: every page in both themes, on a fleet that works.

    PYTHONPATH=.imports python -m headrace.tests.browser.screenshots [NAME ...]

Names, such as dead-letters, choose pages; without any it is all of them.
Starts a fleet of its own (real small model, two stub workers), keeps it busy for LOAD_S so that the
curves have something to show, takes the pictures and stops everything. About three minutes.
"""

import sys
import tempfile
import threading
import time
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from headrace.contract import database
from headrace.contract.dead_letters import LetterFilter
from headrace.contract.replays import Replays
from headrace.contract.roles import Role
from headrace.fleet.programs import EMBEDDED_MODEL
from headrace.fleet.smollm2 import ensure_model
from headrace.tests.browser.browser_parts import PAGES, PHONE, THEMES, WIDE, launch, set_theme
from headrace.tests.browser.conftest import log_in
from headrace.tests.browser.stage import STUB, STUB_WORKERS, Stage

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "screenshots"
LOAD_S = 60.0
MAX_BYTES = 200_000
MAX_HEIGHT = 1150
#: Jobs' ids are noise to a picture's compression, so it shows a search that finds few.
SHOWN = PAGES | {
    "jobs": "/dashboard/jobs?status=failed",
    "dead-letter-list": "/dashboard/dead-letters/letters?signature=stalled",
}
TRACE = """Traceback (most recent call last):
  File "worker/engine/loop.py", line 210, in step
    drawn = self._sampling.draw(logits, rows)
  File "worker/engine/sampling.py", line 118, in draw
    return tokens[rows[index]]
IndexError: index 9 is out of bounds for dimension 0 with size 8"""
QUESTIONS = ("What is a headrace?", "Name three rivers.", "Why is the sky blue?")


class Load(threading.Thread):
    """Submits jobs of all kinds until it is told to stop."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(daemon=True)
        self._stage = stage
        self.stopped = threading.Event()

    def run(self) -> None:
        number = 0
        while not self.stopped.wait(0.35):
            number += 1
            kind = {"class": "batch" if number % 4 == 0 else "interactive"}
            self._stage.submit(30 + 37 * number % 160, **kind, metadata={"run": str(number % 7)})
            if number % 8 == 0:
                question = QUESTIONS[number // 8 % len(QUESTIONS)]
                self._stage.fleet.submit(
                    messages=[{"role": "user", "content": question}], sampling={"max_tokens": 60}
                )


def main(names: set[str]) -> None:
    model = ensure_model(ROOT / ".data" / EMBEDDED_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), model)
        load = Load(stage)
        try:
            stage.start()
            load.start()
            job, letter = _prepare(stage)
            if names & {"overview", "phone"}:
                time.sleep(LOAD_S)  # the curves need a history: nothing to wait for
            _take_all(stage, names, job, letter)
        finally:
            load.stopped.set()
            if load.is_alive():
                load.join()
            stage.stop()


def _prepare(stage: Stage) -> tuple[str, str]:
    """Make what the pages show besides load; return job and letter whose pages are taken."""
    stage.fail("the sequence needs 9,120 tokens; this worker holds 8,192", metadata={"run": "3"})
    for number in range(3):
        stage.fail(f"device lost after {number + 2} steps")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    job = stage.fleet.submit(messages=asked, sampling={"max_tokens": 120}, metadata={"user": "42"})
    stage.fleet.wait_status(job["id"], "succeeded")
    return job["id"], _bury_some(stage)


def _bury_some(stage: Stage) -> str:
    """Make dead letters of some signatures, and replays of some; return one letter's job."""
    signatures = (
        "SIGSEGV paged_decode.py:launch",
        "IndexError sampling.py:draw index # is out of bounds",
        "stalled",
    )
    buried = [stage.bury(signatures[which], TRACE) for which in (0, 2, 0, 1, 0, 1, 2, 1, 1)]
    engine = database.connect(stage.fleet.postgres.url)
    for signature, num, rate_per_min in ((signatures[0], 3, 600), (signatures[1], 4, 1)):
        Replays(engine).start(
            LetterFilter(signature=signature),
            rate_per_min=rate_per_min,
            by=stage.names[Role.OPERATOR],
            num_matched=num,
        )
    engine.dispose()
    return buried[-1]


def _take_all(stage: Stage, names: set[str], job: str, letter: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        for theme in THEMES:
            with browser.new_context(viewport=WIDE, base_url=stage.fleet.api) as context:
                context.set_default_timeout(60_000)
                page = context.new_page()
                page.goto("/dashboard/login")
                set_theme(page, theme)
                page.reload()
                if "login" in names:
                    _take(page, f"login-{theme}")
                log_in(page, stage, Role.ADMIN)
                for name, path in SHOWN.items():
                    if name not in names:
                        continue
                    page.goto(path.format(job=job, letter=letter))
                    _show(page, name)
                    _take(page, f"{name}-{theme}")
                if "phone" in names:
                    page.set_viewport_size(PHONE)
                    page.goto("/dashboard")
                    expect(page.locator("#feed")).to_have_text("live")
                    _take(page, f"phone-{theme}")
        browser.close()


def _show(page: Page, name: str) -> None:
    """Bring a page to where it shows what it is for."""
    expect(page.locator("#feed")).to_have_text("live")
    if name == "playground":
        page.get_by_label("Model").select_option(EMBEDDED_MODEL)
        page.get_by_label("User message").fill("What is the capital of France?")
        page.get_by_role("button", name="Run").click()
        expect(page.locator("#status")).to_have_text("succeeded")
    elif name == "workers":
        for worker in STUB_WORKERS:
            expect(page.locator(f"tr[data-live-row='{worker}']")).to_contain_text(STUB)


def _take(page: Page, name: str) -> None:
    height = min(MAX_HEIGHT, page.evaluate("document.documentElement.scrollHeight"))
    width = page.viewport_size["width"]
    path = FOLDER / f"{name}.png"
    clip = {"x": 0, "y": 0, "width": width, "height": height}
    page.screenshot(path=path, full_page=True, clip=clip, animations="disabled")
    size = path.stat().st_size
    print(f"{path.name}: {size:,} bytes")
    if size > MAX_BYTES:
        raise SystemExit(f"{path.name} has {size:,} bytes; {MAX_BYTES:,} are allowed: show less")


if __name__ == "__main__":
    main(set(sys.argv[1:]) or {"login", "phone", *SHOWN})
