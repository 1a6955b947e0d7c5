"""Keys, tenants and models on a real Postgres."""

from __future__ import annotations

import hashlib
import threading

import pytest
from sqlalchemy import select, update

from headrace.contract import wire
from headrace.contract.accounts import Accounts, Principal
from headrace.contract.database import connect
from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.records import api_keys, tenants
from headrace.contract.roles import Role


def card_of(name, **changes):
    fields = {"folder": "/models/m", "max_seq_tokens": 8192, "vocab_size": 49152}
    fields |= {"dtype": "bfloat16", "has_chat_template": True}
    return wire.ModelCard(name=name, **(fields | changes))


def test_a_key_speaks_for_its_tenant(accounts):
    one = accounts.create_key(tenant="team-a", name="ci")
    two = accounts.create_key(tenant="team-a", name="dev")
    other = accounts.create_key(tenant="team-b", name="ci")
    assert one.tenant_id == two.tenant_id != other.tenant_id
    assert accounts.authenticate(one.secret) == Principal(one.tenant_id, one.id)
    assert accounts.authenticate(other.secret) == Principal(other.tenant_id, other.id)


@pytest.mark.parametrize("role", [None, *Role])
def test_a_key_has_the_role_it_was_given(accounts, role):
    key = accounts.create_key(tenant="team-a", name="ops", role=role)
    assert accounts.authenticate(key.secret) == Principal(key.tenant_id, key.id, role)
    assert accounts.list_keys()[0]["role"] == role
    assert accounts.key(key.id)["role"] == role
    assert "secret_sha256" not in accounts.key(key.id)
    assert accounts.key("key_none") is None


def test_the_secret_is_stored_nowhere(accounts, engine):
    key = accounts.create_key(tenant="team-a", name="ci")
    with engine.connect() as db:
        row = db.execute(select(api_keys).where(api_keys.c.id == key.id)).one()
    secret = key.secret.rpartition("_")[2]
    assert bytes(row.secret_sha256) == hashlib.sha256(secret.encode()).digest()
    assert secret not in repr(row)


def test_any_other_key_is_nobodys(accounts):
    key = accounts.create_key(tenant="team-a", name="ci").secret
    other = accounts.create_key(tenant="team-a", name="ci").secret
    head, _, secret = key.rpartition("_")
    wrong = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    for text in (
        "",
        "hr_",
        key + "0",
        key + "\n",
        key.upper(),
        f"{head}_{wrong}",
        f"{head}_{other.rpartition('_')[2]}",
        f"hr_{'0' * 12}_{secret}",
        "hr_' or 1=1 --_x",
        "hr_\x00",
    ):
        assert accounts.authenticate(text) is None


@pytest.mark.parametrize("how", ["id", "prefix", "whole key"])
def test_a_revoked_key_is_nobodys_at_once(accounts, how):
    key = accounts.create_key(tenant="team-a", name="ci")
    named = {"id": key.id, "prefix": key.secret.split("_")[1], "whole key": key.secret}[how]
    assert accounts.revoke_key(named)
    assert accounts.authenticate(key.secret) is None
    assert not accounts.revoke_key(named)
    assert not accounts.revoke_key("key_none")


def test_keys_are_listed_newest_first_without_secrets(accounts):
    key = accounts.create_key(tenant="team-list", name="ci")
    row = accounts.list_keys()[0]
    assert (row["id"], row["tenant"], row["name"]) == (key.id, "team-list", "ci")
    assert row["revoked_at"] is None
    assert "secret_sha256" not in row


def test_the_last_use_of_a_key_is_kept_to_the_minute(accounts, engine):
    key = accounts.create_key(tenant="team-a", name="ci")

    def used_at():
        return next(r for r in accounts.list_keys() if r["id"] == key.id)["last_used_at"]

    assert used_at() is None
    accounts.authenticate(key.secret)
    first = used_at()
    assert first is not None
    accounts.authenticate(key.secret)
    assert used_at() == first
    with engine.begin() as db:
        db.execute(
            update(api_keys).where(api_keys.c.id == key.id).values(last_used_at=first.replace(2020))
        )
    accounts.authenticate(key.secret)
    assert used_at() >= first


def test_a_tenant_made_by_two_keys_at_once_is_one(accounts, engine):
    barrier, made = threading.Barrier(4), []

    def create():
        barrier.wait(10)
        made.append(accounts.create_key(tenant="team-race", name="k"))

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made) == 4
    with engine.connect() as db:
        rows = db.execute(select(tenants.c.id).where(tenants.c.name == "team-race")).all()
    assert {key.tenant_id for key in made} == {rows[0].id}
    assert len(rows) == 1


def test_the_newest_card_of_a_model_wins(accounts):
    accounts.register_model(card_of("b"))
    accounts.register_model(card_of("a"))
    accounts.register_model(card_of("b", max_seq_tokens=1024))
    assert accounts.list_models() == [card_of("a"), card_of("b", max_seq_tokens=1024)]


def test_a_postgres_that_is_away_is_database_unavailable():
    engine = connect("postgresql+psycopg://postgres:x@127.0.0.1:1/headrace")
    accounts = Accounts(engine)
    for call in (
        lambda: accounts.create_key(tenant="t", name="n"),
        lambda: accounts.authenticate("hr_" + "0" * 12 + "_" + "0" * 48),
        accounts.list_keys,
        lambda: accounts.revoke_key("k"),
        lambda: accounts.register_model(card_of("a")),
        accounts.list_models,
    ):
        with pytest.raises(DatabaseUnavailable):
            call()
    engine.dispose()
