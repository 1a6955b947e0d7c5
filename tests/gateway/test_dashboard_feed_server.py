"""The feed under gunicorn: many browsers, the end of a session, a stop; and streams that report."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from headrace.contract.live import Sampled, Snapshot
from headrace.contract.roles import Role
from headrace.gateway.openapi import SESSION_COOKIE
from headrace.tests.gateway.operators import make_operator
from headrace.tests.gateway.test_server import post, running_gateway, until

PATIENCE_S = 30


@pytest.fixture(scope="module")
def server(settings, app, tmp_path_factory):
    log = tmp_path_factory.mktemp("feed") / "log"
    with running_gateway(settings, log, num_processes=2) as running:
        yield running


@pytest.fixture
def viewer(server, services):
    key = services.accounts.create_key(tenant="mine", name="viewer", role=Role.VIEWER)
    headers = {"Authorization": f"Bearer {key.secret}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client:
        yield client


def test_browsers_of_both_processes_hear_of_a_change(viewer, services, courier):
    def listen(_: int) -> str:
        with viewer.stream("GET", "/v1/admin/feed") as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    overview = json.loads(line[6:]).get("overview", {})
                    if overview.get("num_queued") == 77:
                        return line
        raise AssertionError("the feed ended")

    with ThreadPoolExecutor(20) as pool:
        following = [pool.submit(listen, number) for number in range(20)]
        sampled_ms = int(time.time() * 1000)
        services.live.save(
            Sampled(at_ms=sampled_ms, sample={"at": "now", "num_queued": 77}, alarms=[]),
            Snapshot(at_ms=sampled_ms, counts={}, workers={}),
            {"at": 1.0},
            None,
        )
        assert len([one.result(PATIENCE_S) for one in following]) == 20


def test_a_feed_ends_when_its_session_does(server, app, services):
    session = make_operator(app, "ada", Role.VIEWER)
    cookies = {SESSION_COOKIE: session.token}
    with (
        httpx.Client(base_url=server.url, cookies=cookies, timeout=PATIENCE_S) as client,
        client.stream("GET", "/v1/admin/feed") as answer,
    ):
        lines = answer.iter_lines()
        until(lines, "event: state")
        services.operators.logout(session.token)
        for _ in lines:
            pass  # until the gateway ends it
    assert httpx.get(server.url + "/v1/admin/feed", cookies=cookies).status_code == 401


def test_open_streams_are_reported_and_forgotten(server, services, key, courier):
    headers = {"Authorization": f"Bearer {key.secret}"}
    deadline = time.monotonic() + PATIENCE_S
    with httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client:
        job = post(client).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            lines = answer.iter_lines()  # kept: the response closes with it
            until(lines, "event: queued")
            while services.live.num_streams() != 1:
                assert time.monotonic() < deadline
    while services.live.num_streams() != 0:
        assert time.monotonic() < deadline


def test_a_stop_ends_feeds_at_once(settings, services, app, tmp_path):
    key = services.accounts.create_key(tenant="mine", name="viewer", role=Role.VIEWER)
    headers = {"Authorization": f"Bearer {key.secret}"}
    with running_gateway(settings, tmp_path / "log", num_processes=1) as own:
        with (
            httpx.Client(base_url=own.url, headers=headers, timeout=PATIENCE_S) as client,
            client.stream("GET", "/v1/admin/feed") as answer,
        ):
            lines = answer.iter_lines()
            until(lines, "event: state")
            own.process.terminate()
            for _ in lines:
                pass
        assert own.process.wait(PATIENCE_S) == 0
        log = own.log.read_text()
        assert "graceful timeout" not in log, "the feed was not ended, it was killed"
        assert "Traceback" not in log
