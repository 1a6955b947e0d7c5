"""deploy/proxy/Caddyfile in front of a probe that knows what has arrived: each event by itself,
who asks, over how many connections, and TLS when a name is set.

What it does in front of the real gateway: test_compose_commands.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from headrace.tests.fleet.compose_file import DEPLOY, ROOT, SERVICES
from headrace.tests.fleet.local_services import LocalServices, program

CADDYFILE = DEPLOY / "proxy" / "Caddyfile"
NUM_EVENTS = 30
PATIENCE_S = 30.0


@dataclass
class Upstream:
    """An HTTP/1.1 server: `/events` sends the next event when told that the last has arrived."""

    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    connections: set[tuple[str, int]] = field(default_factory=set)
    server: ThreadingHTTPServer = field(init=False)

    def __post_init__(self) -> None:
        upstream = self

        class Probe(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                upstream.connections.add(self.client_address)
                self.send_response(200)
                if self.path == "/events":
                    self.send_header("Content-Type", "text/event-stream")
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    upstream.send_events(self)
                else:
                    body = json.dumps(dict(self.headers)).encode()
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Probe)

    def send_events(self, handler: BaseHTTPRequestHandler) -> None:
        for number in range(NUM_EVENTS):
            event = f"id: {number}\ndata: x\n\n".encode()
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            if not self.arrived.acquire(timeout=PATIENCE_S):
                return  # the chunked body stays unfinished, and the client sees an error
        handler.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    made = Upstream()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        thread.join()
        made.server.server_close()


@pytest.fixture
def local(tmp_path: Path, upstream: Upstream) -> Iterator[LocalServices]:
    made = LocalServices(tmp_path, tmp_path, tmp_path)
    made.ports["gateway", 8080] = upstream.server.server_address[1]
    try:
        yield made
    finally:
        made.stop()


def address(local: LocalServices) -> str:
    local.start_proxy()
    local.wait(lambda: local.is_healthy("proxy"), "the proxy is healthy")
    return f"http://127.0.0.1:{local.port('proxy', 8080)}"


def test_invariant_1_each_event_passes_before_the_next_is_made(local, upstream):
    seen = []
    with httpx.stream("GET", f"{address(local)}/events", timeout=PATIENCE_S) as answer:
        assert "content-encoding" not in answer.headers
        for part in answer.iter_raw():
            seen.append(part)
            upstream.arrived.release()
    assert seen == [f"id: {number}\ndata: x\n\n".encode() for number in range(NUM_EVENTS)]


def test_invariant_1_nothing_limits_how_long_an_answer_takes():
    adapted = adapt(":8080")
    for server in adapted["apps"]["http"]["servers"].values():
        assert set(server) & {"read_timeout", "write_timeout"} == set()
    text = json.dumps(adapted)
    assert '"flush_interval": -1' in text
    for limit in ("response_header_timeout", "read_timeout", "write_timeout", "encode"):
        assert f'"{limit}"' not in text, limit


def test_invariant_4_the_gateway_hears_who_asks_from_the_proxy_alone(local):
    lies = {
        "X-Forwarded-For": "10.9.8.7",
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "elsewhere.example",
        "X-Forwarded-Ssl": "on",
        "X-Forwarded-Protocol": "ssl",
        "Accept-Encoding": "identity",
    }
    heard = httpx.get(f"{address(local)}/", headers=lies, timeout=PATIENCE_S).json()
    told = {name.lower(): value for name, value in heard.items()}
    assert told["x-forwarded-for"] == "127.0.0.1"
    assert told["x-forwarded-proto"] == "http"
    assert told["x-forwarded-host"] == told["host"]
    assert "elsewhere" not in told["host"]
    assert not {"x-forwarded-ssl", "x-forwarded-protocol"} & set(told)


def test_connections_to_the_gateway_are_kept(local, upstream):
    url = f"{address(local)}/"
    for _ in range(20):  # each from a connection of its own
        assert httpx.get(url, timeout=PATIENCE_S).status_code == 200
    assert len(upstream.connections) == 1
    keepalive_s = re.search(r"^\s*keepalive (\d+)s", CADDYFILE.read_text(), re.MULTILINE)
    server = (ROOT / "gateway" / "server.py").read_text()
    gunicorn_s = re.search(r"^keepalive = (\d+)$", server, re.MULTILINE)
    assert keepalive_s is not None
    assert gunicorn_s is not None
    assert int(keepalive_s[1]) < int(gunicorn_s[1])


def test_a_gateway_that_is_away_is_a_problem_to_try_again(local, upstream):
    url = address(local)
    upstream.server.server_close()
    answer = httpx.get(f"{url}/", timeout=PATIENCE_S)
    assert answer.status_code == 502
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.json()["code"], answer.json()["retryable"]) == ("gateway_unavailable", True)


def test_a_name_brings_tls_and_plain_http_is_sent_there(local):
    local.start_proxy(site="localhost")
    local.wait(lambda: local.is_healthy("proxy"), "the proxy is healthy")
    made = local.writable("proxy", "/data") / "caddy"
    leaf = made / "certificates" / "local" / "localhost" / "localhost.crt"
    local.wait(leaf.is_file, "Caddy has made its certificate")
    trust = ssl.create_default_context(cafile=str(made / "pki/authorities/local/root.crt"))
    https = f"https://localhost:{local.port('proxy', 8443)}"

    def answers() -> httpx.Response | None:
        try:
            return httpx.get(f"{https}/", verify=trust, timeout=PATIENCE_S)
        except httpx.ConnectError:  # written, and not loaded yet
            return None

    answer = local.wait(answers, "the proxy has loaded its certificate")
    assert answer.json()["X-Forwarded-Proto"] == "https"
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    assert "alt-svc" not in answer.headers  # its port would be the container's
    inside = httpx.get(f"{https}/metrics", verify=trust, timeout=PATIENCE_S)
    assert inside.status_code == 404
    plain = httpx.get(f"http://localhost:{local.port('proxy', 8080)}/docs", timeout=PATIENCE_S)
    assert plain.status_code == 308
    assert plain.headers["location"] == "https://localhost/docs"  # the port that is published


def test_the_file_is_formatted_and_its_ports_are_the_ones_published():
    formatted = subprocess.run(
        [program("caddy"), "fmt", str(CADDYFILE)], capture_output=True, text=True, timeout=30
    )
    assert formatted.stdout == CADDYFILE.read_text()
    http = adapt("fleet.example.org")["apps"]["http"]
    inner = {int(port.rpartition(":")[2]) for port in SERVICES["proxy"]["ports"]}
    assert {http["http_port"], http["https_port"]} == inner == {8080, 8443}
    listening = {port for server in http["servers"].values() for port in server["listen"]}
    assert listening == {":8443", "127.0.0.1:8081"}  # 8080 only sends to HTTPS


def adapt(site: str) -> dict[str, dict]:
    """Return what Caddy reads from the file."""
    done = subprocess.run(
        [program("caddy"), "adapt", "--config", str(CADDYFILE), "--adapter", "caddyfile"],
        env={"PATH": os.environ["PATH"], "PROXY_SITE": site},
        capture_output=True,
        timeout=30,
        check=True,
    )
    return json.loads(done.stdout)
