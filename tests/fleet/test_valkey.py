"""The embedded Valkey: data, password, lock, and its end with the parent."""

import os
import signal
import stat

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.fleet import server
from headrace.fleet.failure import FleetError
from headrace.fleet.folder import lock_folder
from headrace.fleet.valkey import start_valkey

START = """
import pathlib, sys
from headrace.fleet.valkey import start_valkey
server = start_valkey(pathlib.Path({folder!r}))
print(server.pid, server.url, flush=True)
sys.stdin.read()
"""


def test_data_survives_a_restart(tmp_path):
    folder = tmp_path / "a folder"
    with start_valkey(folder) as server, redis.Redis.from_url(server.url) as client:
        client.set("kept", "yes")
        stream = client.xadd("stream", {"n": 1})
    with start_valkey(folder) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"
        assert client.xrange("stream") == [(stream, {b"n": b"1"})]


def test_a_wrong_or_missing_password_is_refused(tmp_path):
    with start_valkey(tmp_path) as server:
        for password in ("wrong", None):
            refused = pytest.raises(redis.AuthenticationError)
            once = Retry(NoBackoff(), 0)
            with redis.Redis(port=server.port, password=password, retry=once) as client, refused:
                client.ping()


def test_secrets_are_private_and_on_no_command_line(tmp_path):
    with start_valkey(tmp_path) as server:
        password = (tmp_path / "valkey" / "password").read_text()
        assert password in server.url
        for name in ("password", "valkey.conf", "log"):
            assert stat.S_IMODE((tmp_path / "valkey" / name).stat().st_mode) == 0o600
        with open(f"/proc/{server.pid}/cmdline") as file:
            assert password not in file.read()
        with open(f"/proc/{server.pid}/environ") as file:
            assert password not in file.read()


def test_a_second_start_on_the_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.fleet.folder.HANDOVER_S", 0.1)
    refused = pytest.raises(FleetError, match=f"in use by another fleet.*pid {os.getpid()}")
    with start_valkey(tmp_path), refused:
        start_valkey(tmp_path)
    start_valkey(tmp_path).stop()


def test_it_ends_with_a_killed_parent_and_the_folder_is_free_again(tmp_path, python, wait_gone):
    parent = python(START.format(folder=str(tmp_path)))
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().split()
    with redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
    server = os.pidfd_open(int(pid))
    parent.send_signal(signal.SIGKILL)
    assert wait_gone(server, 10)
    with start_valkey(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"


def test_stop_is_idempotent_and_frees_the_folder(tmp_path):
    server = start_valkey(tmp_path)
    server.stop()
    server.stop()
    assert not server.is_alive()
    os.close(lock_folder(tmp_path / "valkey", wait_s=0))


def test_a_taken_port_is_tried_again_and_another_servers_answer_not_taken(tmp_path, monkeypatch):
    with start_valkey(tmp_path / "first") as first:
        ports = iter([first.port, first.port])
        free = server.free_port
        monkeypatch.setattr("headrace.fleet.server.free_port", lambda: next(ports, None) or free())
        with start_valkey(tmp_path / "second") as second:
            assert second.port != first.port
            assert next(ports, None) is None, "both taken ports were tried"
            with redis.Redis.from_url(second.url) as client:
                assert client.ping()


def test_a_broken_file_ends_the_start_with_the_servers_own_words(tmp_path):
    start_valkey(tmp_path).stop()
    (manifest,) = (tmp_path / "valkey" / "appendonlydir").glob("*.manifest")
    manifest.write_text("nonsense\n")
    with pytest.raises(FleetError, match=r"(?s)embedded Valkey ended with.*HEADRACE_REDIS_URL"):
        start_valkey(tmp_path)


def test_an_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FleetError, match="HEADRACE_DATA_DIR"):
        start_valkey(tmp_path / "file")
