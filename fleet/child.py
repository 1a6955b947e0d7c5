"""Processes that end with their parent, however it ends.

Invariants:
1. A child has PDEATHSIG before it runs a line of its program, and a child whose parent died before
   that exits at once. So a SIGKILL of the parent leaves nothing running. Linux only: macOS has no
   such signal, there only an orderly stop (or Ctrl-C) ends the children.
2. Children are started from the main thread. The kernel sends PDEATHSIG when the *thread* that
   forked ends, so a child started from a pool thread would be stopped when the pool shrinks.
3. A child has its own session. Ctrl-C in a terminal goes to the whole foreground group; without
   this Postgres would be gone before the gateway that still writes to it.
4. The child's environment is what the caller passed, nothing else.

Called by `valkey`, `postgres` (servers) and `supervise` (our own programs).
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1

POLL_S = 0.01

#: Starts of a child whose `before_exec` failed: a change of user was seen to fail twice in sixty
#: starts of a busy machine, and never again.
NUM_TRIES = 3

#: How many lines of a child's log an error shows.
TAIL_LINES = 30


def start_child(
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str],
    death_signal: signal.Signals,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    before_exec: Callable[[], None] | None = None,  # runs in the child: no imports, no locks
) -> subprocess.Popen[bytes]:
    """Start `argv` with both outputs appended to `log`, tied to this process."""
    assert threading.current_thread() is threading.main_thread(), "invariant 2"
    tie = _tie_to_parent(death_signal)

    def prepare() -> None:
        if before_exec is not None:
            try:
                before_exec()
            except Exception as error:
                os.write(2, f"before exec: {error!r}\n".encode())  # subprocess tells no more
                raise
        tie()  # last: a change of user clears PDEATHSIG

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            env=dict(env),
            cwd=cwd,
            pass_fds=tuple(pass_fds),
            start_new_session=True,
            preexec_fn=prepare,
        )

    try:
        for _ in range(NUM_TRIES - 1):
            try:
                return start()
            except subprocess.SubprocessError:  # before_exec: its error is in the log
                continue
        return start()
    finally:
        os.close(handle)


def _tie_to_parent(death_signal: signal.Signals) -> Callable[[], None]:
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork: the child must not enter the loader
    parent = os.getpid()

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return tie


def stop_child(process: subprocess.Popen[bytes], how: signal.Signals, grace_s: float) -> None:
    """Signal the child and wait for it; after `grace_s` it is killed."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until(
    is_ready: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float
) -> bool:
    """Poll until ready; False when the child ended or the time is up."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if is_ready():
            return True
        time.sleep(POLL_S)
    return False


def log_tail(log: Path, start: int = 0, num_lines: int = TAIL_LINES) -> str:
    """Return the last lines that were written to `log` after byte `start`."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - 64 * 1024))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return "(no log)"
    return "\n".join(lines[-num_lines:]) or "(the log is empty)"
