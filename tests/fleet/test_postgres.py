"""The embedded Postgres: data, password, lock, identities, and its end with the parent."""

import os
import pwd
import signal
from pathlib import Path

import psycopg
import pytest

from headrace.fleet import identity
from headrace.fleet.failure import FleetError
from headrace.fleet.identity import choose_identity
from headrace.fleet.postgres import start_postgres

START = """
import pathlib, sys
from headrace.fleet.postgres import start_postgres
server = start_postgres(pathlib.Path({folder!r}))
print(server.pid, server.url, flush=True)
sys.stdin.read()
"""


def connect(url: str, **changes: str) -> psycopg.Connection:
    return psycopg.connect(url.replace("+psycopg", ""), **changes)


def test_data_survives_a_restart(tmp_path):
    folder = tmp_path / "a folder"
    with start_postgres(folder, durable=False) as server, connect(server.url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 'grüße' AS text")
        connection.commit()
    with start_postgres(folder, durable=False) as server, connect(server.url) as connection:
        assert connection.execute("SELECT text FROM kept").fetchone() == ("grüße",)
        assert connection.execute("SELECT current_setting('TimeZone')").fetchone() == ("UTC",)
        assert connection.info.dbname == "headrace"


def test_a_wrong_password_is_refused(tmp_path):
    refused = pytest.raises(psycopg.OperationalError, match="password authentication failed")
    with start_postgres(tmp_path, durable=False) as server, refused:
        connect(server.url, password="wrong")


def test_a_second_start_on_the_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.fleet.folder.HANDOVER_S", 0.1)
    refused = pytest.raises(FleetError, match="in use by another fleet")
    with start_postgres(tmp_path, durable=False), refused:
        start_postgres(tmp_path, durable=False)


def test_a_lost_password_is_named_and_not_waited_for(tmp_path):
    start_postgres(tmp_path, durable=False).stop()
    (tmp_path / "postgres" / "password").unlink()
    with pytest.raises(FleetError, match="refuses the password kept in"):
        start_postgres(tmp_path, durable=False)


def test_commits_survive_a_killed_parent_and_the_folder_is_free_again(tmp_path, python, wait_gone):
    parent = python(START.format(folder=str(tmp_path)))
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().split()
    with connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS n")
    server = os.pidfd_open(int(pid))
    parent.send_signal(signal.SIGKILL)
    assert wait_gone(server, 10)
    with start_postgres(tmp_path) as server, connect(server.url) as connection:
        assert connection.execute("SELECT n FROM kept").fetchone() == (1,)


def test_a_half_made_cluster_is_made_again(tmp_path):
    partial = tmp_path / "postgres" / "cluster.partial"
    partial.mkdir(parents=True)
    (partial / "PG_VERSION").write_text("18\n")
    with start_postgres(tmp_path, durable=False) as server, connect(server.url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not partial.exists()
    assert not (tmp_path / "postgres" / "initdb.password").exists()


def test_a_broken_cluster_ends_the_start_with_the_servers_own_words(tmp_path):
    start_postgres(tmp_path, durable=False).stop()
    (tmp_path / "postgres" / "cluster" / "PG_VERSION").write_text("9.6\n")
    with pytest.raises(FleetError, match=r"(?s)Postgres ended with.*HEADRACE_DATABASE_URL"):
        start_postgres(tmp_path, durable=False)


def refuse_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Docker's default seccomp profile does."""

    def refused() -> None:
        raise PermissionError("unshare")

    monkeypatch.setattr(identity, "_enter_namespace", lambda inside: refused)


def test_it_runs_where_user_namespaces_are_refused(tmp_path, monkeypatch):
    refuse_namespaces(monkeypatch)
    (tmp_path / "closed").mkdir(mode=0o700)
    for _ in range(2):  # the second start finds a cluster that may belong to another user
        with start_postgres(tmp_path / "closed", durable=False) as server:
            with connect(server.url) as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            status = Path(f"/proc/{server.pid}/status").read_text()
            expected = os.geteuid() or pwd.getpwnam("nobody").pw_uid
            assert f"Uid:\t{expected}\t{expected}\t" in status


def test_an_unnamed_user_without_namespaces_is_told_what_to_do(tmp_path, monkeypatch):
    refuse_namespaces(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 12345678)
    with pytest.raises(FleetError, match=r"12345678.*HEADRACE_DATABASE_URL"):
        choose_identity(tmp_path / "cluster", tmp_path / "postgres")
