"""An embedded server: a child process on a loopback port, with its address and its end.

Invariants:
1. A server that was returned answered, with its own password, on its own port: another program on
   the same port cannot pass for it.
2. Free ports are found by binding port 0 and letting go, which another process can win; a server
   that finds its port taken is started again on another one, a bounded number of times. Any other
   failure ends at once, with its log.
3. The folder's lock is let go after the process has ended.

Called by `valkey` and `postgres`.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.fleet.child import log_tail, stop_child, wait_until
from headrace.fleet.failure import FleetError

#: Losing the race for a port five times in a row is not a race.
PORT_TRIES = 5

#: Replaying a large append-only file or a write-ahead log takes time; a server that answers nothing
#: for this long is stuck.
READY_S = 60.0

STOP_GRACE_S = 15.0


@dataclass(slots=True)
class Server:
    """A running server. `stop` is idempotent; leaving the `with` block stops it."""

    name: str
    url: str  # holds the password
    port: int
    log: Path
    process: subprocess.Popen[bytes]
    stop_signal: signal.Signals
    lock: int | None  # descriptor; None once stopped

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Stop the server in an orderly way, wait for it, and unlock its folder."""
        stop_child(self.process, self.stop_signal, STOP_GRACE_S)
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def start_on_free_port(
    name: str,
    launch: Callable[[int], subprocess.Popen[bytes]],
    is_ready: Callable[[int], bool],
    log: Path,
    fixed_port: int | None,  # the only port to try: a restart that clients must not notice
    setting: str,  # the variable that names a real server instead
) -> tuple[int, subprocess.Popen[bytes]]:
    """Launch on free ports until the server answers; raise FleetError with its log otherwise."""
    for _ in range(PORT_TRIES):
        port = fixed_port or free_port()
        start = log.stat().st_size if log.exists() else 0
        process = launch(port)
        try:
            if wait_until(lambda port=port: is_ready(port), process, READY_S):
                return port, process
        except BaseException:
            process.kill()
            process.wait()
            raise
        code = process.poll()
        if code is None:
            process.kill()
            process.wait()
        said = log_tail(log, start)
        if code is not None and "address already in use" in said.lower():
            continue
        found = f"did not answer within {READY_S:.0f} s" if code is None else f"ended with {code}"
        raise FleetError(
            f"the embedded {name} {found}; the end of {log}:\n{said}\n"
            f"Correct that, or set {setting} to a server of your own"
        )
    raise FleetError(
        f"the embedded {name} found {PORT_TRIES} ports taken, one after another: try again"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
