"""A page of the frame alone, with a feed that a test writes by hand."""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.serving import WSGIRequestHandler, make_server

from headrace.contract.roles import Role
from headrace.gateway.dashboard import frame
from headrace.gateway.dashboard.actor import Actor

CSRF_TOKEN = "the-token"
PAGE = """{% extends "layout.html" %}
{% from "macros.html" import table, badge, ago, button_post, chart, tile, meter %}
{% block title %}Test{% endblock %}
{% block scripts %}{{ script("uPlot.iife.min.js") }}{{ script("charts.js") }}{% endblock %}
{% block content %}<h1>Test</h1>
<div data-live-list="overview.alarms"><template>
  <p class="alarm" data-field="text"></p></template></div>
<dl class="tiles">{{ tile("Tokens/s", "overview.tokens_per_s", "rate") }}
{{ tile("TTFT p99", "overview.ttft_ms.p99", "ms") }}</dl>
<div data-history="{{ history | tojson | forceescape }}">
{{ chart("jobs", [["jobs_in_per_s", "In"], ["jobs_out_per_s", "Out"]], title="Jobs") }}</div>
<section id="part" data-refresh>
{% call table(["Worker", "State", ["KV", "num"], "Do"], "Workers", live_rows="workers") %}
<template><tr data-live-row=""><td><a href="/dashboard/workers/{key}" data-field="worker"></a></td>
<td><span class="badge" data-field="state" data-format="state"></span></td>
<td>{{ meter(None, "KV", field="kv_used") }}</td>
<td>{{ button_post("/v1/admin/workers/{key}/drain", "Drain", confirm="Drain {key}?",
                   body={"why": "test", "note": "{=note}"}, typed="yes, {key}") }}
<span data-key></span></td></tr></template>
<tr data-live-row="gone"><td>gone</td><td></td><td></td><td></td></tr>
{% endcall %}
<p data-live-empty="workers">No workers.</p>
<p id="drawn">{{ num_drawn }}</p>
</section>
<form data-json action="/v1/admin/form"><p class="problem" data-problem hidden></p>
<label>Top p <input name="sampling.top_p" type="number" step="any"></label>
<label class="check"><input name="is_on" type="checkbox"> On</label>
<label>Stop <textarea name="stop" data-type="lines"></textarea></label>
<label>Empty <input name="empty"></label>
<button>Send</button></form>
{% endblock %}"""


class FrameApp:
    """Serves PAGE at /dashboard; `send` puts an event into the feed of all who listen."""

    def __init__(self) -> None:
        self.history = {"at": [time.time() - 50 + 5 * i for i in range(10)]} | {
            name: [float(i) for i in range(10)] for name in ("jobs_in_per_s", "jobs_out_per_s")
        }
        self.state: dict[str, Any] = {"overview": {"alarms": []}, "workers": {}}
        self.posts: list[tuple[str, str | None, Any]] = []  # path, CSRF token, body
        self.answer: tuple[dict[str, Any], int] = ({}, 202)
        self.num_feeds = 0  # streams opened
        self.is_away = False
        self.may_draw = threading.Event()  # while clear, a page that is asked for waits
        self.may_draw.set()
        self.num_asked = 0  # pages asked for
        self._listeners: list[queue.Queue[bytes | None]] = []

    def send(self, name: str, data: Any) -> None:
        event = f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
        for listener in self._listeners:
            listener.put(event)

    def hang_up(self) -> None:
        for listener in self._listeners:
            listener.put(None)

    def app(self) -> Flask:
        app = Flask(__name__, static_folder=None)
        for op in frame.asset_operations():
            app.add_url_rule(op.path, endpoint=op.name, view_func=op.view, methods=[op.method])
        app.before_request(self._log_in)
        app.add_url_rule("/dashboard", view_func=self._page)
        app.add_url_rule("/v1/admin/feed", view_func=self._feed)
        app.add_url_rule("/v1/<path:path>", view_func=self._post, methods=["POST"])
        return app

    def _log_in(self) -> None:
        g.actor = Actor("anna", "operator", Role.ADMIN, "127.0.0.1")
        g.csrf_token = CSRF_TOKEN

    def _page(self) -> Response:
        self.num_asked += 1
        num_drawn = self.num_asked
        self.may_draw.wait()
        page = frame.environment().from_string(PAGE)
        return frame.render(page, history=self.history, num_drawn=num_drawn)

    def _feed(self) -> Response:
        if self.is_away:
            return Response("away", 503)
        self.num_feeds += 1
        events: queue.Queue[bytes | None] = queue.Queue()
        events.put(f"event: state\ndata: {json.dumps(self.state)}\n\n".encode())
        self._listeners.append(events)

        def stream() -> Iterator[bytes]:
            yield b"retry: 50\n\n"
            while (event := events.get()) is not None:
                yield event

        return Response(stream(), content_type="text/event-stream")

    def _post(self, path: str) -> tuple[dict[str, Any], int]:
        self.posts.append((path, request.headers.get("X-CSRF-Token"), request.get_json()))
        return self.answer


@contextlib.contextmanager
def served(app: Flask) -> Iterator[str]:
    """Serve the app on a port of its own; yields its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    thread.join()
    server.server_close()


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: object) -> None:
        """Say nothing."""
