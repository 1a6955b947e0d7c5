"""Fixtures: a real Valkey and a real Postgres for the whole run, clean for each test module.

`redis_url` is an emptied server; `database_url` a database of the module's own, copied from a
template that the migrations made once. Load with `pytest_plugins = ["headrace.tests.servers"]`.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from headrace.fleet.migrate import migrate
from headrace.fleet.postgres import start_postgres
from headrace.fleet.server import Server
from headrace.fleet.valkey import start_valkey

TEMPLATE = "template_migrated"

_numbers = itertools.count()


@pytest.fixture(scope="session")
def servers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def valkey(servers_folder: Path) -> Iterator[Server]:
    with start_valkey(servers_folder) as server:
        yield server


@pytest.fixture(scope="session")
def postgres(servers_folder: Path) -> Iterator[Server]:
    """Postgres with a migrated template database; not durable, as its data dies with the run."""
    with start_postgres(servers_folder, durable=False) as server:
        _run_sql(server, f"CREATE DATABASE {TEMPLATE}")
        migrate(url_of(server, TEMPLATE))
        yield server


@pytest.fixture(scope="module")
def redis_url(valkey: Server) -> str:
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    return valkey.url


@pytest.fixture(scope="module")
def database_url(postgres: Server) -> Iterator[str]:
    name = f"module_{next(_numbers)}"
    _run_sql(postgres, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
    yield url_of(postgres, name)
    _run_sql(postgres, f"DROP DATABASE {name} WITH (FORCE)")


def url_of(server: Server, database: str) -> str:
    return server.url.rpartition("/")[0] + "/" + database


def _run_sql(server: Server, statement: str) -> None:
    # The default database stays untouched: CREATE DATABASE fails while its template has clients.
    url = url_of(server, "postgres").replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)
