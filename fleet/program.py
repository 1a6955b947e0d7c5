"""One of our programs as a child of `up`: its log, its restarts, its end.

Invariants:
1. A program that dies is started again after a growing pause, at most MAX_RESTARTS times in
   RESTART_WINDOW_S; then the fleet ends, because a program that cannot live hides a cause.
2. A program that has been stopped, or is started again, has left no process behind: it led a
   process group of its own, and the group is empty.

Called by `supervise`.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from headrace.fleet.child import log_tail, start_child, stop_child
from headrace.fleet.failure import FleetError

MAX_RESTARTS = 5
RESTART_WINDOW_S = 300.0

#: Pause before the first restart; it doubles with each death in the window.
FIRST_PAUSE_S = 0.5

#: What a program itself started (an engine, gunicorn's workers) ends this soon after it.
GROUP_GRACE_S = 5.0

POLL_S = 0.02


@dataclass(slots=True)
class Program:
    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log: Path
    grace_s: float  # from SIGTERM to SIGKILL
    process: subprocess.Popen[bytes] | None = None
    deaths: list[float] = field(default_factory=list)  # within the window, oldest first
    log_start: int = 0  # where the current process's lines begin
    started_at: float = 0.0

    def start(self) -> None:
        self.started_at = time.monotonic()
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        self.process = start_child(
            self.argv, log=self.log, env=self.env, death_signal=signal.SIGTERM
        )

    def run(self, timeout_s: float, stop: threading.Event) -> None:
        """Run a program that ends by itself, or until `stop`; raise FleetError if it fails."""
        self.start()
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            if stop.wait(POLL_S):
                self.stop()
                return
            if time.monotonic() > deadline:
                self.stop()
                raise FleetError(
                    f"{self.name} took longer than {timeout_s:.0f} s; the end of {self.log}:\n"
                    f"{log_tail(self.log, self.log_start)}"
                )
        self.raise_if_dead(allowed=0)

    def raise_if_dead(self, allowed: int | None = None) -> None:
        """Raise FleetError with the end of the log if it ended otherwise than with `allowed`."""
        if self.process is None or (code := self.process.poll()) is None or code == allowed:
            return
        raise FleetError(
            f"{self.name} {_ended(code)}; the end of {self.log}:\n"
            f"{log_tail(self.log, self.log_start)}"
        )

    def restart_if_dead(self) -> str | None:
        """Start it again once its pause is over; return what to say about it, if anything."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.kill()  # what it started and left: a second Celery beat would run beside the next one
        now = time.monotonic()
        if not self.deaths or self.deaths[-1] < self.started_at:
            self.deaths = [at for at in self.deaths if now - at < RESTART_WINDOW_S] + [now]
            if len(self.deaths) > MAX_RESTARTS:
                self.raise_if_dead()
            return f"{self.name} {_ended(code)}; it is started again"
        if now - self.deaths[-1] >= FIRST_PAUSE_S * 2 ** (len(self.deaths) - 1):
            self.start()
        return None

    def stop(self) -> None:
        """Stop it and all it started; idempotent."""
        if self.process is None:
            return
        stop_child(self.process, signal.SIGTERM, self.grace_s)
        deadline = time.monotonic() + GROUP_GRACE_S
        while group_lives(self.process.pid):
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(POLL_S)

    def kill(self) -> None:
        """End it and all it started, at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def group_lives(group: int) -> bool:
    """Say whether any process of the group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
