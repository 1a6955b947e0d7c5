"""Tenants, API keys and the models the fleet serves: the rows that change rarely.

A key is `hr_<prefix>_<secret>`: the prefix (12 hex digits) is looked up, the secret (48 hex digits,
192 random bits) is compared by its SHA-256 in constant time and stored nowhere.

Called by: gateway/auth, the CLI (`headrace keys`), worker (register_model).
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
from sqlalchemy import Engine, RowMapping, func, insert, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.ids import new_id
from headrace.contract.records import api_keys, models, tenants
from headrace.contract.wire import ModelCard

_KEY = re.compile(r"hr_([0-9a-f]{12})_([0-9a-f]{48})")


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a request speaks for."""

    tenant_id: str
    key_id: str


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

    def create_key(self, *, tenant: str, name: str) -> NewKey:
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
                )
            )
        return NewKey(key_id, tenant_id, f"hr_{prefix}_{secret}")

    def authenticate(self, key: str) -> Principal | None:
        """Return whom the key stands for; None when it is malformed, unknown or revoked."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        with database_errors("look up key"), self._engine.begin() as db:
            row = db.execute(
                select(api_keys.c.id, api_keys.c.tenant_id, api_keys.c.secret_sha256).where(
                    api_keys.c.prefix == match[1], api_keys.c.revoked_at.is_(None)
                )
            ).first()
            digest = hashlib.sha256(match[2].encode()).digest()
            if row is None or not hmac.compare_digest(digest, bytes(row.secret_sha256)):
                return None
            stale = func.now() - text("interval '1 minute'")
            db.execute(
                update(api_keys)
                .where(
                    api_keys.c.id == row.id,
                    or_(api_keys.c.last_used_at.is_(None), api_keys.c.last_used_at < stale),
                )
                .values(last_used_at=func.now())
            )
        return Principal(row.tenant_id, row.id)

    def list_keys(self) -> Sequence[RowMapping]:
        """Return all keys, newest first, with their tenant's name and nothing secret."""
        columns: list[Any] = [c for c in api_keys.c if c.key != "secret_sha256"]
        query = (
            select(*columns, tenants.c.name.label("tenant"))
            .join(tenants, tenants.c.id == api_keys.c.tenant_id)
            .order_by(api_keys.c.id.desc())
        )
        with database_errors("list keys"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def revoke_key(self, id_or_prefix: str) -> bool:
        """Revoke a key by id, prefix or the whole key; False when there is no such live key."""
        match = _KEY.fullmatch(id_or_prefix)
        wanted = match[1] if match else id_or_prefix
        statement = (
            update(api_keys)
            .where(
                or_(api_keys.c.id == wanted, api_keys.c.prefix == wanted),
                api_keys.c.revoked_at.is_(None),
            )
            .values(revoked_at=func.now())
        )
        with database_errors("revoke key"), self._engine.begin() as db:
            return bool(db.execute(statement).rowcount)

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
