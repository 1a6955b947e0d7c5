"""Where an engine stands when it stands still, or died of a signal: the stacks of its threads.

The engine gets a file from its courier and tells faulthandler to write there: on DUMP_SIGNAL, and
when the process dies of SIGSEGV, SIGFPE, SIGABRT, SIGBUS or SIGILL. Those are handlers in C, which
need neither the interpreter nor its lock: they also work while a thread hangs in C code with the
lock held. What hangs in the kernel runs no handler at all, so the courier also reads what the
kernel says of the threads.

Invariants:
1. A dump names files, lines and functions; it holds no value, so no prompt and no secret.
2. Asking for one waits DUMP_S at most and touches no device: what hangs there must not hang us.

Called by: worker/engine/loop (write_to), engine_link (StackFile), engine_watch (what is told).
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

#: What an engine is asked for its stacks with.
DUMP_SIGNAL = signal.SIGUSR1
#: Seconds an asked engine has to write; it takes milliseconds unless it can run no handler.
DUMP_S = 2.0
#: Seconds without another byte after which a dump counts as whole.
QUIET_S = 0.05
#: Bytes of a dump that are read, threads that the kernel is asked about.
MAX_BYTES, MAX_THREADS = 256 << 10, 64

_THREAD = re.compile(r"^(Current thread|Thread) (0x[0-9a-f]+)(?: \[([^\]]*)\])?", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"]*)", line (\d+) in (.*)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ThreadStack:
    """One thread, innermost frame first."""

    name: str
    frames: tuple[str, ...]  # loop.py:150 step

    def __str__(self) -> str:
        return " < ".join(self.frames) or "no Python frame"


def write_to(fd: int) -> None:
    """Let this process write its stacks to a file whenever it is asked or dies of a signal."""
    faulthandler.enable(file=fd, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file=fd, all_threads=True, chain=False)


class StackFile:
    """The file of one engine: a name nowhere, gone with its last holder."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="headrace-stacks-")  # noqa: SIM115  see close

    def fileno(self) -> int:
        return self._file.fileno()

    def ask(self, pid: int) -> list[ThreadStack]:
        """Let the engine write now and return what it wrote; empty when it could not."""
        deadline = time.monotonic() + DUMP_S
        try:
            os.kill(pid, DUMP_SIGNAL)
        except ProcessLookupError:
            return self.read()
        size = begun = os.fstat(self.fileno()).st_size
        grown_at = time.monotonic()
        while time.monotonic() < deadline:
            time.sleep(0.01)
            now = os.fstat(self.fileno()).st_size
            if now != size:
                size, grown_at = now, time.monotonic()
            elif size > begun and time.monotonic() - grown_at > QUIET_S:
                break
        return self.read(begun)

    def read(self, begin: int = 0) -> list[ThreadStack]:
        """Return what was written from an offset on; the engine's own offset stays."""
        text = os.pread(self.fileno(), MAX_BYTES, begin).decode(errors="replace")
        marks = list(_THREAD.finditer(text))
        ends = [*(mark.start() for mark in marks), len(text)][1:]
        return [
            _stack(mark, text[mark.end() : end]) for mark, end in zip(marks, ends, strict=False)
        ]

    def close(self) -> None:
        self._file.close()


def kernel_states(pid: int) -> list[str]:
    """Return what the kernel says of a process's threads, as `python:D:io_schedule`.

    The letter is ps(1)'s: R runs, S sleeps, D cannot be interrupted, T is stopped. Empty where the
    system does not tell.
    """
    found: list[str] = []
    try:
        tasks = sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name))
        for task in tasks[:MAX_THREADS]:
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            found.append(f"{name}:{rest.split()[0]}:{(task / 'wchan').read_text() or '0'}")
    except OSError:  # no Linux, a thread that ended, or a process that is no longer ours to ask
        return found
    return found


def _stack(mark: re.Match[str], text: str) -> ThreadStack:
    name = (mark[3] or "").strip() or mark[2]
    is_current = mark[1] == "Current thread"
    frames = tuple(
        f"{os.path.basename(file)}:{line} {function}"
        for file, line, function in _FRAME.findall(text)
    )
    return ThreadStack(f"{name} (current)" if is_current else name, frames)
