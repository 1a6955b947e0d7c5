"""Connections to Postgres, and one error for everything that means "not now".

Called by: each process once (`connect`); ledger and accounts (`database_errors`).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psycopg
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DisconnectionError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from headrace.contract.errors import DatabaseUnavailable

#: Seconds a statement may take; the longest of ours takes milliseconds.
STATEMENT_TIMEOUT_S = 15
#: Seconds a request waits for a free connection, and for a new one to be made.
CONNECT_TIMEOUT_S = 3


def connect(url: str, *, pool_size: int = 5) -> Engine:
    """Return an engine (lazy: nothing is opened yet) whose connections are checked before use."""
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        hide_parameters=True,  # an error's text must not carry prompts into a log
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "headrace",
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
        origin = type(getattr(error, "orig", None) or error).__name__
        raise DatabaseUnavailable(
            f"{what}: Postgres did not answer ({origin}): try again in a second", retry_after_s=1
        ) from error
