"""Where a process stands that hangs: told by handlers in C, whatever holds the interpreter."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from headrace.worker import stacks
from headrace.worker.stacks import StackFile, ThreadStack, kernel_states

#: Each ends in what never comes back; a call by PyDLL holds the interpreter's lock meanwhile.
WAYS = {
    "in C, with the interpreter's lock": "deadlock(ctypes.PyDLL(None))",
    "in C, without it": "deadlock(ctypes.CDLL(None))",
    "in Python": "\n    while True: pass",
}
CODE = """
import ctypes, sys, threading
from headrace.worker import stacks
stacks.write_to(int(sys.argv[1]))
threading.Thread(target=threading.Event().wait, daemon=True).start()
def deadlock(library):
    mutex = ctypes.create_string_buffer(64)
    while True:
        library.pthread_mutex_lock(mutex)
def hang():
    print("hangs now", flush=True)
    {way}
def step():
    hang()
step()
"""


@contextmanager
def hanging(way: str) -> Iterator[tuple[subprocess.Popen[str], StackFile]]:
    file = StackFile()
    child = subprocess.Popen(
        [sys.executable, "-c", CODE.format(way=way), str(file.fileno())],
        pass_fds=[file.fileno()],
        env={"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "hangs now\n"
        yield child, file
    finally:
        child.kill()
        child.communicate()
        file.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_hangs_says_where(way):
    with hanging(WAYS[way]) as (child, file):
        deadline = time.monotonic() + 60
        while _functions(file.ask(child.pid)) != ["hang", "step", "<module>"]:
            assert time.monotonic() < deadline  # it says that it hangs a moment before it does
        assert child.poll() is None, "it was asked, not ended"
        assert len(file.ask(child.pid)) == 2, "the newest dump alone"


def _functions(found: list[ThreadStack]) -> list[str]:
    """Return where the main thread is, innermost first."""
    return [
        frame.split()[1]
        for stack in found
        if len(found) == 2 and "step" in str(stack)
        for frame in stack.frames
        if "deadlock" not in frame
    ]


def test_a_process_that_dies_of_a_signal_leaves_its_stacks():
    with hanging("ctypes.string_at(0)") as (child, file):
        assert child.wait(60) == -11
        (main,) = [stack for stack in file.read() if "(current)" in stack.name]
        assert [frame.split()[1] for frame in main.frames][-3:] == ["hang", "step", "<module>"]


def test_invariant_2_a_process_that_can_run_no_handler_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(stacks, "DUMP_S", 0.2)
    with hanging("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)") as (child, file):
        deadline = time.monotonic() + 60
        while not any(state.split(":")[1] == "T" for state in kernel_states(child.pid)):
            assert time.monotonic() < deadline
        assert file.ask(child.pid) == []
        assert len(kernel_states(child.pid)) == 2


def test_a_process_that_is_gone_is_asked_without_harm():
    with hanging("sys.exit()") as (child, file):
        child.wait(60)
        assert file.ask(child.pid) == []
        assert kernel_states(child.pid) == []


def test_invariant_1_no_value_is_in_a_dump():
    way = "secret = 'prompt of a user'; deadlock(ctypes.CDLL(None))"
    with hanging(way) as (child, file):
        file.ask(child.pid)
        file._file.seek(0)
        assert b"prompt" not in file._file.read()
