"""The audit log: who did what to the fleet, and how it ended.

An action's row is written before the action (`begin`, outcome BEGUN) and completed after it
(`end`). So nothing is done of which no row tells; a row that stayed BEGUN is an action whose end
could not be written, and the log lines have it (gateway/dashboard/guard).

Invariants:
1. A row is complete in itself: it names the actor, and outlives operator, key and job.
2. Texts are cut to what a row may hold and freed of what Postgres does not store; details too large
   are left out, and the row says so. A key that stands in one is cut to the part that is no secret.

Called by: gateway/dashboard (guard, login, audit).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, RowMapping, insert, select, update

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.records import audit

#: Outcomes that are no error's code.
BEGUN, DONE = "begun", "done"

MAX_TEXT = 200  # characters of actor, target and address
MAX_DETAILS_BYTES = 4096

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_SECRET = re.compile(r"(hr_[0-9a-f]{12})_[0-9a-f]{48}")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of an action before it."""

    actor: str  # an operator's name, a key's id; "?": nobody we know
    actor_kind: str  # operator | key | nobody
    role: str | None
    action: str
    address: str | None
    target: str = ""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Audit:
    """Transactions on the audit log, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._single = autocommitting(engine)

    def begin(self, entry: Entry) -> int:
        """Write that an action is about to be done; return the row's id for `end`."""
        return self.write(entry, BEGUN)

    def write(self, entry: Entry, outcome: str) -> int:
        """Write a whole row."""
        values = {
            "actor": plain_text(entry.actor),
            "actor_kind": entry.actor_kind,
            "role": entry.role,
            "action": entry.action,
            "target": plain_text(entry.target),
            "outcome": outcome,
            "details": _details(entry.details),
            "address": None if entry.address is None else plain_text(entry.address),
        }
        with database_errors("write audit"), self._single.connect() as db:
            return db.execute(insert(audit).values(values).returning(audit.c.id)).scalar_one()

    def end(self, row_id: int, outcome: str, target: str, details: Mapping[str, Any]) -> None:
        """Write how the action of a row ended."""
        values = {"outcome": outcome, "target": plain_text(target), "details": _details(details)}
        with database_errors("end audit"), self._single.connect() as db:
            db.execute(update(audit).where(audit.c.id == row_id).values(values))

    def page(
        self,
        *,
        limit: int,
        before: int | None = None,
        actor: str | None = None,
        action: str | None = None,
        outcome: str | None = None,
    ) -> Sequence[RowMapping]:
        """Return rows, newest first, from the one before `before` on."""
        query = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.id < before)
        for column, value in (("actor", actor), ("action", action), ("outcome", outcome)):
            if value is not None:
                query = query.where(audit.c[column] == value)
        with database_errors("list audit"), self._single.connect() as db:
            return db.execute(query).mappings().all()


def plain_text(text: str) -> str:
    """Return a text as rows and log lines of the audit hold it."""
    return _cleaned(text)[:MAX_TEXT]


def _cleaned(text: str) -> str:
    return _SECRET.sub(r"\1_...", _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text))


def _details(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return the details as JSON that Postgres stores."""
    written = json.dumps(dict(details), default=str, ensure_ascii=False)
    if len(written.encode("utf-8", "replace")) > MAX_DETAILS_BYTES:
        return {"left_out": f"details of {len(written):,} characters"}
    return _stored(json.loads(written))


def _stored(value: Any) -> Any:
    if isinstance(value, str):
        return _cleaned(value)
    if isinstance(value, list):
        return [_stored(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {_stored(k): _stored(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value
