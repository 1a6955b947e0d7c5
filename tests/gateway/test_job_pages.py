"""The pages of jobs as they leave the gateway: what they show to whom, and that text stays text."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from headrace.contract.roles import Role
from headrace.contract.wire import FinishReason, JobStatus
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.operators import Browser, browser_of, make_operator

XSS = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'</pre></textarea>{{7*7}}"


class Tags(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def sessions(app):
    return {role: make_operator(app, f"pages-{role}", role) for role in Role}


@pytest.fixture
def browser(app, sessions) -> Browser:
    return browser_of(app, sessions[Role.OPERATOR])


@pytest.fixture
def evil(client, courier) -> str:
    """A job whose every text is an attack."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": XSS}],
        "metadata": {"<b>key": XSS},
    }
    job = client.post("/v1/jobs", json=body).get_json()["id"]
    held = courier.take()
    courier.end(
        held, JobStatus.FAILED, FinishReason.ERROR, error_code="engine_refused", error_text=XSS,
        text=XSS, token_ids=(1,), ends=(len(XSS),),
    )  # fmt: skip
    return job


def check_is_harmless(page: str) -> None:
    for tag, attributes in Tags(page).tags:
        assert tag != "img"
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        if tag == "script":
            assert re.match(r"/dashboard/static/[0-9a-f]+/[\w.]+\.js$", attributes["src"] or "")
    assert unescape(page).count(XSS) >= 1
    assert "{{7*7}}" in page
    assert "alert(1)</script>" not in page


def test_texts_of_users_stay_text_on_both_pages(browser, evil):
    for path in (f"/dashboard/jobs/{evil}", f"/dashboard/jobs?id={evil}"):
        answer = browser.get(path)
        assert answer.status_code == 200
        assert "'unsafe-inline'" not in answer.headers["Content-Security-Policy"]
        check_is_harmless(answer.text)


def test_what_was_searched_for_stands_in_the_form_as_text(browser):
    answer = browser.get("/dashboard/jobs", query_string={"error": XSS, "status": '"><i>'})
    assert answer.status_code == 400
    check_is_harmless(answer.text)
    assert 'role="alert"' in answer.text


def test_a_search_shows_rows_and_leads_to_older_ones(browser, client, courier):
    body = {"model": MODEL, "prompt": "x", "metadata": {"page": "many"}}
    jobs = [client.post("/v1/jobs", json=body).get_json()["id"] for _ in range(51)]
    page = browser.get("/dashboard/jobs", query_string={"meta": "page:many"}).text
    assert re.findall(r'href="/dashboard/jobs/(job_\w+)"', page) == jobs[:0:-1]
    (older,) = {unescape(url) for url in re.findall(r'hx-get="([^"]+)"', page)}
    rest = browser.get(older).text
    assert re.findall(r'href="/dashboard/jobs/(job_\w+)"', rest) == jobs[:1]
    assert "hx-get" not in rest


def test_the_bulk_panel_holds_the_filter_and_needs_one_and_a_role(app, sessions, browser):
    query = {"meta": 'a:"<b>', "status": "failed"}
    tags = Tags(browser.get("/dashboard/jobs", query_string=query).text).tags
    (panel,) = [attributes for _, attributes in tags if attributes.get("id") == "bulk"]
    assert json.loads(panel["data-filter"] or "") == {"meta": 'a:"<b>', "status": ["failed"]}
    assert 'id="bulk"' not in browser.get("/dashboard/jobs").text
    viewer = browser_of(app, sessions[Role.VIEWER])
    assert 'id="bulk"' not in viewer.get("/dashboard/jobs", query_string=query).text


def test_the_actions_offered_are_those_that_can_be_done(app, sessions, browser, client, courier):
    job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).get_json()["id"]

    def actions(browser: Browser) -> set[str]:
        page = browser.get(f"/dashboard/jobs/{job}").text
        return set(re.findall(rf'(?:data-post|action)="/v1/admin/jobs/{job}/(\w+)"', page))

    assert actions(browser) == {"cancel", "priority", "clone"}
    assert actions(browser_of(app, sessions[Role.VIEWER])) == set()
    held = courier.take()
    assert actions(browser) == {"cancel", "clone"}
    courier.end(held, JobStatus.FAILED, FinishReason.ERROR)
    assert actions(browser) == {"retry", "clone"}


def test_the_timeline_is_drawn_without_styles(browser, client, courier):
    job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).get_json()["id"]
    courier.end(courier.take())
    tags = Tags(browser.get(f"/dashboard/jobs/{job}").text).tags
    bars = [attributes for tag, attributes in tags if tag == "rect"]
    assert bars
    assert all(0 <= float(bar["x"] or "") <= 1000 for bar in bars)


def test_a_job_that_is_not_there_is_a_page_that_says_so(browser):
    answer = browser.get("/dashboard/jobs/job_none")
    assert (answer.status_code, answer.mimetype) == (404, "text/html")


def test_a_form_of_empty_fields_finds_everything(browser, evil):
    fields = {"id": "", "tenant": "", "status": "", "created_after": "", "error": ""}
    assert evil in browser.get("/dashboard/jobs", query_string=fields).text
