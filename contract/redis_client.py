"""Connections to Redis with the timeouts and retries headrace means, and one error for all faults.

redis-py 8 retries by itself and times out after 5 s: a retried script could run twice, and a
blocking read longer than the timeout would break. Here nothing retries by itself; every script is
idempotent and its caller decides. `protocol` stays unset: with 3 set, XREAD's shape changes.

Invariant: an error that says nothing about the command, only about the server's state at the moment
(away, loading, full, read-only, busy, unable to write its file), is QueueUnavailable, also when it
comes out of a script or a pipeline. Any other reply that is an error is a fault of ours and raised
as it is. tests/contract/test_store_errors.py brings a real server into each of these states.

Called by: streams, tokens; processes call `connect` once and pass the client down.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterDownError,  # and MasterDownError below it
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
from redis.retry import Retry

from headrace.contract.errors import QueueUnavailable

#: Seconds a command may take before the connection counts as broken.
COMMAND_TIMEOUT_S = 5.0

Client = redis.Redis

#: Replies redis-py has classes for.
_REFUSALS = (OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError)
#: Replies it has none for. MISCONF: the append-only file cannot be written (a full disk); BUSY: a
#: script runs for too long; NOREPLICAS: too few replicas. A pipeline puts words of its own before
#: the reply's code, so the code is looked for there too.
_REFUSAL_TEXT = re.compile(r"(?:^|caused error: )(MISCONF|BUSY|NOREPLICAS)\b")


def connect(url: str, *, timeout_s: float = COMMAND_TIMEOUT_S, max_connections: int = 64) -> Client:
    """Return a client (lazy: nothing is sent yet) that returns bytes and never retries.

    A command waits for one of `max_connections`; a plain pool would fail the 65th greenlet at once.
    """
    pool = redis.BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType]
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=min(timeout_s, 3.0),
        health_check_interval=15,
        retry=Retry(NoBackoff(), 0),
        max_connections=max_connections,
        timeout=timeout_s,
    )
    return redis.Redis.from_pool(pool)


@contextmanager
def redis_errors(what: str) -> Generator[None]:
    """Turn everything that means "Redis cannot do this now" into QueueUnavailable."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise QueueUnavailable(
            f"{what}: Redis did not answer ({type(error).__name__}): it is tried again"
        ) from error
    except redis.ResponseError as error:
        code = _refusal(error)
        if code is None:
            raise
        raise QueueUnavailable(
            f"{what}: Redis refuses writes ({code}): it is tried again"
        ) from error


def _refusal(error: redis.ResponseError) -> str | None:
    """Return what the server's state is called if that, not the command, is what is wrong."""
    if isinstance(error, _REFUSALS):
        return type(error).__name__
    found = _REFUSAL_TEXT.search(str(error))
    return None if found is None else found[1]
