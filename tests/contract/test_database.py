"""Connections to Postgres: closed ones are replaced unseen, and errors carry no parameters."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DataError

from headrace.contract.database import autocommitting, connect, database_errors
from headrace.contract.errors import DatabaseUnavailable


def kill_all_others(engine):
    """End every other connection to this database, and wait until they are gone."""
    others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    with engine.connect() as db:
        db.execute(text(f"select pg_terminate_backend(pid) {others}"))
        deadline = time.monotonic() + 10
        while db.execute(text(f"select count(*) {others}")).scalar_one():
            assert time.monotonic() < deadline
            db.rollback()  # each look is a new snapshot


def test_connections_that_the_server_closed_are_replaced(engine, database_url):
    pooled = connect(database_url, pool_size=3)
    held = [pooled.connect() for _ in range(3)]
    for connection in held:
        connection.execute(text("select 1"))
        connection.close()
    kill_all_others(engine)
    for _ in range(5):
        with database_errors("ask"), pooled.connect() as db:
            assert db.execute(text("select 1")).scalar_one() == 1
    pooled.dispose()


def test_a_statement_on_its_own_is_a_transaction(engine):
    with engine.begin() as db:
        db.execute(text("create table alone (n int)"))
    with autocommitting(engine).connect() as db:
        db.execute(text("insert into alone values (1)"))
        db.rollback()
    with engine.connect() as db:  # and the same pool goes on with real transactions
        assert db.execute(text("select count(*) from alone")).scalar_one() == 1
        db.execute(text("insert into alone values (2)"))
        db.rollback()
        assert db.execute(text("select count(*) from alone")).scalar_one() == 1


def test_errors_do_not_quote_parameters(engine):
    with engine.connect() as db, pytest.raises(DataError) as caught:
        db.execute(text("select cast(:secret as text)"), {"secret": "secret\x00"})
    assert "secret\\x00" not in str(caught.value)


def test_a_postgres_that_is_away_is_unavailable():
    away = connect("postgresql+psycopg://postgres:x@127.0.0.1:1/headrace")
    with pytest.raises(DatabaseUnavailable) as caught, database_errors("ask"):
        away.connect()
    assert caught.value.retry_after_s == 1
    away.dispose()
