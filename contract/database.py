"""Connections to Postgres, and one error for everything that means "not now".

Invariants (tests/contract/test_store_errors.py, on a real server in each of these states):
1. What says something about the server's state at the moment (away, starting, stopping, full disk,
   no connection left, read-only, out of time, a deadlock) is DatabaseUnavailable: whoever asked may
   ask again. What says something about the statement or its values is raised as it is: asking
   again would go on for ever.
2. A server that is gone without a farewell is noticed within SILENCE_S: no call waits for ever.
3. Whoever finds all connections in use waits for one at most POOL_WAIT_S, and is served in the
   order of coming; only then it is DatabaseUnavailable. So a burst is worked off one after another:
   refused after a short wait, its clients would come again, and cost more than their answers.

Called by: each process once (`connect`); ledger and accounts (`database_errors`).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    InterfaceError,
    InternalError,
    InvalidRequestError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.turns import Turns

#: Seconds a statement may take; the longest of ours takes milliseconds.
STATEMENT_TIMEOUT_S = 15
#: Seconds a new connection may take to be made.
CONNECT_TIMEOUT_S = 3
#: Seconds a call waits for a free connection of the pool (README says it, at DB_POOL_SIZE): a
#: thousand POSTs at once, with their streams, on half a core took 11 s.
POOL_WAIT_S = 20
#: Seconds after which a peer that acknowledges nothing counts as gone: statement_timeout is the
#: server's clock, and a server whose machine died has none.
SILENCE_S = 20

#: First two characters of the SQLSTATEs that are operational by psycopg's classes, but are about
#: the statement: 54 = a value or a row beyond what Postgres can hold.
_NOT_PASSING = ("54",)

#: What SQLAlchemy's pool says when fresh connections, too, are closed when they are checked: a
#: Postgres that is being killed. The class alone would be a fault of ours.
_POOL_GAVE_UP = "This connection is closed"


class FairPool(QueuePool):
    """SQLAlchemy's pool, with a line before it (invariant 3): who has a turn finds a connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._turns = Turns(self.size())

    def _do_get(self) -> Any:
        if not self._turns.take(self.timeout()):
            raise PoolTimeoutError(f"all {self.size()} connections in use for {self.timeout():g} s")
        try:
            return super()._do_get()
        except BaseException:
            self._turns.give_back()
            raise

    def _do_return_conn(self, record: Any) -> None:
        try:
            super()._do_return_conn(record)
        finally:
            self._turns.give_back()


def connect(url: str, *, pool_size: int = 5, pool_wait_s: float = POOL_WAIT_S) -> Engine:
    """Return an engine (lazy: nothing is opened yet) whose connections are checked before use."""
    engine = create_engine(
        url,
        poolclass=FairPool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=pool_wait_s,
        hide_parameters=True,  # an error's text must not carry prompts into a log
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "headrace",
            "keepalives_idle": SILENCE_S // 2,
            "keepalives_interval": SILENCE_S // 10,
            "keepalives_count": 5,
            "tcp_user_timeout": SILENCE_S * 1000,
            "options": f"-c statement_timeout={STATEMENT_TIMEOUT_S * 1000} -c timezone=UTC",
        },
    )
    event.listen(engine, "checkout", _refuse_closed)
    return engine


def autocommitting(engine: Engine) -> Engine:
    """Return the engine (same pool) with each statement a transaction of its own: one round trip
    instead of three, for single reads and for single statements that write."""
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _refuse_closed(connection: Any, _record: object, _proxy: object) -> None:
    """Let the pool replace a connection that the server has closed.

    SQLAlchemy's `pool_pre_ping` asks the server, a round trip before every transaction (0.3 ms of
    the gateway's CPU); a closed socket can be seen without asking.
    """
    try:
        connection.pgconn.consume_input()  # reads the farewell, where there is one
        connection.pgconn.consume_input()  # meets the end
    except psycopg.OperationalError as error:
        raise DisconnectionError from error


@contextmanager
def database_errors(what: str) -> Generator[None]:
    """Turn a Postgres that is away, full or restarting into DatabaseUnavailable."""
    try:
        yield
    except (OperationalError, InterfaceError, InternalError, PoolTimeoutError) as error:
        if isinstance(error, DBAPIError) and _sqlstate(error).startswith(_NOT_PASSING):
            raise
        raise _unavailable(what, error) from error
    except InvalidRequestError as error:
        if str(error) != _POOL_GAVE_UP:
            raise
        raise _unavailable(what, error) from error


def _sqlstate(error: DBAPIError) -> str:
    """Return the server's code, or "" where there was no server to give one."""
    return getattr(error.orig, "sqlstate", None) or ""


def _unavailable(what: str, error: Exception) -> DatabaseUnavailable:
    origin = type(getattr(error, "orig", None) or error).__name__
    return DatabaseUnavailable(
        f"{what}: Postgres did not answer ({origin}): try again in a second", retry_after_s=1
    )
