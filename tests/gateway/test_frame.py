"""The frame of the dashboard's pages: headers, roles, escaping, assets, figures."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flask import Flask, g
from flask.testing import FlaskClient

from headrace.contract.roles import Role
from headrace.gateway.dashboard import assets, frame
from headrace.gateway.dashboard.actor import Actor
from headrace.gateway.problems import handle_problems

FORBIDDEN_CODE = re.compile(
    r"innerHTML|\.outerHTML|insertAdjacentHTML|eval\(|new Function|document\.write"
)
HOSTILE = """<script>alert(1)</script>'"><img src=x onerror=alert(1)>{{ 7 * 7 }}"""


def app_with(actor: Actor | None) -> Flask:
    app = Flask(__name__, static_folder=None)
    handle_problems(app)
    for op in frame.asset_operations():
        app.add_url_rule(op.path, endpoint=op.name, view_func=op.view, methods=[op.method])

    @app.before_request
    def be() -> None:
        g.actor = actor
        g.csrf_token = "token'\""

    @app.get("/dashboard/queues/<name>")
    def page(name: str):
        return frame.render_problem(status=404, code="not_found", detail=HOSTILE + name)

    return app


def client_of(role: Role | None) -> FlaskClient:
    actor = None if role is None else Actor(f"name {HOSTILE}", "operator", role, "10.0.0.1")
    return app_with(actor).test_client()


@pytest.fixture
def client() -> FlaskClient:
    return client_of(Role.ADMIN)


def test_invariant_1_the_policy_allows_only_our_own_files(client):
    first, second = client.get("/dashboard/queues/a"), client.get("/dashboard/queues/a")
    policy = first.headers["Content-Security-Policy"]
    nonces = [
        re.findall(r"'nonce-([\w-]+)'", r.headers["Content-Security-Policy"])
        for r in (first, second)
    ]
    assert nonces[0] != nonces[1]
    assert len(nonces[0][0]) >= 22
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives.pop("script-src") == f"'self' 'nonce-{nonces[0][0]}'"
    assert directives == {
        "default-src": "'none'", "style-src": "'self'", "img-src": "'self' data:",
        "connect-src": "'self'", "font-src": "'self'", "form-action": "'self'",
        "base-uri": "'none'", "frame-ancestors": "'none'",
    }  # fmt: skip


def test_invariant_1_templates_hold_no_inline_code_and_mark_nothing_safe():
    for path in frame.TEMPLATES.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"""\sstyle=|<style|\son\w+=|javascript:|\|\s*safe|autoescape""", text
        ), path
        assert not re.search(r"https?://", text), path


def test_invariant_1_what_users_typed_is_text(client):
    text = client.get("/dashboard/queues/<script>").text
    assert "<script>" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#39;&#34;&gt;&lt;img" in text
    assert "{{ 7 * 7 }}" in text


def test_invariant_2_pages_are_never_cached(client):
    response = client.get("/dashboard/queues/a")
    assert response.status_code == 404
    assert response.content_type == "text/html; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize("role", [None, *Role])
def test_the_navigation_shows_what_the_role_may_open(role):
    text = client_of(role).get("/dashboard/queues/a").text
    shown = set(re.findall(r'<li><a href="([^"]+)"', text))
    assert shown == {p for p, _, needed in frame.NAV if role is not None and role.includes(needed)}
    current = re.findall(r'<a href="([^"]+)" aria-current="page"', text)
    assert current == ([] if role is None else ["/dashboard/queues"])


def test_every_asset_a_page_names_is_served_under_its_hash_for_a_year(client):
    text = client.get("/dashboard/queues/a").text
    urls = set(re.findall(r'(?:src|href)="(/dashboard/static/[^"]+)"', text))
    assert len(urls) >= 7
    for url in urls:
        response = client.get(url)
        assert response.status_code == 200, url
        assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        tag = response.headers["ETag"]
        assert client.get(url, headers={"If-None-Match": tag}).status_code == 304
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
        assert response.content_type.startswith(kind[url.rsplit(".", 1)[1]])


def test_another_releases_hash_gets_our_file_and_may_not_keep_it(client):
    response = client.get("/dashboard/static/0123456789abcdef/style.css")
    assert response.status_code == 200
    assert response.headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    ["0/../frame.py", "0/%2e%2e/frame.py", "0/..%2fframe.py", "0/frame.py", "0/", "0/nothing.js",
     "0/%00", "../frame.py"],
)  # fmt: skip
def test_invariant_1_no_path_leads_out_of_the_assets(client, path):
    response = client.get(f"/dashboard/static/{path}")
    assert response.status_code == 404
    assert "Called by" not in response.text


def test_vendored_files_have_their_licences():
    names = set(assets.assets())
    assert {"htmx.min.js", "LICENSE.htmx.txt", "uPlot.iife.min.js", "LICENSE.uPlot.txt"} <= names


def test_our_scripts_evaluate_nothing_and_write_no_markup():
    for path in Path(assets.FOLDER).glob("*.js"):
        if ".min." not in path.name:
            text = path.read_text(encoding="utf-8")
            assert not FORBIDDEN_CODE.search(text), path


def test_macros_write_hostile_values_as_text():
    template = frame.environment().from_string(
        '{% from "macros.html" import table, badge, ago, button_post, chart, tile, meter %}'
        "{% call table([x, [x, 'num']], x) %}<tr><td>{{ badge(x) }}</td></tr>{% endcall %}"
        "{{ ago('2026-01-01T00:00:00+00:00') }}{{ ago(None) }}"
        "{{ button_post('/v1/' ~ x, x, confirm=x, typed=x, body={x: x}, danger=True) }}"
        "{{ chart('c', [[x, x]], title=x) }}{{ tile(x, x, 'rate', value=x) }}{{ meter(0.5, x) }}"
    )
    text = template.render(x=HOSTILE)
    assert "<script" not in text
    assert "<img" not in text
    attributes = dict(re.findall(r'(data-\w+)="([^"]*)"', text))
    unescaped = (
        attributes["data-body"].replace("&#34;", '"').replace("&#39;", "'").replace("&amp;", "&")
    )
    assert json.loads(unescaped) == {HOSTILE: HOSTILE}


@pytest.mark.parametrize(
    ("written", "value", "text"),
    [
        (frame.rate, 3.14159, "3.1"), (frame.rate, 12345.6, "12,346"), (frame.rate, None, "–"),
        (frame.count, 1234567, "1,234,567"), (frame.percent, 0.256, "26 %"),
        (frame.milliseconds, 0.5, "0.5 ms"), (frame.milliseconds, 250, "250 ms"),
        (frame.milliseconds, 61_000, "1 min 1 s"), (frame.duration, 0.25, "250 ms"),
        (frame.duration, 59.94, "59.9 s"), (frame.duration, 3_660, "1 h 1 min"),
        (frame.duration, 90_000, "1 d 1 h"), (frame.bytes_text, 1023, "1023 B"),
        (frame.bytes_text, 3 << 30, "3.0 GiB"), (frame.bytes_text, 1 << 60, "1048576.0 TiB"),
        (frame.ago, None, "–"), (frame.ago, "", "–"),
    ],
)  # fmt: skip
def test_figures_are_written(written, value, text):
    assert written(value) == text


def test_ago_takes_texts_and_times():
    then = datetime.now(UTC) - timedelta(hours=2, minutes=5)
    assert frame.ago(then) == "2 h 5 min ago"
    assert frame.ago(then.isoformat()) == "2 h 5 min ago"
    assert frame.ago(datetime.now(UTC)) == "now"
    assert frame.ago(datetime.now(UTC) + timedelta(minutes=3, seconds=30)) == "in 3 min 29 s"
