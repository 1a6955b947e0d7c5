"""`headrace migrate`: the schema, again and again, and a database that is away."""

import pytest
import sqlalchemy

from headrace.contract.accounts import Accounts
from headrace.contract.database import connect
from headrace.fleet.failure import FleetError
from headrace.fleet.migrate import migrate
from headrace.tests.real_parts import migrate_in_a_process


def test_a_second_migration_changes_nothing_and_the_tables_work(database_url):
    first = migrate_in_a_process(database_url)
    assert first
    assert migrate_in_a_process(database_url) == first
    engine = connect(database_url, pool_size=1)
    accounts = Accounts(engine)
    key = accounts.create_key(tenant="t", name="k")
    assert accounts.authenticate(key.secret) is not None
    engine.dispose()


def test_modules_get_databases_of_their_own(database_url, postgres):
    name = sqlalchemy.make_url(database_url).database
    assert name != "headrace"
    assert name.startswith("module_")
    assert database_url.rpartition("/")[0] == postgres.url.rpartition("/")[0]


def test_a_database_that_is_away_is_named_without_its_password():
    with pytest.raises(FleetError, match=r"127.0.0.1:1/") as caught:
        migrate("postgresql+psycopg://postgres:secret@127.0.0.1:1/headrace")
    assert "secret" not in caught.value.detail
