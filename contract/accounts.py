"""Tenants, API keys and the models the fleet serves: the rows that change rarely.

A key is `hr_<prefix>_<secret>`: the prefix (12 hex digits) is looked up, the secret (48 hex digits,
192 random bits) is compared by its SHA-256 in constant time and stored nowhere.

A key may have a role (roles.py), which opens /v1/admin to it; what it may do for its tenant is the
same with and without one.

Called by: gateway/auth, gateway/dashboard (keys, playground), the CLI (`headrace keys`), worker
(register_model).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Engine, RowMapping, and_, func, insert, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.ids import new_id
from headrace.contract.records import api_keys, models, tenants
from headrace.contract.roles import Role
from headrace.contract.wire import ModelCard

#: What a key without a secret has for its hash: shorter than any, so nothing is equal to it.
NO_SECRET = b""

_KEY = re.compile(r"hr_([0-9a-f]{12})_([0-9a-f]{48})")


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a request speaks for."""

    tenant_id: str
    key_id: str
    role: Role | None = None  # what it may do under /v1/admin


@dataclass(frozen=True, slots=True)
class NewKey:
    id: str
    tenant_id: str
    secret: str  # the whole key: shown once, kept nowhere


class Accounts:
    """Transactions on tenants, keys and models, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._single = autocommitting(engine)

    def create_key(self, *, tenant: str, name: str, role: Role | None = None) -> NewKey:
        """Make a key for the tenant of that name, and the tenant if it is new."""
        prefix, secret, key_id = secrets.token_hex(6), secrets.token_hex(24), new_id("key")
        with database_errors("create key"), self._engine.begin() as db:
            db.execute(
                upsert(tenants)
                .values(id=new_id("tenant"), name=tenant)
                .on_conflict_do_nothing(index_elements=["name"])
            )
            tenant_id = db.execute(
                select(tenants.c.id).where(tenants.c.name == tenant)
            ).scalar_one()
            db.execute(
                insert(api_keys).values(
                    id=key_id,
                    tenant_id=tenant_id,
                    name=name,
                    prefix=prefix,
                    secret_sha256=hashlib.sha256(secret.encode()).digest(),
                    role=role,
                )
            )
        return NewKey(key_id, tenant_id, f"hr_{prefix}_{secret}")

    def own_key(self, *, tenant: str, name: str) -> Principal:
        """Return the key that jobs made by this fleet itself are under; it opens nothing.

        Its prefix is no hex digits and its secret does not exist, so no request can bring it.
        """
        with database_errors("find our own key"), self._engine.begin() as db:
            query = select(api_keys.c.tenant_id, api_keys.c.id).where(api_keys.c.prefix == name)
            row = db.execute(query).first()
            if row is None:  # two that come at once make one
                db.execute(
                    upsert(tenants)
                    .values(id=new_id("tenant"), name=tenant)
                    .on_conflict_do_nothing(index_elements=["name"])
                )
                of_tenant = select(tenants.c.id).where(tenants.c.name == tenant).scalar_subquery()
                db.execute(
                    upsert(api_keys)
                    .values(
                        id=new_id("key"),
                        tenant_id=of_tenant,
                        name=name,
                        prefix=name,
                        secret_sha256=NO_SECRET,
                    )
                    .on_conflict_do_nothing(index_elements=["prefix"])
                )
                row = db.execute(query).one()
        return Principal(row.tenant_id, row.id)

    def authenticate(self, key: str) -> Principal | None:
        """Return whom the key stands for; None when it is malformed, unknown or revoked."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        stale = func.now() - text("interval '1 minute'")
        is_stale = or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < stale)
        # Each statement by itself: a lock of the row is not held over a round trip, or whoever
        # authenticates by the same key would wait for it with a connection in hand.
        with database_errors("look up key"), self._single.connect() as db:
            row = db.execute(
                select(
                    api_keys.c.id,
                    api_keys.c.tenant_id,
                    api_keys.c.secret_sha256,
                    api_keys.c.role,
                    is_stale.label("is_stale"),
                ).where(api_keys.c.prefix == match[1], api_keys.c.revoked_at.is_(None))
            ).first()
            digest = hashlib.sha256(match[2].encode()).digest()
            if row is None or not hmac.compare_digest(digest, bytes(row.secret_sha256)):
                return None
            if row.is_stale:
                this_key = and_(api_keys.c.id == row.id, is_stale)
                db.execute(update(api_keys).where(this_key).values(last_used_at=func.now()))
        return Principal(row.tenant_id, row.id, None if row.role is None else Role(row.role))

    def list_keys(self) -> Sequence[RowMapping]:
        """Return all keys, newest first, with their tenant's name and nothing secret."""
        query = _keys().order_by(api_keys.c.id.desc())
        with database_errors("list keys"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def key(self, key_id: str) -> RowMapping | None:
        """Return one key as `list_keys` does; None when there is none of this id."""
        with database_errors("read key"), self._single.connect() as db:
            return db.execute(_keys().where(api_keys.c.id == key_id)).mappings().first()

    def revoke_key(self, id_or_prefix: str) -> bool:
        """Revoke a key by id, prefix or the whole key; False when there is no such live key."""
        match = _KEY.fullmatch(id_or_prefix)
        wanted = match[1] if match else id_or_prefix
        statement = (
            update(api_keys)
            .where(
                or_(api_keys.c.id == wanted, api_keys.c.prefix == wanted),
                api_keys.c.secret_sha256 != NO_SECRET,
                api_keys.c.revoked_at.is_(None),
            )
            .values(revoked_at=func.now())
        )
        with database_errors("revoke key"), self._engine.begin() as db:
            return bool(db.execute(statement).rowcount)

    def tenant_names(self) -> dict[str, str]:
        """Return the name of every tenant by its id."""
        with database_errors("list tenants"), self._single.connect() as db:
            rows = db.execute(select(tenants.c.id, tenants.c.name)).all()
        return {str(row.id): str(row.name) for row in rows}

    def register_model(self, card: ModelCard) -> None:
        """Write what a starting worker serves; the newest card of a name wins."""
        values = {"card": msgspec.to_builtins(card), "seen_at": func.now()}
        with database_errors("register model"), self._engine.begin() as db:
            db.execute(
                upsert(models)
                .values(name=card.name, **values)
                .on_conflict_do_update(index_elements=["name"], set_=values)
            )

    def list_models(self) -> list[ModelCard]:
        """Return the cards of all models that were ever served, by name."""
        with database_errors("list models"), self._single.connect() as db:
            rows = db.execute(select(models.c.card).order_by(models.c.name)).scalars().all()
        return [msgspec.convert(row, ModelCard) for row in rows]


def _keys() -> Any:
    columns: list[Any] = [c for c in api_keys.c if c.key != "secret_sha256"]
    return (
        select(*columns, tenants.c.name.label("tenant"))
        .join(tenants, tenants.c.id == api_keys.c.tenant_id)
        .where(api_keys.c.secret_sha256 != NO_SECRET)  # own_key: nothing to give or revoke
    )
