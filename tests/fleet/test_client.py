"""The API client, against a scripted HTTP server that drops connections."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from headrace.fleet.client import ApiProblem, Client
from headrace.fleet.failure import FleetError

Answer = tuple[int, dict[str, str], bytes]


class Script:
    """What the server answers, request by request, and what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []

    def json(self, status: int, value: Any, **headers: str) -> None:
        self.answers.append((status, headers, json.dumps(value).encode()))

    def stream(self, *events: tuple[str, dict[str, Any], str | None]) -> None:
        """An event stream that is cut off after these."""
        text = "".join(
            f"event: {name}\ndata: {json.dumps(data)}\n" + (f"id: {at}\n" if at else "") + "\n"
            for name, data, at in events
        )
        # A length that is never reached: the client sees a broken connection, not an end.
        self.answers.append((200, {"Content-Length": "999999"}, text.encode()))


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script) -> Iterator[Client]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            script.asked.append((self.command, self.path, dict(self.headers), body))
            status, headers, content = script.answers.pop(0)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with Client(f"http://127.0.0.1:{server.server_port}/", "hr_key", patience_s=2) as made:
        yield made
    server.shutdown()
    thread.join()
    server.server_close()


def token(index: int) -> tuple[str, dict[str, Any], str]:
    return "token", {"index": index, "text": str(index)}, str(index)


def test_events_go_on_behind_the_last_one_after_every_loss(client, script):
    script.stream(("queued", {}, None), token(0), token(1))
    script.json(503, {"code": "unavailable"})
    script.stream()
    script.stream(token(2))
    script.stream(("succeeded", {}, "2"))
    names = [event.data.get("text", event.name) for event in client.events("job_1")]
    assert names == ["queued", "0", "1", "2", "succeeded"]
    sent = [headers.get("Last-Event-ID") for _, _, headers, _ in script.asked]
    assert sent == [None, "1", "1", "1", "2"]


def test_after_a_reset_the_stream_is_taken_from_its_start(client, script):
    script.stream(token(0), ("reset", {}, None))
    script.stream(token(0), ("succeeded", {}, "0"))
    names = [event.name for event in client.events("job_1")]
    assert names == ["token", "reset", "token", "succeeded"]
    assert "Last-Event-ID" not in script.asked[1][2]


def test_a_stream_is_joined_where_the_caller_says(client, script):
    script.stream(("succeeded", {}, "7"))
    assert [event.name for event in client.events("job_1", "7")] == ["succeeded"]
    assert script.asked[0][2]["Last-Event-ID"] == "7"


def test_a_refused_stream_is_not_asked_for_again(client, script):
    script.json(404, {"code": "not_found", "detail": "no such job"})
    with pytest.raises(ApiProblem, match="no such job") as caught:
        list(client.events("job_1"))
    assert (caught.value.status, caught.value.problem) == (404, "not_found")


def test_patience_ends(script, client, monkeypatch):
    monkeypatch.setattr(client, "_patience_s", 0.0)
    script.stream(token(0))
    events = client.events("job_1")
    assert next(events).name == "token"
    script.answers += [(503, {}, b'{"code": "unavailable"}')] * 3
    with pytest.raises(FleetError, match="the job goes on"):
        next(events)


def test_a_submission_is_repeated_with_one_key_and_says_what_was_refused(client, script):
    script.json(503, {"code": "database_unavailable"}, **{"Retry-After": "0"})
    script.json(202, {"id": "job_1"})
    assert client.submit({"prompt": "ü"})["id"] == "job_1"
    first, second = (headers["Idempotency-Key"] for _, _, headers, _ in script.asked)
    assert first == second
    assert script.asked[0][2]["Authorization"] == "Bearer hr_key"
    script.json(422, {"code": "prompt_too_long", "detail": "9 tokens"})
    with pytest.raises(ApiProblem, match="9 tokens") as caught:
        client.submit({}, "mine")
    assert caught.value.problem == "prompt_too_long"
    assert script.asked[-1][2]["Idempotency-Key"] == "mine"


@pytest.mark.parametrize("body", [{"x": float("nan")}, {"x": "\ud800" * 2, "y": [float("inf")]}])
def test_what_is_no_json_is_not_sent(client, script, body):
    with pytest.raises(FleetError, match="cannot be written as JSON"):
        client.submit(body)
    assert not script.asked


@pytest.mark.parametrize("job_id", ["", "../keys", "a?b", "job_1/events", "ä"])
def test_what_is_no_id_is_not_asked_for(client, script, job_id):
    with pytest.raises(FleetError, match="is no job id"):
        client.job(job_id)
    assert not script.asked


def test_a_server_that_is_not_headrace_is_named(client, script):
    script.answers.append((200, {}, b"<html>It works!"))
    with pytest.raises(ApiProblem, match="not headrace's"):
        client.models()


def test_filters_that_were_not_given_are_not_sent(client, script):
    script.json(200, {"data": [], "next_cursor": None})
    client.jobs(status="failed", model=None, limit=3)
    assert script.asked[0][1] == "/v1/jobs?status=failed&limit=3"


def test_a_server_that_is_away_is_named():
    with Client("http://127.0.0.1:1", "k") as away, pytest.raises(FleetError, match="headrace up"):
        away.models()
    with pytest.raises(FleetError, match="is no URL"):
        Client("http://[::1", "k")


# -- the operator's feed ---------------------------------------------------------------------


def test_the_feed_is_joined_again_and_says_meanwhile_that_it_is_lost(client, script):
    script.stream(("state", {"a": 1, "b": 2}, None), ("delta", {"a": None}, None))
    script.json(503, {"code": "unavailable"})
    script.stream(("state", {"c": 3}, None))
    states = client.feed()
    found = [next(states) for _ in range(5)]
    assert found == [
        {"a": 1, "b": 2},
        {"b": 2},
        {"b": 2, "lost": True},
        {"b": 2, "lost": True},
        {"c": 3},
    ]
    assert {path for _, path, _, _ in script.asked} == {"/v1/admin/feed"}


def test_a_refused_feed_is_not_asked_for_again(client, script):
    script.json(403, {"code": "forbidden", "detail": "this path is for operators"})
    with pytest.raises(ApiProblem, match="for operators"):
        next(client.feed())


def test_a_feed_that_stays_away_ends(client, script, monkeypatch):
    monkeypatch.setattr(client, "_patience_s", 0.0)
    script.json(503, {"code": "unavailable"})
    with pytest.raises(FleetError, match="sent no figures"):
        next(client.feed())
