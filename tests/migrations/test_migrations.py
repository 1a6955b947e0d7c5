"""Migrations on a real Postgres: up, down, up; equal to contract/records; safe to run at once."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config
from psycopg.types.json import Jsonb
from sqlalchemy import CheckConstraint, create_engine, inspect

from headrace.contract.errors import ConfigurationError
from headrace.contract.labels import label_of
from headrace.contract.records import metadata

ROOT = Path(__file__).resolve().parents[2]
TABLES = set(metadata.tables)


@pytest.fixture
def empty_url(postgres) -> Iterator[str]:
    """A database that no migration has touched."""
    server = postgres.url.replace("+psycopg", "").rpartition("/")[0]
    with psycopg.connect(f"{server}/postgres", autocommit=True) as db:
        db.execute("CREATE DATABASE migrating")
        yield postgres.url.rpartition("/")[0] + "/migrating"
        db.execute("DROP DATABASE migrating WITH (FORCE)")


def config_for(url: str | None) -> Config:
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(ROOT / "migrations").replace("%", "%%"))
    if url:
        config.attributes["url"] = url
    return config


def tables_of(url: str) -> set[str]:
    engine = create_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_up_down_up_leaves_the_tables_of_the_contract(empty_url):
    config = config_for(empty_url)
    command.upgrade(config, "head")
    assert tables_of(empty_url) == TABLES | {"alembic_version"}
    command.downgrade(config, "base")
    assert tables_of(empty_url) == {"alembic_version"}
    command.upgrade(config, "head")
    command.upgrade(config, "head")
    assert tables_of(empty_url) == TABLES | {"alembic_version"}
    command.check(config)  # raises when the models differ from what the migrations made


def test_checks_and_partial_indexes_are_those_of_the_contract(database_url):
    # `alembic check` does not compare these.
    engine = create_engine(database_url)
    found = inspect(engine)
    for table in metadata.tables.values():
        checks = {c["name"] for c in found.get_check_constraints(table.name)}
        wanted = {str(c.name) for c in table.constraints if isinstance(c, CheckConstraint)}
        assert checks == wanted
        partial = {
            index["name"]: "postgresql_where" in index.get("dialect_options", {})
            for index in found.get_indexes(table.name)
            if not index.get("duplicates_constraint")
        }
        assert partial == {
            index.name: index.dialect_options["postgresql"]["where"] is not None
            for index in table.indexes
        }
    engine.dispose()


def test_two_processes_that_migrate_at_once_both_succeed(empty_url):
    code = (
        "import sys; from alembic import command; from alembic.config import Config;"
        "c = Config(); c.set_main_option('script_location', sys.argv[1]);"
        "c.attributes['url'] = sys.stdin.read(); command.upgrade(c, 'head')"
    )
    argv = [sys.executable, "-c", code, str(ROOT / "migrations").replace("%", "%%")]
    started = [
        subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(ROOT / ".imports")},
        )
        for _ in range(2)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(empty_url)
        process.stdin.close()
        process.stdin = None
    for process in started:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert tables_of(empty_url) == TABLES | {"alembic_version"}


def test_a_migration_without_a_database_says_what_to_do():
    with pytest.raises(ConfigurationError, match="headrace migrate"):
        command.upgrade(config_for(None), "head")


def test_jobs_from_before_there_were_labels_get_theirs(empty_url):
    config = config_for(empty_url)
    command.upgrade(config, "0002")
    meta = {"größe": "😀 e\u0300", "a": "", "x" * 64: "y" * 512, "b": "'\\x00\""}
    with psycopg.connect(empty_url.replace("+psycopg", "")) as db:
        db.execute("INSERT INTO tenants (id, name) VALUES ('t', 't')")
        db.execute(
            "INSERT INTO api_keys (id, tenant_id, name, prefix, secret_sha256)"
            " VALUES ('k', 't', 'k', 'k', '')"
        )
        for job_id, given in (("job_1", meta), ("job_2", {})):
            db.execute(
                "INSERT INTO jobs (id, tenant_id, key_id, model, class, priority, input, sampling,"
                " metadata, cost_tokens, status)"
                " VALUES (%s, 't', 'k', 'm', 'batch', 'low', '{}', '{}', %s, 1, 'queued')",
                (job_id, Jsonb(given)),
            )
    command.upgrade(config, "head")
    with psycopg.connect(empty_url.replace("+psycopg", "")) as db:
        found = db.execute("SELECT job_id, label FROM job_labels").fetchall()
    assert sorted(found) == sorted(("job_1", label_of(*entry)) for entry in meta.items())
