"""HTTP as no client library would send it: each gets an answer of its own, and none a 5xx."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from headrace.contract.accounts import NewKey
from headrace.contract.errors import all_errors
from headrace.contract.settings import GatewaySettings
from headrace.gateway.problems import MIMETYPE
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.test_server import Running, running_gateway

SECRET = "a-secret-of-the-user"
BODY = json.dumps({"model": MODEL, "prompt": "x"}).encode()
#: Seconds a body may take in these tests; a whole one is sent in one piece.
BODY_TIMEOUT_S = 1.0


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        assert self.headers["content-type"] == MIMETYPE, self.body
        return json.loads(self.body)["code"]


@pytest.fixture(scope="module")
def server(
    settings: GatewaySettings, app: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("gunicorn") / "log"
    quick = settings.model_copy(update={"body_timeout_s": BODY_TIMEOUT_S, "log_level": "DEBUG"})
    with running_gateway(quick, log, num_processes=1) as running:
        yield running
        found = log.read_text()
        assert "Traceback" not in found
        assert "request.failed" not in found
        assert "connection.failed" not in found
        assert SECRET not in found


def connect(server: Running) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_answers(connection: socket.socket) -> list[Answer]:
    """Return all answers up to the end of the connection."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    answers = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", "0"))
        answers.append(Answer(int(first.split()[1]), headers, data[:length]))
        data = data[length:]
    return answers


def send(server: Running, *parts: bytes) -> list[Answer]:
    """Send bytes, end the sending side, and return the answers."""
    with connect(server) as connection:
        for part in parts:
            connection.sendall(part)
        connection.shutdown(socket.SHUT_WR)
        return read_answers(connection)


def head(line: str, key: NewKey | None = None, *headers: str) -> bytes:
    lines = [line, "Host: x", "Content-Type: application/json", *headers]
    lines += [] if key is None else [f"Authorization: Bearer {key.secret}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def post(key: NewKey, *headers: str) -> bytes:
    return head("POST /v1/jobs HTTP/1.1", key, *headers)


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"\x00\x01\x02\r\n\r\n", 400, "invalid_http"),
        (b"GET /%s\r\n\r\n" % SECRET.encode(), 400, "invalid_http"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "invalid_http"),
        (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\nHost: x\n\n", 400, "invalid_http"),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA\x00B: 1\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: 1\x00\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400, "invalid_http"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "uri_too_long"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431, "header_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 65 + b"\r\n", 431, "header_too_large"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: magic\r\n\r\n", 417, "expectation_failed"),
    ],
    ids=range(15),
)
def test_a_malformed_head_is_a_problem(server, sent: bytes, status: int, code: str):
    (answer,) = send(server, sent)
    assert (answer.status, answer.code) == (status, code)
    assert code in {error.code for error in all_errors()}
    assert SECRET.encode() not in answer.body
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "headers",
    [
        ["Content-Length: -1"],
        ["Content-Length: 5x"],
        ["Content-Length: 0x10"],
        ["Content-Length: "],
        ["Content-Length: ²"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: nonsense"],
        ["Transfer-Encoding: chunked, identity"],
    ],
    ids=lambda headers: " and ".join(headers).encode("ascii", "replace").decode(),
)
def test_bad_framing_is_a_problem_and_ends_the_connection(server, key, headers: list[str]):
    (answer,) = send(server, post(key, *headers), BODY, post(key, "Content-Length: 0"))
    assert (answer.status, answer.code) == (400, "invalid_http")


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\nxx\r\n0\r\n\r\n",
        b"-5\r\nxxxxx\r\n0\r\n\r\n",
        b"5\r\nxxxxxyy\r\n0\r\n\r\n",
        b"5;\x00\r\nxxxxx\r\n0\r\n\r\n",
        b"5\nxxxxx\n0\n\n",
        b"5\r\nxxx",
        b"5\r\nxxxxx\r\n",
        b"f" * 9000,
        b"",
    ],
    ids=range(9),
)
def test_broken_chunks_are_a_problem_not_a_failure(server, key, chunks: bytes):
    (answer,) = send(server, post(key, "Transfer-Encoding: chunked"), chunks)
    assert (answer.status, answer.code) == (400, "invalid_http")


def test_chunked_by_http_1_0_is_refused(server, key):
    line = "POST /v1/jobs HTTP/1.0"
    (answer,) = send(server, head(line, key, "Transfer-Encoding: chunked"), b"0\r\n\r\n")
    assert (answer.status, answer.code) == (400, "invalid_http")


def test_a_body_that_ends_early_is_not_taken_for_a_shorter_one(server, key, services):
    before = len(services.ledger.list_jobs("mine", limit=100))
    length = f"Content-Length: {len(BODY) + 5}"
    (answer,) = send(server, post(key, length), BODY)
    assert (answer.status, answer.code) == (400, "invalid_http")
    assert len(services.ledger.list_jobs("mine", limit=100)) == before


def test_an_early_answer_reaches_a_client_that_is_still_sending(server, key):
    (answer,) = send(server, b"GET / HTTP/1.1\r\nX: " + b"a" * 1_000_000)
    assert (answer.status, answer.code) == (431, "header_too_large")


def test_a_body_that_dribbles_is_refused_in_time(server, key):
    """A byte now and then keeps no connection: the deadline is the whole body's."""
    with connect(server) as connection:
        connection.sendall(post(key, "Content-Length: 10000"))
        began = time.monotonic()
        connection.settimeout(BODY_TIMEOUT_S / 10)
        while True:
            try:
                if connection.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                connection.sendall(b" ")
            assert time.monotonic() - began < 30
        connection.settimeout(30)
        (answer,) = read_answers(connection)
    assert (answer.status, answer.code) == (408, "body_timeout")
    assert answer.headers["connection"] == "close"


def test_an_unread_body_that_dribbles_ends_its_connection(server):
    """Refused before the body was read, the connection waits no longer for it either."""
    with connect(server) as connection:
        connection.sendall(head("POST /v1/jobs HTTP/1.1", None, "Content-Length: 10000"))
        first, *late = read_answers(connection)
    assert first.status == 401
    assert [answer.code for answer in late] == ["body_timeout"]


def test_pipelined_requests_are_answered_in_order(server, key):
    length = f"Content-Length: {len(BODY)}"
    ready = head("GET /healthz HTTP/1.1")
    answers = send(server, post(key, length) + BODY + ready + post(key, length) + BODY + ready)
    assert [answer.status for answer in answers] == [202, 200, 202, 200]


def test_a_smuggled_request_in_a_body_is_no_request(server, key):
    inner = post(key, f"Content-Length: {len(BODY)}") + BODY
    sent = head("POST /v1/jobs HTTP/1.1", key, f"Content-Length: {len(inner)}") + inner
    (answer,) = send(server, sent)
    assert (answer.status, answer.code) == (400, "invalid_json")


@pytest.mark.parametrize("line", ["GET http://x/healthz HTTP/1.1", "GET /healthz HTTP/1.0"])
def test_absolute_form_and_http_1_0_are_served(server, line: str):
    (answer,) = send(server, head(line))
    assert answer.status == 200


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("OPTIONS * HTTP/1.1", 404),
        ("CONNECT x:80 HTTP/1.1", 404),
        ("TRACE /healthz HTTP/1.1", 405),
        ("GET //v1/jobs HTTP/1.1", 401),
        ("GET /v1/jobs/%00 HTTP/1.1", 401),
        ("GET /v1/jobs/%ff%fe HTTP/1.1", 401),
        ("GET /v1/../metrics HTTP/1.1", 404),
        ("GET /v1/jobs?%ff=%zz HTTP/1.1", 401),
        ("PRI * HTTP/2.0", 400),
    ],
)
def test_odd_targets_are_refused_like_any_other(server, line: str, status: int):
    (answer,) = send(server, head(line))
    assert answer.status == status
    assert answer.code


def test_a_post_without_a_length_has_an_empty_body(server, key):
    with connect(server) as connection:
        connection.sendall(post(key))
        connection.settimeout(20)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_expect_100_continue_is_honoured(server, key):
    with connect(server) as connection:
        connection.sendall(post(key, f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100 ")
        connection.sendall(BODY)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 202 ")
