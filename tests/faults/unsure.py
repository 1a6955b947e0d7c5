"""Operations with an unknown outcome: done (or not), and an error in place of the answer.

In a wrapped program a share of all Redis calls (commands, pipelines, scripts; Celery's too) and SQL
calls (statements and commits) ends as if the connection had broken. Most of those were done first:
the commit is durable, the script has run, only the answer is lost. The rest were never sent.

How: at the connection, below each library's own error handling and retries, which thus take part
as in production. The connection is closed besides, as a broken one is: a transaction whose
statement fails so is rolled back by the server, and what was done is a commit, or a statement that
is a transaction by itself.

Invariants:
1. "Done" was really done: the server's answer (of a pipeline, the first) was read before.
2. Each fault is one line on stderr, `fault.unsure`, from which scenarios count.
3. Draws come from a seed, the program and the process: a restarted process draws otherwise, or a
   fault at its start would keep it from ever starting.

Options: share (of calls, default 0.01), before (of the faults, those that are not done, default
0.25), seed (default 0), only (calls whose name begins so: `redis`, `redis.EVALSHA`, `sql.commit`).

Called by: wrapped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from random import Random
from types import ModuleType
from typing import Any

from headrace.tests.faults.on_import import when_imported


class Dice:
    """Decides for each call whether it goes wrong, and when."""

    def __init__(self, seed: str, share: float, before: float) -> None:
        if not (0.0 <= share <= 1.0 and 0.0 <= before <= 1.0):
            raise ValueError(f"share={share} and before={before} are shares: from 0 to 1")
        self._share, self._before = share, before
        self._seed = seed
        self.only = ""  # calls whose name begins so
        self._reseed()
        os.register_at_fork(after_in_child=self._reseed)

    def _reseed(self) -> None:
        self._random = Random(f"{self._seed}:{os.getpid()}")

    def draw(self, what: str) -> str:
        """Return `` (all is well), `before` or `after`, and note a fault."""
        number = self._random.random()
        if number >= self._share or not what.startswith(self.only):
            return ""
        when = "before" if number < self._share * self._before else "after"
        sys.stderr.write(f"fault.unsure call={what} when={when}\n")
        return when


def install(program: str, options: Mapping[str, str]) -> None:
    """Let a share of the program's calls to its stores end with an unknown outcome."""
    known = {"share": "0.01", "before": "0.25", "seed": "0", "only": ""}
    if unknown := options.keys() - known.keys():
        raise ValueError(f"{', '.join(sorted(unknown))} is no option of unsure: {', '.join(known)}")
    given = {**known, **options}
    if given["only"].partition(".")[0] not in ("", "redis", "sql"):
        raise ValueError(f"only={given['only']}: calls are named redis.GET, sql.commit, ...")
    dice = Dice(f"{given['seed']}:{program}", *(float(given[k]) for k in ("share", "before")))
    dice.only = given["only"]
    when_imported("redis.connection", lambda module: wrap_redis(module, dice))
    dialect = "sqlalchemy.dialects.postgresql.psycopg"
    when_imported(dialect, lambda module: wrap_sql(module, dice))


def wrap_redis(module: ModuleType, dice: Dice) -> None:
    """Change redis.connection: what is sent may be lost, or its reply."""
    kind: Any = module.AbstractConnection
    send, read = kind.send_packed_command, kind.read_response

    def send_packed_command(self: Any, command: Any, check_health: bool = True) -> None:
        self.is_reply_lost = False
        when = dice.draw(f"redis.{_name(command)}")
        if when == "before":
            self.disconnect()
            raise module.ConnectionError("Connection closed by server. (before it was sent)")
        send(self, command, check_health=check_health)  # may send a PING, which comes by here too
        self.is_reply_lost = when == "after"

    def read_response(self: Any, *args: Any, **kwargs: Any) -> Any:
        reply = read(self, *args, **kwargs)
        if getattr(self, "is_reply_lost", False):
            self.is_reply_lost = False
            self.disconnect()
            raise module.TimeoutError("Timeout reading from socket (after it was done)")
        return reply

    kind.send_packed_command, kind.read_response = send_packed_command, read_response


def _name(command: Any) -> str:
    """Return the first word of a packed command: `*2\\r\\n$3\\r\\nGET\\r\\n...`."""
    first = command if isinstance(command, str | bytes) else (command or [b""])[0]
    text = first if isinstance(first, str) else bytes(first[:64]).decode(errors="replace")
    words = text.split("\r\n", 3)
    return words[2] if len(words) > 2 else "?"


def wrap_sql(module: ModuleType, dice: Dice) -> None:
    """Change SQLAlchemy's psycopg dialect: statements and commits fail, most of them once done."""
    kind: Any = module.PGDialect_psycopg

    def broken(connection: Any, when: str) -> Exception:
        import psycopg  # there already: the dialect is in use

        connection.close()
        return psycopg.OperationalError(f"server closed the connection unexpectedly ({when})")

    def unsure(name: str, connection_of: Callable[[Any], Any]) -> Callable[..., Any]:
        done = getattr(kind, name)

        def call(self: Any, handle: Any, *args: Any, **kwargs: Any) -> Any:
            when = dice.draw(f"sql.{name.removeprefix('do_')}")
            if when == "before":
                raise broken(connection_of(handle), when)
            result = done(self, handle, *args, **kwargs)
            if when == "after":
                raise broken(connection_of(handle), when)
            return result

        return call

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(kind, name, unsure(name, lambda cursor: cursor.connection))
    kind.do_commit = unsure("do_commit", lambda proxied: proxied.dbapi_connection)
