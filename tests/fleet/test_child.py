"""Starting children: what goes wrong before their program begins."""

import signal
import subprocess
from pathlib import Path

import pytest

from headrace.fleet.child import NUM_TRIES, start_child


def failing(tries: Path, num_failures: int):
    """Return a `before_exec` that fails so many times, counted in a file: it runs in children."""

    def before_exec() -> None:
        with tries.open("a") as file:
            file.write(".")
        if tries.stat().st_size <= num_failures:
            raise PermissionError(13, "unshare")

    return before_exec


def start(tmp_path: Path, num_failures: int) -> subprocess.Popen[bytes]:
    return start_child(
        ["/bin/echo", "it runs"],
        log=tmp_path / "log",
        env={},
        death_signal=signal.SIGKILL,
        before_exec=failing(tmp_path / "tries", num_failures),
    )


def test_a_start_that_fails_before_its_program_is_tried_again(tmp_path):
    assert start(tmp_path, NUM_TRIES - 1).wait(60) == 0
    log = (tmp_path / "log").read_text()
    assert log.count("before exec: PermissionError(13, 'unshare')") == NUM_TRIES - 1
    assert log.endswith("it runs\n")


def test_one_that_always_fails_is_told_by_its_log(tmp_path):
    with pytest.raises(subprocess.SubprocessError):
        start(tmp_path, NUM_TRIES)
    assert (tmp_path / "log").read_text().count("before exec") == NUM_TRIES
