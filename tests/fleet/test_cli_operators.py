"""`headrace operators`, `headrace keys --role` and `headrace audit`, on a real database and API."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from dataclasses import dataclass

import pytest

from headrace.contract.audit import DONE, Audit, Entry
from headrace.contract.database import connect
from headrace.contract.errors import LoginRefused
from headrace.contract.operators import Operators
from headrace.contract.roles import Role
from headrace.contract.settings import GatewaySettings
from headrace.fleet.cli import run
from headrace.tests.gateway.test_server import running_gateway

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def engine(database_url):
    engine = connect(database_url)
    yield engine
    engine.dispose()


@dataclass
class Cli:
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    environ: dict[str, str]

    def __call__(self, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
        self.capsys.readouterr()
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = run(arguments, dict(self.environ))
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def json(self, *arguments: str, stdin: str = ""):
        code, out, err = self(*arguments, "--json", stdin=stdin)
        assert (code, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def headrace(capsys, monkeypatch, database_url) -> Cli:
    return Cli(capsys, monkeypatch, {"HEADRACE_DATABASE_URL": database_url})


def can_log_in(engine, name: str, password: str = PASSWORD) -> bool:
    try:
        return Operators(engine).login(name, password, None).operator == name
    except LoginRefused:
        return False


def test_an_operator_is_made_listed_changed_and_disabled(headrace, engine):
    code, out, err = headrace("operators", "create", "ada", stdin=PASSWORD + "\n")
    assert (code, out) == (0, "")
    assert "ada may log in as viewer" in err
    assert can_log_in(engine, "ada")
    assert headrace.json("operators", "role", "ada", "operator") == {
        "name": "ada", "role": "operator",
    }  # fmt: skip
    (listed,) = [row for row in headrace.json("operators", "list")["data"] if row["name"] == "ada"]
    assert listed["role"] == "operator"
    assert "password_hash" not in listed
    assert "ada" in headrace("operators", "list")[1]
    headrace.json("operators", "password", "ada", stdin=PASSWORD + "2\r\n")
    assert not can_log_in(engine, "ada")
    assert can_log_in(engine, "ada", PASSWORD + "2")
    headrace.json("operators", "disable", "ada")
    assert not can_log_in(engine, "ada", PASSWORD + "2")
    headrace.json("operators", "enable", "ada")
    assert can_log_in(engine, "ada", PASSWORD + "2")


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("create", "bob"), "short\n", "out_of_range"),
        (("create", "bob"), "", "standard input; it is empty"),
        (("create", "Bob"), PASSWORD, "out_of_range"),
        (("create", "taken"), PASSWORD, "name_taken"),
        (("password", "nobody"), PASSWORD, "not_found"),
        (("disable", "nobody"), "", "not_found"),
        (("role", "nobody", "viewer"), "", "not_found"),
        (("disable", "the-admin"), "", "last_admin"),
    ],
)
def test_what_cannot_be_done_is_said_and_ends_with_1(headrace, engine, arguments, stdin, said):
    known = {row["name"] for row in Operators(engine).list()}
    for name, role in (("taken", Role.VIEWER), ("the-admin", Role.ADMIN)):
        if name not in known:
            Operators(engine).create(name=name, password=PASSWORD, role=role)
    code, out, err = headrace("operators", *arguments, stdin=stdin)
    assert (code, out) == (1, "")
    assert said in err
    assert PASSWORD not in err


def test_a_role_that_is_none_is_wrong_usage(headrace):
    assert headrace("operators", "create", "bob", "--role", "root", stdin=PASSWORD)[0] == 2


def test_the_first_operator_is_made_only_where_there_is_none(headrace, engine):
    Operators(engine).create(name="somebody", password=PASSWORD, role=Role.VIEWER)
    made = headrace.json("operators", "create", "another", "--if-none")
    assert made == {"name": "another", "created": False}
    assert not can_log_in(engine, "another")


def read(leader: int) -> bytes:
    """Return what the terminal shows next; nothing when its process has ended."""
    ready, _, _ = select.select([leader], [], [], 30)
    assert ready, "the process neither wrote nor ended"
    try:
        return os.read(leader, 1024)
    except OSError:  # EIO: nobody has the other end open
        return b""


@pytest.mark.parametrize(("again", "code"), [(PASSWORD, 0), ("something else", 1)])
def test_on_a_terminal_the_password_is_asked_for_twice_and_not_shown(
    database_url, engine, again, code
):
    name = f"typed-{code}"
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.fleet", "operators", "create", name],
        env={
            "PATH": os.defpath,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HEADRACE_DATABASE_URL": database_url,
        },
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,  # or getpass would ask at the terminal of whoever runs the tests
    )
    os.close(follower)
    shown = b""
    # The last space of a prompt is written after the terminal's echo was turned off, and what was
    # typed before that is thrown away.
    for prompt, typed in ((b"Password: ", PASSWORD), (b"Again: ", again)):
        while prompt not in shown:
            part = read(leader)
            assert part, shown
            shown += part
        os.write(leader, typed.encode() + b"\n")
    while part := read(leader):
        shown += part
    assert process.wait(30) == code, shown
    os.close(leader)
    assert PASSWORD.encode() not in shown
    assert can_log_in(engine, name) is (code == 0)


def test_a_key_with_a_role_reads_the_audit_log(headrace, engine, database_url, redis_url, tmp_path):
    made = headrace.json("keys", "create", "--name", "ops", "--role", "admin")
    assert made["role"] == "admin"
    plain = headrace.json("keys", "create", "--name", "plain")
    assert plain["role"] is None
    audit = Audit(engine)
    for number in range(3):
        audit.write(Entry("ada", "operator", "admin", "worker.drain", "::1", f"w{number}"), DONE)
    settings = GatewaySettings.model_validate(
        {"redis_url": redis_url, "database_url": database_url}
    )
    with running_gateway(settings, tmp_path / "log", num_processes=1) as gateway:
        headrace.environ |= {"HEADRACE_API_URL": gateway.url, "HEADRACE_API_KEY": made["key"]}
        page = headrace.json("audit", "--actor", "ada", "--limit", "2")
        assert [row["target"] for row in page["audit"]] == ["w2", "w1"]
        rest = headrace.json("audit", "--actor", "ada", "--cursor", page["next_cursor"])
        assert [row["target"] for row in rest["audit"]] == ["w0"]
        assert rest["next_cursor"] is None
        code, out, err = headrace("audit", "--action", "worker.drain", "--limit", "1")
        assert code == 0
        assert "w2" in out
        assert "--cursor" in err
        headrace.environ |= {"HEADRACE_API_KEY": plain["key"]}
        code, out, err = headrace("audit")
        assert (code, out) == (1, "")
        assert "forbidden" in err
