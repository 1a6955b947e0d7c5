"""Fixtures: a real Valkey, a real Postgres and the real small model, for the whole run.

`redis_url` is a server emptied for each test module; `database_url` a database of the module's own,
copied from a template that the migrations made once; `smollm2_folder` the converted model, kept in
`.data/test` under a hash of its converter. tests/conftest.py loads this file:
`pytest_plugins = ["headrace.tests.real_parts"]`.
"""

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from headrace.fleet.postgres import start_postgres
from headrace.fleet.programs import EMBEDDED_MODEL
from headrace.fleet.server import Server
from headrace.fleet.smollm2 import ensure_model
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
        migrate_in_a_process(url_of(server, TEMPLATE))
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


def migrate_in_a_process(url: str) -> str:
    """Migrate as `headrace up` does, in a process: the template must have no connection left."""
    script = "import sys; from headrace.fleet.migrate import migrate; print(migrate(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, url],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return done.stdout.strip()


def url_of(server: Server, database: str) -> str:
    return server.url.rpartition("/")[0] + "/" + database


def _run_sql(server: Server, statement: str) -> None:
    # The default database stays untouched: CREATE DATABASE fails while its template has clients.
    url = url_of(server, "postgres").replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement)


@pytest.fixture(scope="session")
def smollm2_folder(pytestconfig: pytest.Config) -> Path:
    code = hashlib.sha256()
    for name in ("smollm2.py", "gguf_tokenizer.py"):
        code.update((pytestconfig.rootpath / "fleet" / name).read_bytes())
    return ensure_model(
        pytestconfig.rootpath / ".data/test" / code.hexdigest()[:12] / EMBEDDED_MODEL
    )
