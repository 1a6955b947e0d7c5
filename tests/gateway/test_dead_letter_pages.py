"""The pages of dead letters as they leave the gateway: what they show to whom, and text is text."""

from __future__ import annotations

import json
import re
from html import unescape
from urllib.parse import urlencode

import pytest

from headrace.contract.ids import new_id
from headrace.contract.roles import Role
from headrace.tests.contract.burial import bury
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.operators import Browser, browser_of, make_operator
from headrace.tests.gateway.test_job_pages import XSS, Tags, check_is_harmless

PAGE = "/dashboard/dead-letters"


@pytest.fixture(scope="module")
def sessions(app):
    return {role: make_operator(app, f"letters-{role}", role) for role in Role}


@pytest.fixture
def browser(app, sessions) -> Browser:
    return browser_of(app, sessions[Role.OPERATOR])


@pytest.fixture
def viewer(app, sessions) -> Browser:
    return browser_of(app, sessions[Role.VIEWER])


@pytest.fixture
def dead(client, services):
    def make(signature: str, detail: str = "a trace") -> str:
        job = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"}).get_json()["id"]
        return bury(services.engine, job, signature, detail)

    return make


def test_hostile_text_stays_text_on_every_page(browser, dead):
    job = dead(XSS, XSS)
    for path in (PAGE, f"{PAGE}/letters", f"{PAGE}/{job}", f"/dashboard/jobs/{job}"):
        answer = browser.get(path)
        assert answer.status_code == 200
        assert "'unsafe-inline'" not in answer.headers["Content-Security-Policy"]
        check_is_harmless(answer.text)


@pytest.mark.parametrize("path", [PAGE, f"{PAGE}/letters"])
def test_what_was_searched_for_stands_in_the_form_also_when_it_is_refused(browser, path):
    answer = browser.get(path, query_string={"signature": XSS, "replayed": '"><i>'})
    assert answer.status_code == 400
    check_is_harmless(answer.text)
    assert 'role="alert"' in answer.text
    assert "The search was refused." in answer.text
    assert browser.get(f"{PAGE}/letters", query_string={"cursor": "x"}).status_code == 400


def test_a_group_leads_to_its_letters_and_they_to_job_and_back(browser, dead):
    signature = f"ValueError é?& {new_id('sig')}"
    job, other = dead(signature), dead(new_id("sig"))
    groups = browser.get(PAGE).text
    assert signature in unescape(groups)
    links = [attributes["href"] or "" for tag, attributes in Tags(groups).tags if tag == "a"]
    (link,) = [url for url in links if urlencode({"signature": signature}) in url]
    letters = browser.get(link).text
    assert f'href="{PAGE}/{job}"' in letters
    assert other not in letters
    letter = browser.get(f"{PAGE}/{job}").text
    assert f'href="/dashboard/jobs/{job}"' in letter
    assert f'href="{PAGE}/{job}"' in browser.get(f"/dashboard/jobs/{job}").text
    found = browser.get("/dashboard/jobs", query_string={"id": job}).text
    assert f'href="{PAGE}/{job}"' in found


def test_a_search_shows_rows_and_leads_to_older_ones(browser, dead):
    signature = new_id("sig")
    jobs = [dead(signature) for _ in range(3)]
    query = {"signature": signature, "limit": 2, "replayed": "false"}
    page = browser.get(f"{PAGE}/letters", query_string=query).text
    assert re.findall(rf'href="{PAGE}/(job_\w+)"', page) == jobs[:0:-1]
    (older,) = {unescape(url) for url in re.findall(r'hx-get="([^"]+)"', page)}
    rest = browser.get(older).text
    assert re.findall(rf'href="{PAGE}/(job_\w+)"', rest) == jobs[:1]
    assert "hx-get" not in rest


def panel_of(page: str) -> dict[str, str | None] | None:
    found = [attributes for _, attributes in Tags(page).tags if attributes.get("id") == "replay"]
    return found[0] if found else None


def test_the_panel_holds_the_search_and_needs_the_role(browser, viewer, dead):
    signature = f'a:"<b>{new_id("sig")}'
    job = dead(signature)
    query = {"signature": signature, "replayed": "false"}
    panel = panel_of(browser.get(f"{PAGE}/letters", query_string=query).text)
    assert panel is not None
    assert json.loads(panel["data-filter"] or "") == {"signature": signature}
    assert "data-all" not in panel
    everything = panel_of(browser.get(PAGE).text)
    assert everything is not None
    assert (everything["data-filter"], "data-all" in everything) == ("{}", True)
    for path in (PAGE, f"{PAGE}/letters", f"{PAGE}/{job}"):
        page = viewer.get(path).text
        assert panel_of(page) is None
        assert "data-post" not in page
        assert "data-tick" not in page


def test_a_letter_offers_a_replay_and_then_only_another(browser, dead):
    job = dead(new_id("sig"))

    def offered() -> list[tuple[str | None, str | None]]:
        tags = Tags(browser.get(f"{PAGE}/{job}").text).tags
        return [(one["data-post"], one.get("data-body")) for _, one in tags if one.get("data-post")]

    url = f"/v1/admin/dead-letters/{job}/replay"
    assert offered() == [(url, None)]
    made = browser.post(url, json={}).get_json()["id"]
    assert offered() == [(url, '{"again": true}')]
    assert f'href="/dashboard/jobs/{made}"' in browser.get(f"{PAGE}/{job}").text
    query = {"signature": browser.get(f"/v1/admin/dead-letters/{job}").get_json()["signature"]}
    listed = browser.get(f"{PAGE}/letters", query_string=query).text
    assert made in listed
    assert "data-tick" not in listed, "it was replayed"


def test_a_replay_shows_its_progress_and_can_be_stopped_while_it_runs(browser, viewer, dead):
    signature = new_id("sig")
    dead(signature)
    body = {"filter": {"signature": signature}, "rate_per_min": 1, "expect": 1}
    replay = browser.post("/v1/admin/replays", json=body).get_json()["replay"]["id"]
    stop = f"/v1/admin/replays/{replay}/stop"
    page = browser.get(PAGE).text
    assert stop in page
    assert "data-running" in page
    assert "0 of 1" in page
    assert stop not in viewer.get(PAGE).text
    assert browser.post(stop).status_code == 200
    page = browser.get(PAGE).text
    assert stop not in page
    assert "by letters-operator" in page


def test_a_letter_that_is_not_there_is_a_page_that_says_so(browser):
    answer = browser.get(f"{PAGE}/job_none")
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
