"""The whole fleet in one folder on one machine: started in order, watched, stopped in order.

Start: servers, schema, key, operator, model, then gateway, worker and tasks together; ready when
the gateway says so and lists the model as ready. A failure on the way ends the start with the
failing program's last lines; a program that dies later is started again.

Stop, and why in this order:
1. gateway: nothing new is taken in; subscribers lose their stream and come back to the next fleet.
2. worker: it finishes or hands back what runs, and writes to Redis and Postgres while it does.
3. tasks: last of our own, so that the outbox of the other two can still be relayed.
4. Valkey, then Postgres: Postgres is the authority and outlives all that writes to it.

Invariants:
1. After `stop` (also when `start` raised) no process of the fleet is left.
2. The data folder has one fleet at a time (`lock`).
3. Secrets are in 0600 files and in the children's environment, never in a command line or a log.

Called by the CLI (`up`, `demo`).
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from headrace.contract.roles import Role
from headrace.contract.settings import FleetSettings
from headrace.fleet import programs
from headrace.fleet.access import Access, read_access, write_access
from headrace.fleet.client import ApiProblem, Client
from headrace.fleet.failure import FleetError
from headrace.fleet.first_operator import ensure_operator
from headrace.fleet.folder import lock_folder
from headrace.fleet.invocation import accounts_at
from headrace.fleet.postgres import start_postgres
from headrace.fleet.program import Program, group_lives
from headrace.fleet.server import Server, free_port
from headrace.fleet.valkey import start_valkey

MIGRATE_TIMEOUT_S = 120.0
CONVERT_TIMEOUT_S = 600.0

#: Importing torch from a cold disk and loading weights; a fleet not ready after this never will be.
READY_TIMEOUT_S = 240.0

#: Ctrl-C should not take half a minute: running jobs are handed back and go on at the next start.
DRAIN_S = 3.0

#: From SIGTERM to SIGKILL, beyond what a program may use to drain.
STOP_GRACE_S = 12.0

POLL_S = 0.1


class Stopped(Exception):
    """The stop event was set while the fleet started."""


class Fleet:
    """The processes of one data folder."""

    def __init__(
        self,
        settings: FleetSettings,
        environ: Mapping[str, str],  # of the children, as far as the fleet does not set it
        data_folder: Path,
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self._settings = settings
        self._environ = environ
        self._folder = data_folder
        self._say = say
        self._stop = stop
        self._lock: int | None = None
        self.model_name = ""  # what clients ask for; known once started
        self.has_new_operator = False  # this start made the first one
        self._servers: list[Server] = []
        self._programs: list[Program] = []

    def start(self) -> Access:
        """Start everything; return the way to it when it is ready."""
        self._lock = lock_folder(self._folder)
        (self._folder / "logs").mkdir(exist_ok=True)
        bind = self._bind()
        redis_url, database_url = self._start_servers()
        stores = {"HEADRACE_REDIS_URL": redis_url, "HEADRACE_DATABASE_URL": database_url}
        self._program("migrate", programs.migrate_argv(), stores).run(MIGRATE_TIMEOUT_S, self._stop)
        self._raise_if_stopped()
        first = ensure_operator(database_url, self._folder)
        self.has_new_operator = first.is_new
        access = Access(
            api_url=f"http://{bind.replace('0.0.0.0', '127.0.0.1')}",
            api_key=self._key(database_url),
            database_url=database_url,
            redis_url=redis_url,
            operator=first.name,
            operator_password=first.password,
        )
        model = self._model()
        self.model_name = self._environ.get("HEADRACE_MODEL_NAME") or model.name
        self._start_programs({**stores, "HEADRACE_BIND": bind, "HEADRACE_MODEL": str(model)})
        self._say(f"waiting for the worker to load {model.name}")
        self._wait_until_ready(access)
        write_access(self._folder, access)
        return access

    def watch(self) -> None:
        """Keep everything running until the stop event is set."""
        while not self._stop.wait(POLL_S):
            for program in self._programs:
                if said := program.restart_if_dead():
                    self._say(said)
            for index, server in enumerate(self._servers):
                if not server.is_alive():
                    self._say(f"{server.name} ended; it is started again")
                    self._servers[index] = self._restart(server)

    def stop(self) -> None:
        """Stop everything, in the order of the docstring; idempotent."""
        for program in self._programs:
            program.stop()
        for server in self._servers:
            server.stop()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def kill_programs(self) -> None:
        """Do not wait for our own programs any longer; `stop` goes on."""
        for program in self._programs:
            program.kill()

    def leftovers(self) -> list[str]:
        """Name the parts of which a process still lives."""
        parts: list[tuple[str, int]] = [(server.name, server.pid) for server in self._servers]
        parts += [(item.name, item.process.pid) for item in self._programs if item.process]
        return [name for name, group in parts if group_lives(group)]

    def _start_servers(self) -> tuple[str, str]:
        redis_url = self._settings.redis_url.get_secret_value()
        if not redis_url:
            self._say("starting Valkey")
            self._servers.append(start_valkey(self._folder))
            redis_url = self._servers[-1].url
        self._raise_if_stopped()
        database_url = self._settings.database_url.get_secret_value()
        if not database_url:
            self._say("starting Postgres")
            self._servers.append(start_postgres(self._folder))
            database_url = self._servers[-1].url
        self._raise_if_stopped()
        return redis_url, database_url

    def _restart(self, server: Server) -> Server:
        server.stop()  # lets the folder go
        start = start_valkey if server.name == "Valkey" else start_postgres
        return start(self._folder, port=server.port)

    def _bind(self) -> str:
        """Return HOST:PORT for the gateway, which nothing listens on."""
        bind = self._environ.get("HEADRACE_BIND")
        if bind is None:
            bind = f"127.0.0.1:{self._settings.port or free_port()}"
        host, _, port = bind.rpartition(":")
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, int(port)))
        except (OSError, ValueError) as error:
            raise FleetError(
                f"the API cannot listen on {bind} ({error}): set HEADRACE_PORT to a free port,"
                " or to 0 for any"
            ) from error
        return bind

    def _key(self, database_url: str) -> str:
        """Return the key of the last start if it still opens the database, else a new one."""
        kept = read_access(self._folder)
        with accounts_at(database_url) as accounts:
            known = None if kept is None else accounts.authenticate(kept.api_key)
            if kept is not None and known is not None and known.role is Role.ADMIN:
                return kept.api_key
            # The folder holds the database's password too: a role gives nobody more than that.
            made = accounts.create_key(tenant="default", name="headrace up", role=Role.ADMIN)
        return made.secret

    def _model(self) -> Path:
        if given := self._environ.get("HEADRACE_MODEL"):
            return Path(given).absolute()
        folder = self._folder / "models" / programs.EMBEDDED_MODEL
        if not folder.exists():
            self._say(f"converting {programs.EMBEDDED_MODEL} (once, about 10 s)")
            argv = programs.model_argv(folder)
            self._program("model", argv, {}).run(CONVERT_TIMEOUT_S, self._stop)
        self._raise_if_stopped()
        return folder

    def _start_programs(self, changes: dict[str, str]) -> None:
        drain_s = self._environ.get("HEADRACE_DRAIN_S", f"{DRAIN_S:g}")
        schedule = self._folder / "celery-beat"
        self._programs = [  # in the order of the stop
            self._program("gateway", programs.gateway_argv(), changes),
            self._program(
                "worker",
                programs.worker_argv(),
                {**changes, "HEADRACE_DRAIN_S": drain_s},
                grace_s=STOP_GRACE_S + float(drain_s),
            ),
            self._program("tasks", programs.tasks_argv(schedule), changes | self._tasks_bind()),
        ]
        for program in self._programs:
            self._say(f"starting the {program.name}")
            program.start()

    def _tasks_bind(self) -> dict[str, str]:
        """Let the tasks serve their metrics one port above the worker's."""
        host, _, port = self._environ.get("HEADRACE_METRICS_BIND", "").rpartition(":")
        return {"HEADRACE_METRICS_BIND": f"{host}:{int(port) + 1}"} if port.isdigit() else {}

    def _program(
        self,
        name: str,
        argv: list[str],
        changes: Mapping[str, str],
        grace_s: float = STOP_GRACE_S,
    ) -> Program:
        log = self._folder / "logs" / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))  # of the fleet before this one
        return Program(name, argv, programs.child_environment(self._environ, changes), log, grace_s)

    def _wait_until_ready(self, access: Access) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        with Client(access.api_url, access.api_key, patience_s=0) as client:
            while not _is_ready(client, self.model_name):
                self._raise_if_stopped()
                for program in self._programs:
                    program.raise_if_dead()
                if time.monotonic() > deadline:
                    raise FleetError(
                        f"the fleet was not ready after {READY_TIMEOUT_S:.0f} s: look into the logs"
                        f" in {self._folder / 'logs'}"
                    )
                self._stop.wait(POLL_S)

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _is_ready(client: Client, model: str) -> bool:
    if not client.is_ready():
        return False
    try:
        return any(entry["id"] == model and entry["ready"] for entry in client.models())
    except FleetError:  # the gateway is being started
        return False
    except ApiProblem as problem:
        if problem.status < 500:
            raise
        return False
