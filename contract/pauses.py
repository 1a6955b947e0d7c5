"""Which queues are paused: the table queue_pauses is the authority, Redis holds a copy.

Invariants:
1. A pause is committed before Redis is told: it survives the loss of Redis, and the sweeper copies
   it back before it enqueues what was lost.
2. Redis's copy is at most one sweep behind: a write that raced with a sweep is put right by the
   next one.
3. `*` stands for all of a kind. A pause of all models holds for those that come later too.

Called by: gateway/dashboard/queues, gateway/upkeep (restore).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import Engine, RowMapping, delete, select
from sqlalchemy.dialects.postgresql import insert as upsert

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.live import Live
from headrace.contract.records import models, queue_pauses

ALL = "*"


class Pauses:
    """Transactions on pauses, and their copy."""

    def __init__(self, engine: Engine, live: Live) -> None:
        self._engine = engine
        self._single = autocommitting(engine)
        self._live = live

    def list(self) -> Sequence[RowMapping]:
        """Return all pauses, oldest first."""
        with database_errors("list pauses"), self._single.connect() as db:
            query = select(queue_pauses).order_by(queue_pauses.c.paused_at)
            return db.execute(query).mappings().all()

    def pause(self, *, model: str, job_class: str, tenant_id: str, by: str) -> None:
        """Pause what the three name, `*` being all; a repeat keeps who paused it first."""
        values = {"model": model, "job_class": job_class, "tenant_id": tenant_id}
        statement = upsert(queue_pauses).values(
            {queue_pauses.c[name]: value for name, value in values.items()}
            | {queue_pauses.c.paused_by: by}
        )
        with database_errors("pause queue"), self._engine.begin() as db:
            db.execute(statement.on_conflict_do_nothing())

    def resume(self, *, model: str, job_class: str, tenant_id: str) -> int:
        """Lift the pauses that lie wholly within what the three name; return how many."""
        wanted = {"model": model, "job_class": job_class, "tenant_id": tenant_id}
        within: list[Any] = [
            queue_pauses.c[name] == value for name, value in wanted.items() if value != ALL
        ]
        with database_errors("resume queue"), self._engine.begin() as db:
            return db.execute(delete(queue_pauses).where(*within)).rowcount

    def restore(self) -> list[str]:
        """Copy the pauses to Redis, for every model; return the models where it differed."""
        with database_errors("read pauses"), self._single.connect() as db:
            names = db.execute(select(models.c.name)).scalars().all()
            rows = db.execute(select(queue_pauses)).mappings().all()
        return self._live.set_pauses(by_model(names, rows))


def by_model(names: Iterable[str], rows: Sequence[RowMapping]) -> dict[str, set[str]]:
    """Return each model's `<class>:<tenant>` members, as the claim script reads them."""
    found: dict[str, set[str]] = {name: set() for name in names}
    for row in rows:
        if row["model"] != ALL:
            found.setdefault(row["model"], set())
    for row in rows:
        for name in found if row["model"] == ALL else (row["model"],):
            found[name].add(f"{row['job_class']}:{row['tenant_id']}")
    return found


def is_paused(members: Collection[str], job_class: str, tenant_id: str) -> bool:
    """Say whether a queue is paused by any of the members; the claim script asks the same."""
    return any(
        f"{of_class}:{of_tenant}" in members
        for of_class in (ALL, job_class)
        for of_tenant in (ALL, tenant_id)
    )
