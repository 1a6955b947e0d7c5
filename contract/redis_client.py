"""Connections to Redis with the timeouts and retries headrace means, and one error for all faults.

redis-py 8 retries by itself and times out after 5 s: a retried script could run twice, and a
blocking read longer than the timeout would break. Here nothing retries by itself; every script is
idempotent and its caller decides. `protocol` stays unset: with 3 set, XREAD's shape changes.

Called by: streams, tokens; processes call `connect` once and pass the client down.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import redis
from redis.backoff import NoBackoff
from redis.exceptions import MasterDownError, OutOfMemoryError, ReadOnlyError
from redis.retry import Retry

from headrace.contract.errors import QueueUnavailable

#: Seconds a command may take before the connection counts as broken.
COMMAND_TIMEOUT_S = 5.0

Client = redis.Redis


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
    except (OutOfMemoryError, ReadOnlyError, MasterDownError) as error:
        raise QueueUnavailable(
            f"{what}: Redis refuses writes ({type(error).__name__}): it is tried again"
        ) from error
    except redis.ResponseError as error:
        if str(error).startswith("MISCONF"):  # a server that cannot write its append-only file
            raise QueueUnavailable(
                f"{what}: Redis refuses writes (MISCONF): it is tried again"
            ) from error
        raise
