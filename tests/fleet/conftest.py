"""Fixtures of the tests that kill processes."""

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def python() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start Python on a script, with our packages importable; its standard output is a pipe."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def wait_gone() -> Callable[[int, float], bool]:
    """Wait until the process has ended; False when the time is up first."""

    def wait(handle: int, timeout_s: float) -> bool:
        ended, _, _ = select.select([handle], [], [], timeout_s)
        os.close(handle)
        return bool(ended)

    return wait
