"""The scripts of the frame in Chromium, on a page whose feed the test writes."""

import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from headrace.gateway.dashboard import frame
from headrace.tests.browser.browser_parts import (
    PHONE,
    THEMES,
    Watch,
    check_accessible,
    check_no_sideways_scroll,
    set_theme,
)
from headrace.tests.browser.frame_app import CSRF_TOKEN, FrameApp, served
from headrace.tests.fleet.fleet_parts import wait_for

HOSTILE = "<img src=x onerror=alert(1)>{{7*7}}"
#: The name of what has the focus and how its outline is drawn; empty when nothing has it.
FOCUSED = """() => {
  const one = document.activeElement;
  if (one === document.body) return ["", ""];
  return [one.name || one.ariaLabel || one.textContent.trim(), getComputedStyle(one).outlineStyle];
}"""
#: A name as hosts have them, and one that is hostile to addresses and markup.
WORKERS = ("host.example-1", "../x?<b>'\"&")


@pytest.fixture
def fake() -> FrameApp:
    return FrameApp()


@pytest.fixture
def address(fake: FrameApp) -> Iterator[str]:
    with served(fake.app()) as url:
        yield url + "/dashboard"
        fake.hang_up()


@pytest.fixture
def page(context: BrowserContext, watch: Watch, address: str) -> Page:
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#feed")).to_have_text("live")
    return page


def row(page: Page, worker: str):
    return page.locator("tbody[data-live-rows] tr").filter(has=page.get_by_text(worker, exact=True))


def figures(worker: str, **more: object) -> dict[str, object]:
    return {"worker": worker, "state": "ready", "kv_used": 0.4} | more


# -- the feed --------------------------------------------------------------------------------


def test_figures_rows_and_alarms_follow_the_feed(fake, page):
    alarm = {"text": HOSTILE, "severity": "page"}
    fake.send("delta", {"overview": {"tokens_per_s": 1234.6, "ttft_ms": {"p50": 1, "p99": 87.2}}})
    fake.send("delta", {"overview": {"alarms": [alarm]}})
    fake.send("delta", {"workers": {name: figures(name) for name in WORKERS}})
    expect(page.locator("[data-live='overview.tokens_per_s']")).to_have_text("1,235")
    expect(page.locator("[data-live='overview.ttft_ms.p99']")).to_have_text("87 ms")
    expect(page.locator(".alarm")).to_have_text(HOSTILE)
    expect(page.locator("#alarm-badge")).to_have_text("1 alarm")
    for name in WORKERS:
        expect(row(page, name).locator(".badge")).to_have_text("ready")
        expect(row(page, name).locator("progress")).to_have_js_property("value", 0.4)
    expect(page.get_by_text("No workers.")).to_be_hidden()

    fake.send("delta", {"workers": {WORKERS[0]: {"state": "dead"}, WORKERS[1]: None}})
    expect(row(page, WORKERS[0]).locator(".badge")).to_have_attribute("data-state", "dead")
    expect(row(page, WORKERS[0]).locator("progress")).to_have_js_property("value", 0.4)
    expect(row(page, WORKERS[1])).to_have_count(0)
    fake.send("delta", {"overview": {"alarms": [], "ttft_ms": None}})
    expect(page.locator("#alarm-badge")).to_be_hidden()
    expect(page.locator("[data-live='overview.ttft_ms.p99']")).to_have_text("–")


def test_a_row_of_the_servers_that_the_feed_never_has_goes_after_a_while(fake, page):
    fake.send("delta", {"workers": {"w1": figures("w1")}})
    expect(row(page, "w1")).to_be_visible()
    expect(page.get_by_text("gone", exact=True)).to_be_visible()  # it may be newer than the feed

    def is_gone() -> bool:
        fake.send("delta", {"overview": {"at": time.time()}})
        return page.get_by_text("gone", exact=True).count() == 0

    wait_for(is_gone, "the row is gone")
    expect(row(page, "w1")).to_be_visible()


def test_names_in_addresses_are_encoded(fake, page):
    fake.send("delta", {"workers": {WORKERS[1]: figures(WORKERS[1])}})
    link = row(page, WORKERS[1]).locator("a")
    path = page.evaluate("a => new URL(a.href).pathname", link.element_handle())
    assert path == "/dashboard/workers/..%2Fx%3F%3Cb%3E'%22%26"


def test_a_rows_values_in_a_button_are_sent_as_they_are(fake, page):
    note = """{key}"}, {=worker} \\ <b>"""
    fake.send("delta", {"workers": {"w2": figures("another name", note=note)}})
    found = row(page, "another name")
    expect(found.locator("[data-key]")).to_have_text("w2")
    found.get_by_role("button", name="Drain").click()
    page.get_by_role("dialog").get_by_role("textbox").fill("yes, w2")
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(page.get_by_text("Drain: done.")).to_be_visible()
    assert fake.posts[-1][2] == {"why": "test", "note": note}


def test_every_figure_reads_the_same_from_server_and_script(page):
    values = [0, 0.04, 0.5, 3.14159, 12, 59.94, 61, 99.4, 100, 1234.5, 3661, 90_061, 5e6, 3 << 30]
    rules = {
        "rate": frame.rate, "count": frame.count, "percent": frame.percent,
        "ms": frame.milliseconds, "seconds": frame.duration, "bytes": frame.bytes_text,
    }  # fmt: skip
    for name, written in rules.items():
        script = "([values, name]) => values.map((value) => headrace.written(value, name))"
        found = page.evaluate(script, [values, name])
        assert found == [written(value) for value in values], name
        assert page.evaluate("name => headrace.written(null, name)", name) == written(None)


def test_silence_is_shown_and_news_end_it(fake, page):
    expect(page.locator("#feed")).to_have_text("figures are old", timeout=15_000)
    fake.send("delta", {"overview": {"tokens_per_s": 5}})
    expect(page.locator("#feed")).to_have_text("live")


def test_a_lost_feed_is_opened_again(fake, page, watch):
    watch.expected += ["Failed to load resource", "ERR_INCOMPLETE_CHUNKED_ENCODING"]
    fake.is_away = True
    fake.hang_up()
    expect(page.locator("#feed")).to_have_text("connection lost")
    fake.is_away = False
    expect(page.locator("#feed")).to_have_text("live")


def test_tabs_share_one_stream_and_the_next_takes_over(fake, context, page, address):
    other = context.new_page()
    other.goto(address)
    fake.send("delta", {"overview": {"tokens_per_s": 7}})
    for each in (page, other):
        expect(each.locator("[data-live='overview.tokens_per_s']")).to_have_text("7.0")
    assert fake.num_feeds == 1
    fake.state = {"overview": {"tokens_per_s": 8}}
    page.close()
    expect(other.locator("[data-live='overview.tokens_per_s']")).to_have_text("8.0")
    assert fake.num_feeds == 2


def test_a_chart_grows_and_its_table_says_the_same(fake, page):
    page.get_by_text("Jobs as a table").click()
    rows = page.locator("#jobs .chart-table tr")
    expect(rows).to_have_count(11)  # ten points and the head
    fake.send(
        "delta", {"overview": {"at": time.time(), "jobs_in_per_s": 42.5, "jobs_out_per_s": 1}}
    )
    expect(rows).to_have_count(12)
    expect(rows.nth(1).locator("td").nth(1)).to_have_text("42.5")
    assert page.locator("#jobs canvas").count() == 1


# -- acting ----------------------------------------------------------------------------------


def test_a_button_asks_for_the_word_sends_the_token_and_reads_the_part_again(fake, page):
    fake.send("delta", {"workers": {"w1": figures("w1")}})
    drawn = page.locator("#drawn").inner_text()
    row(page, "w1").get_by_role("button", name="Drain").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Drain w1?")
    yes = dialog.get_by_role("button", name="Drain")
    expect(yes).to_be_disabled()
    dialog.get_by_role("textbox").fill("yes, w1")
    yes.click()
    expect(page.locator("#toasts")).to_contain_text("Drain: done.")
    assert fake.posts == [("admin/workers/w1/drain", CSRF_TOKEN, {"why": "test", "note": ""})]
    expect(page.locator("#drawn")).not_to_have_text(drawn)
    expect(row(page, "w1").locator(".badge")).to_have_text("ready")  # filled again at once


def test_what_is_asked_while_a_part_is_being_read_is_read_after_it(fake, page):
    """Two readings at once once ended with the older answer: the newer one had nowhere to go."""
    fake.may_draw.clear()
    for _ in range(4):
        page.evaluate("headrace.refresh()")
    wait_for(lambda: fake.num_asked == 2, "the first reading")
    fake.may_draw.set()
    expect(page.locator("#drawn")).to_have_text("3")
    page.evaluate("headrace.refresh()")
    expect(page.locator("#drawn")).to_have_text("4")


def test_a_question_answered_with_no_sends_nothing(fake, page):
    fake.send("delta", {"workers": {"w1": figures("w1")}})
    button = row(page, "w1").get_by_role("button", name="Drain")
    button.click()
    page.get_by_role("button", name="Keep as it is").click()
    button.click()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(button).to_be_focused()
    assert fake.posts == []


def test_a_form_keeps_the_kinds_of_its_fields(fake, page):
    page.get_by_label("Top p").fill("0.5")
    page.get_by_label("Stop").fill("a\n\nb")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#toasts")).to_contain_text("Send: done.")
    body = {"sampling": {"top_p": 0.5}, "is_on": False, "stop": ["a", "b"]}
    assert fake.posts == [("admin/form", CSRF_TOKEN, body)]


@pytest.mark.parametrize(
    ("detail", "place"),
    [
        (f"sampling.top_p: must be at most 1; found {HOSTILE}", ".field-problem"),
        (f"another thing is wrong: {HOSTILE}", "[data-problem]"),
    ],
)
def test_a_refusal_stands_beside_its_field(fake, page, watch, detail, place):
    watch.expect_status(422)
    fake.answer = ({"detail": detail, "code": "out_of_range"}, 422)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(f"form {place}")).to_have_text(detail)
    fake.answer = ({}, 200)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".field-problem:visible, [data-problem]:visible")).to_have_count(0)


# -- looks -----------------------------------------------------------------------------------


def test_the_theme_is_the_systems_until_one_is_chosen_and_stays(page):
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(background)
    assert light != dark
    switch = page.get_by_role("button", name="Theme")
    switch.click()
    switch.click()
    expect(switch).to_have_text("Theme: light")
    assert page.evaluate(background) == light
    page.reload()
    expect(switch).to_have_text("Theme: light")
    assert page.evaluate(background) == light


@pytest.mark.parametrize("theme", THEMES)
def test_everything_at_once_is_accessible_and_fits_a_phone(fake, page, watch, theme):
    watch.expect_status(422)
    states = ("ready", "dead", "draining", "starting", "suspect", "quarantined")
    alarms = [{"text": "one", "severity": "warn"}, {"text": "two", "severity": "page"}]
    workers = {f"w-{state}": figures(f"w-{state}", state=state) for state in states}
    fake.state = {"overview": {"alarms": alarms}, "workers": workers}
    set_theme(page, theme)
    page.set_viewport_size(PHONE)
    page.reload()
    fake.answer = ({"detail": "sampling.top_p: no"}, 422)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".field-problem")).to_be_visible()
    page.get_by_text("Jobs as a table").click()
    check_no_sideways_scroll(page)
    check_accessible(page)
    row(page, "w-dead").get_by_role("button", name="Drain").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    check_accessible(page)


def test_the_page_is_walked_by_keyboard(fake, page):
    fake.send("delta", {"workers": {"w1": figures("w1")}})
    expect(row(page, "w1")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    seen = []
    while len(seen) < 30:
        page.keyboard.press("Tab")
        name, outline = page.evaluate(FOCUSED)
        if not name:
            break
        assert outline != "none", name  # focus can be seen
        seen.append(name)
    wanted = [
        "Jobs as a table",
        "Workers",
        "w1",
        "Drain",
        "sampling.top_p",
        "is_on",
        "stop",
        "empty",
        "Send",
    ]
    assert [name for name in seen if name in wanted] == wanted
