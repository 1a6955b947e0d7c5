"""Fixtures of the contract's tests: an emptied Valkey a test, a migrated Postgres a module.

`spec_for` makes a job's wire.JobSpec; `lane_worker` plays what a courier does with a claimed job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from sqlalchemy import Engine

from headrace.contract import redis_client, wire
from headrace.contract.accounts import Accounts
from headrace.contract.database import connect
from headrace.contract.ids import new_id
from headrace.contract.ledger import Ledger
from headrace.contract.streams import JobStreams
from headrace.contract.tokens import TokenLog

MODEL = "tiny/model: a {b}"  # needs escaping in a hash tag


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis_client.connect(redis_url) as client:
        client.flushall()
        yield client


@pytest.fixture
def streams(client: redis.Redis) -> JobStreams:
    return JobStreams(client)


@pytest.fixture
def tokens(client: redis.Redis) -> TokenLog:
    return TokenLog(client)


@pytest.fixture(scope="module")
def engine(database_url: str) -> Iterator[Engine]:
    engine = connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def accounts(engine: Engine) -> Accounts:
    return Accounts(engine)


@pytest.fixture(scope="module")
def ledger(engine: Engine) -> Ledger:
    return Ledger(engine)


@pytest.fixture
def new_row(accounts: Accounts) -> Callable[..., dict[str, Any]]:
    """Return a maker of rows for `accept_job`, all of one fresh tenant."""
    key = accounts.create_key(tenant=new_id("test"), name="test")

    def make(**changes: Any) -> dict[str, Any]:
        return {
            "id": new_id("job"),
            "tenant_id": key.tenant_id,
            "key_id": key.id,
            "model": MODEL,
            "job_class": "interactive",
            "priority": "normal",
            "input": {"prompt": "Hello"},
            "sampling": {"max_tokens": 8},
            "meta": {"team": "search"},
            "cost_tokens": 12,
            **changes,
        }

    return make


@pytest.fixture
def accept(ledger: Ledger, new_row: Callable[..., dict[str, Any]]) -> Callable[..., str]:
    """Return a function that accepts a job and returns its id."""

    def accept(**changes: Any) -> str:
        row = new_row(**changes)
        ledger.accept_job(row, idempotency_key=None, request_sha256=b"")
        return row["id"]

    return accept


@pytest.fixture
def spec_for() -> Callable[..., wire.JobSpec]:
    def make(job: str = "", **changes: Any) -> wire.JobSpec:
        fields: dict[str, Any] = {
            "job": job or new_id("job"),
            "tenant": "tenant_a",
            "model": MODEL,
            "job_class": wire.JobClass.INTERACTIVE,
            "priority": wire.Priority.NORMAL,
            "sampling": wire.Sampling(),
            "prompt": "Hello",
        }
        return wire.JobSpec(**(fields | changes))

    return make


@pytest.fixture
def chunk_of() -> Callable[..., wire.TokenChunk]:
    """Return a maker of chunks whose text is one letter a token, by index."""

    def make(job: str, attempt: int, first: int, count: int, gen: int = 0) -> wire.TokenChunk:
        return wire.TokenChunk(
            job=job,
            attempt=attempt,
            gen=gen,
            first=first,
            ids=tuple(range(first, first + count)),
            text="".join(chr(97 + i % 26) for i in range(first, first + count)),
            ends=tuple(range(1, count + 1)),
        )

    return make
