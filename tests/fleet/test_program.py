"""A program of the fleet: log, restart, end of its whole group. The program is a small script."""

import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from headrace.fleet import program as module
from headrace.fleet.failure import FleetError
from headrace.fleet.program import Program, group_lives
from headrace.fleet.programs import child_environment

#: Says `up` and its child's pid, and lives until it is told to end; its child ignores SIGTERM.
PARENT = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True);"
    "signal.pause()"])
signal.pause()
"""


def program(tmp_path: Path, script: str, grace_s: float = 5.0) -> Program:
    argv = [sys.executable, "-c", script]
    return Program("thing", argv, {"PATH": os.defpath}, tmp_path / "thing.log", grace_s)


def wait_for(happened, timeout_s: float = 10.0) -> None:
    """Poll what another process does; there is nothing to wait on."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


def test_stop_ends_what_the_program_started_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP_GRACE_S", 0.1)
    thing = program(tmp_path, PARENT)
    thing.start()
    assert thing.process is not None
    wait_for(lambda: "up" in thing.log.read_text())
    thing.stop()
    assert thing.process.returncode == -signal.SIGTERM
    assert not group_lives(thing.process.pid)
    thing.stop()


def test_what_a_dead_program_left_is_ended_before_the_next_one(tmp_path):
    thing = program(tmp_path, PARENT)
    thing.start()
    wait_for(lambda: "up" in thing.log.read_text())
    assert thing.process is not None
    thing.process.kill()
    thing.process.wait()
    assert group_lives(thing.process.pid), "its child goes on without it"
    assert thing.restart_if_dead() is not None
    group = thing.process.pid
    wait_for(lambda: not group_lives(group))


def test_a_program_that_ignores_sigterm_is_killed_after_its_grace(tmp_path):
    script = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True);"
    thing = program(tmp_path, script + "signal.pause()", grace_s=0.1)
    thing.start()
    wait_for(lambda: "up" in thing.log.read_text())
    thing.stop()
    assert thing.process is not None
    assert thing.process.returncode == -signal.SIGKILL


def test_a_dead_program_is_started_again_with_growing_pauses(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    thing = program(tmp_path, "print('once')")
    pauses = []
    thing.start()
    for _ in range(module.MAX_RESTARTS):
        assert thing.process is not None
        first = thing.process
        first.wait()
        assert thing.restart_if_dead() == "thing ended with code 0; it is started again"
        died = now[0]
        while thing.process is first:
            now[0] += 0.25
            assert thing.restart_if_dead() is None
        pauses.append(now[0] - died)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0]
    thing.process.wait()
    with pytest.raises(FleetError, match=r"(?s)thing ended with code 0; the end of .*once"):
        thing.restart_if_dead()


def test_deaths_outside_the_window_are_forgotten(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    thing = program(tmp_path, "")
    for _ in range(module.MAX_RESTARTS + 3):
        thing.start()
        assert thing.process is not None
        thing.process.wait()
        thing.restart_if_dead()
        now[0] += module.RESTART_WINDOW_S
    assert len(thing.deaths) == 1


def test_a_failing_run_shows_its_own_last_lines_and_no_older_ones(tmp_path):
    (tmp_path / "thing.log").write_text("old line\n")
    thing = program(tmp_path, "import sys; print('why'); sys.exit(3)")
    with pytest.raises(FleetError, match=r"(?s)thing ended with code 3.*why") as caught:
        thing.run(30, threading.Event())
    assert "old line" not in caught.value.detail


def test_a_run_ends_with_its_time_or_when_it_is_stopped(tmp_path):
    endless = "import signal; signal.pause()"
    with pytest.raises(FleetError, match="took longer than 0 s"):
        program(tmp_path, endless).run(0.1, threading.Event())
    stop = threading.Event()
    stop.set()
    thing = program(tmp_path, endless)
    thing.run(30, stop)
    assert thing.process is not None
    assert thing.process.returncode is not None


def test_a_killed_fleet_takes_its_programs_along(tmp_path, python, wait_gone):
    parent = python(
        "import sys, pathlib; from headrace.fleet.program import Program\n"
        f"thing = Program('thing', [sys.executable, '-c', 'import signal; signal.pause()'], {{}},"
        f" pathlib.Path({str(tmp_path / 'log')!r}), 1.0)\n"
        "thing.start(); print(thing.process.pid, flush=True); sys.stdin.read()"
    )
    assert parent.stdout is not None
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    assert wait_gone(child, 10)


def test_children_get_no_key_and_no_file_that_overrides_what_the_fleet_set():
    environ = {
        "PATH": "/bin",
        "HEADRACE_API_KEY": "hr_x",
        "HEADRACE_DATABASE_URL_FILE": "/run/secrets/url",
        "HEADRACE_REDIS_URL_FILE": "/run/secrets/redis",
    }
    assert child_environment(environ, {"HEADRACE_DATABASE_URL": "mine"}) == {
        "PATH": "/bin",
        "HEADRACE_REDIS_URL_FILE": "/run/secrets/redis",
        "HEADRACE_DATABASE_URL": "mine",
    }
