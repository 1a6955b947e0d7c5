"""The supervisor: order, failures, restarts. Real servers; the three programs are small scripts."""

import os
import signal
import socket
import sys
import threading
import time

import pytest

from headrace.contract.roles import Role
from headrace.contract.settings import FleetSettings
from headrace.fleet import programs, supervise
from headrace.fleet.access import Access, read_access, write_access
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import accounts_at, operators_at
from headrace.fleet.supervise import Fleet, Stopped

#: Ready at once, and says that it serves the model `tiny`.
GATEWAY = """
import http.server, json, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": "tiny", "ready": True}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
host, port = os.environ["HEADRACE_BIND"].split(":")
http.server.HTTPServer((host, int(port)), Handler).serve_forever()
"""

IDLE = "import signal; signal.pause()"
FAILS = "import sys; sys.exit('cannot find my model')"


@pytest.fixture
def use(monkeypatch):
    """Put scripts in the place of gateway, worker and tasks."""

    def put(gateway: str = GATEWAY, worker: str = IDLE, tasks: str = IDLE) -> None:
        for name, script in (("gateway", gateway), ("worker", worker), ("tasks", tasks)):
            argv = [sys.executable, "-c", script]
            monkeypatch.setattr(programs, f"{name}_argv", lambda *_, argv=argv: argv)

    return put


@pytest.fixture
def given(redis_url, database_url, monkeypatch):
    """Settings of servers that run already, with their schema: most tests need no others."""
    monkeypatch.setattr(programs, "migrate_argv", lambda: [sys.executable, "-c", ""])
    return {"redis_url": redis_url, "database_url": database_url}


@pytest.fixture
def made(tmp_path):
    """Fleets on one folder; all are stopped at the end, and must have left nothing."""
    fleets: list[Fleet] = []
    said: list[str] = []

    def make(**settings: object) -> tuple[Fleet, threading.Event, list[str]]:
        stop = threading.Event()
        environ = {
            "PATH": os.defpath,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HEADRACE_MODEL": str(tmp_path / "tiny"),
        }
        values = FleetSettings.model_validate({"port": 0, **settings})
        fleets.append(Fleet(values, environ, tmp_path / "data", said.append, stop))
        return fleets[-1], stop, said

    yield make
    for fleet in fleets:
        fleet.stop()
        assert fleet.leftovers() == []


def test_the_next_fleet_of_the_folder_keeps_the_key(made, use, given):
    use()
    fleet, _, _ = made(**given)
    first = fleet.start()
    fleet.stop()
    assert fleet.leftovers() == []
    fleet, _, _ = made(**given)
    second = fleet.start()
    assert second.api_key == first.api_key


def test_a_key_that_the_database_does_not_know_is_replaced(made, use, given, tmp_path):
    use()
    kept = Access("http://127.0.0.1:1", f"hr_{'0' * 12}_{'0' * 48}", "", "")
    (tmp_path / "data").mkdir()
    write_access(tmp_path / "data", kept)
    fleet, _, _ = made(**given)
    assert fleet.start().api_key != kept.api_key


def test_a_key_without_a_role_is_replaced_by_one_that_opens_the_admin_api(
    made, use, given, tmp_path
):
    use()
    with accounts_at(given["database_url"]) as accounts:
        plain = accounts.create_key(tenant="default", name="of an older release").secret
        (tmp_path / "data").mkdir()
        write_access(tmp_path / "data", Access("http://127.0.0.1:1", plain, "", ""))
        fleet, _, _ = made(**given)
        access = fleet.start()
        principal = accounts.authenticate(access.api_key)
    assert principal is not None
    assert principal.role is Role.ADMIN


def test_the_first_start_makes_an_admin_and_the_next_ones_keep_it(made, use, redis_url, tmp_path):
    use()
    fleet, _, _ = made(redis_url=redis_url)  # a Postgres of its own: nobody made an operator there
    first = fleet.start()
    assert fleet.has_new_operator
    with operators_at(first.database_url) as operators:
        session = operators.login(first.operator, first.operator_password, None)
        assert (session.operator, session.role) == ("admin", Role.ADMIN)
        operators.create(name="other", password="x" * 12, role=Role.VIEWER)
    fleet.stop()
    assert (tmp_path / "data" / "operator-password").stat().st_mode & 0o777 == 0o600
    fleet, _, _ = made(redis_url=redis_url)
    second = fleet.start()
    assert not fleet.has_new_operator
    assert (second.operator, second.operator_password) == ("admin", first.operator_password)
    assert second.dashboard_url == f"{second.api_url}/dashboard"


def test_where_others_made_the_operators_none_is_made(made, use, given):
    use()
    with operators_at(given["database_url"]) as operators:
        before = {row["name"] for row in operators.list()}
        if not before:
            operators.create(name="theirs", password="x" * 12, role=Role.VIEWER)
            before = {"theirs"}
        fleet, _, _ = made(**given)
        access = fleet.start()
        assert {row["name"] for row in operators.list()} == before
    assert (access.operator, access.operator_password) == ("", "")
    assert not fleet.has_new_operator


def test_the_access_file_is_private(made, use, given, tmp_path):
    use()
    fleet, _, _ = made(**given)
    access = fleet.start()
    assert read_access(tmp_path / "data") == access
    assert (tmp_path / "data" / "fleet.json").stat().st_mode & 0o777 == 0o600
    for log in (tmp_path / "data" / "logs").iterdir():
        assert access.api_key not in log.read_text()


@pytest.mark.parametrize("name", ["gateway", "worker", "tasks"])
def test_a_program_that_fails_ends_the_start_with_its_words(made, use, given, tmp_path, name):
    slow = GATEWAY.replace('"ready": True', '"ready": False')
    use(**{"gateway": slow, name: FAILS})
    fleet, _, _ = made(**given)
    with pytest.raises(FleetError, match=rf"(?s){name} ended with code 1.*cannot find my model"):
        fleet.start()
    fleet.stop()
    assert fleet.leftovers() == []
    assert read_access(tmp_path / "data") is None


def test_a_failing_migration_ends_the_start(made, use, monkeypatch):
    use()
    monkeypatch.setattr(programs, "migrate_argv", lambda: [sys.executable, "-c", FAILS])
    fleet, _, _ = made()
    with pytest.raises(FleetError, match=r"(?s)migrate ended with code 1.*cannot find my model"):
        fleet.start()


def test_a_fleet_that_is_never_ready_says_where_to_look(made, use, given, monkeypatch, tmp_path):
    use(gateway=GATEWAY.replace('"ready": True', '"ready": False'))
    monkeypatch.setattr(supervise, "READY_TIMEOUT_S", 0.2)
    fleet, _, _ = made(**given)
    with pytest.raises(FleetError, match=str(tmp_path / "data" / "logs")):
        fleet.start()


def test_a_taken_port_is_named_before_anything_starts(made, use, tmp_path):
    use()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        fleet, _, _ = made(port=other.getsockname()[1])
        with pytest.raises(FleetError, match="HEADRACE_PORT"):
            fleet.start()
    assert not (tmp_path / "data" / "valkey").exists()


def test_a_second_fleet_on_the_folder_is_refused_and_harms_nothing(made, use, given, monkeypatch):
    use()
    monkeypatch.setattr("headrace.fleet.folder.HANDOVER_S", 0.1)
    fleet, _, _ = made(**given)
    fleet.start()
    other, _, _ = made(**given)
    with pytest.raises(FleetError, match="in use by another fleet"):
        other.start()
    assert set(fleet.leftovers()) == {"gateway", "worker", "tasks"}


def test_a_stop_during_the_start_is_heard(made, use, given, monkeypatch):
    use(gateway=GATEWAY.replace('"ready": True', '"ready": False'))
    fleet, stop, _ = made(**given)
    waiting = threading.Event()
    monkeypatch.setattr(fleet, "_say", lambda text: "waiting" in text and waiting.set())

    def stop_later() -> None:
        waiting.wait(30)
        stop.set()

    thread = threading.Thread(target=stop_later)
    thread.start()
    with pytest.raises(Stopped):
        fleet.start()
    thread.join()
    fleet.stop()
    assert fleet.leftovers() == []


def test_what_dies_is_started_again_the_servers_on_their_ports(made, use):
    use()
    fleet, stop, said = made()
    access = fleet.start()
    before = {server.name: server.pid for server in fleet._servers}
    worker = fleet._programs[1]
    old = worker.process.pid
    for pid in (*before.values(), old):
        os.kill(pid, signal.SIGKILL)

    def stop_when_all_is_back() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not stop.wait(0.02):
            servers = all(server.is_alive() for server in fleet._servers)
            new = {server.name: server.pid for server in fleet._servers}
            if servers and not new.items() & before.items() and worker.process.pid != old:
                break
        stop.set()

    thread = threading.Thread(target=stop_when_all_is_back)
    thread.start()
    fleet.watch()
    thread.join()
    assert {server.url for server in fleet._servers} == {access.redis_url, access.database_url}
    assert worker.process.pid != old
    assert "worker was ended by SIGKILL; it is started again" in said
    assert sum("started again" in text for text in said) == 3


def test_the_stop_goes_from_the_gateway_to_postgres(made, use, tmp_path):
    marks = tmp_path / "marks"
    script = (
        "import signal, sys, os\n"
        "def end(*_):\n"
        "    with open({marks!r}, 'a') as file: file.write('{name} ')\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
    )
    scripts = {
        name: script.format(marks=str(marks), name=name)
        + (GATEWAY if name == "gateway" else "signal.pause()")
        for name in ("gateway", "worker", "tasks")
    }
    use(**scripts)
    fleet, _, _ = made()
    fleet.start()
    fleet.stop()
    assert marks.read_text().split() == ["gateway", "worker", "tasks"]
    logs = [tmp_path / "data" / name / "log" for name in ("valkey", "postgres")]
    assert "bye bye" in logs[0].read_text()
    assert "database system is shut down" in logs[1].read_text()


def test_given_servers_are_used_and_not_stopped(made, use, given, tmp_path, valkey, postgres):
    use()
    fleet, _, _ = made(**given)
    access = fleet.start()
    assert (access.redis_url, access.database_url) == tuple(given.values())
    assert not (tmp_path / "data" / "postgres").exists()
    fleet.stop()
    assert valkey.is_alive()
    assert postgres.is_alive()


def test_worker_and_tasks_serve_their_metrics_on_two_ports(tmp_path):
    values, said, stop = FleetSettings(), list[str](), threading.Event()
    environ = {"HEADRACE_METRICS_BIND": "127.0.0.1:9464"}
    fleet = Fleet(values, environ, tmp_path, said.append, stop)
    assert fleet._tasks_bind() == {"HEADRACE_METRICS_BIND": "127.0.0.1:9465"}
    assert Fleet(values, {}, tmp_path, said.append, stop)._tasks_bind() == {}
