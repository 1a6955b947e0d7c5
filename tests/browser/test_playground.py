"""The playground in Chromium, on the real small model and on a stub that never hurries."""

import json
import os
import re
import subprocess
import sys

import pytest
from playwright.sync_api import Page, expect

from headrace.contract.roles import Role
from headrace.tests.browser.stage import STUB, Stage

#: Everything that ends a quotation in some language.
HOSTILE = (
    """it's "quoted" `id` $(id) \\ %s {x} \u2028 é😀\n</textarea><script>alert(1)</script>'''"""
)


@pytest.fixture
def page(as_role) -> Page:
    page = as_role(Role.OPERATOR).page
    page.goto("/dashboard/playground")
    return page


def number(page: Page, name: str) -> float:
    return float(re.sub(r"[^\d.]", "", page.locator(f"#time-{name}").inner_text()))


def test_the_real_models_tokens_stream_in_and_the_times_are_told(page, stage: Stage):
    page.get_by_label("Model").select_option(stage.model.name)
    page.get_by_label("System message").fill("Answer in one sentence.")
    page.get_by_label("User message").fill("What is the capital of France?")
    page.get_by_label("Max tokens").fill("40")
    page.get_by_label("Temperature").fill("0")
    page.keyboard.press("Control+Enter")
    output = page.locator("#output")
    expect(output).not_to_be_empty()
    expect(page.locator("#status")).to_have_text("succeeded")
    expect(output).to_contain_text("Paris")
    expect(output).to_have_attribute("aria-busy", "false")
    assert 1 <= number(page, "tokens") <= 40
    assert number(page, "rate") > 0
    expect(page.locator("#time-ttft")).to_have_text(re.compile(r"\d (ms|s)$"))
    expect(page.locator("#time-finish")).to_have_text("stop")
    job = page.locator("#job-link").get_attribute("href").rsplit("/", 1)[1]
    row = stage.row(job)
    assert (row["status"], row["output_text"]) == ("succeeded", output.inner_text())
    assert row["tenant"] == "operators"


def test_escape_cancels_what_streams(page, stage: Stage):
    page.get_by_label("Model").select_option(STUB)
    page.get_by_label("Raw text").check()
    page.get_by_label("Text to go on with").fill("Once")
    page.get_by_label("Max tokens").fill("4000")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#status")).to_have_text("running")
    expect(page.locator("#output")).not_to_be_empty()
    expect(page.get_by_role("button", name="Run")).to_be_disabled()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("canceled")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    job = page.locator("#job-link").get_attribute("href").rsplit("/", 1)[1]
    assert stage.row(job)["status"] == "canceled"


def test_the_cancel_button_does_too(page):
    page.get_by_label("Model").select_option(STUB)
    page.get_by_label("User message").fill("Hello")
    page.get_by_label("Max tokens").fill("4000")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#output")).not_to_be_empty()
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("canceled")


@pytest.mark.parametrize(
    ("label", "value", "text"),
    [
        ("Top p", "7", "sampling.top_p"),
        ("Max tokens", "99999999", "sampling.max_tokens"),
        ("User message", "word " * 9000, "prompt has"),
    ],
)
def test_a_refusal_stands_beside_its_field(as_role, stage: Stage, label, value, text):
    visit = as_role(Role.OPERATOR)
    visit.watch.expect_status(400, 422)
    page = visit.page
    page.goto("/dashboard/playground")
    page.get_by_label("Model").select_option(stage.model.name)
    page.get_by_label("User message").fill("Hello")
    field = page.get_by_label(label)
    field.fill(value)
    page.get_by_role("button", name="Run").click()
    problem = page.locator(".field-problem")
    expect(problem).to_contain_text(text)
    expect(field).to_have_attribute("aria-invalid", "true")
    assert field.get_attribute("aria-describedby") == problem.get_attribute("id")
    expect(field).to_be_focused()
    expect(page.locator("#status")).to_have_text("refused")


@pytest.fixture
def asked(page) -> dict[str, object]:
    page.get_by_label("Model").select_option(STUB)
    page.get_by_label("System message").fill(HOSTILE)
    page.get_by_label("User message").fill(HOSTILE)
    page.get_by_label("Max tokens").fill("3")
    expect(page.locator("#as-curl")).to_have_value(re.compile("curl"))
    return {"messages": [{"role": role, "content": HOSTILE} for role in ("system", "user")]}


@pytest.mark.parametrize(
    ("snippet", "program"),
    [("#as-curl", ["sh", "-c"]), ("#as-python", [sys.executable, "-c"])],
)
def test_the_copied_program_does_the_same(page, asked, stage: Stage, snippet, program):
    text = page.locator(snippet).input_value()
    assert stage.fleet.key not in text
    environment = {"HEADRACE_API_KEY": stage.fleet.key, "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [*program, text], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    printed = done.stdout
    job = json.loads(printed)["id"] if "curl" in snippet else re.search("job_[0-9a-f]+", printed)[0]
    made = stage.fleet.wait_status(job, "succeeded")
    assert made["input"] == asked
    assert made["sampling"]["max_tokens"] == 3


def test_the_openai_program_is_python_with_the_same_body(page, asked):
    text = page.locator("#as-openai").input_value()
    code = compile(text, "snippet", "exec")
    calls = []

    class OpenAI:
        def __init__(self, **options: object) -> None:
            calls.append(options)

        def post(self, path: str, **options: object) -> str:
            calls.append((path, options["body"]))
            return "made"

    class Module:
        pass

    module = Module()
    module.OpenAI = OpenAI
    sys.modules["openai"], environment = module, os.environ.copy()
    os.environ["HEADRACE_API_KEY"] = "hr_key"
    try:
        exec(code, {})
    finally:
        del sys.modules["openai"]
        os.environ.clear()
        os.environ.update(environment)
    assert calls[0]["base_url"].endswith("/v1")
    path, body = calls[1]
    assert path == "/jobs"
    assert body["messages"] == asked["messages"]


def test_a_model_without_a_worker_says_so_and_its_job_waits(page, stage: Stage):
    stage.sql(
        "insert into models (name, card) select 'nobody', card || '{\"name\": \"nobody\"}'"
        " from models limit 1 on conflict do nothing"
    )
    page.reload()
    option = page.locator("option", has_text="nobody")
    expect(option).to_have_text("nobody (no worker serves it now)")
    page.get_by_label("Model").select_option("nobody")
    page.get_by_label("User message").fill("Hello")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#status")).to_have_text("queued")
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#status")).to_have_text("canceled")
