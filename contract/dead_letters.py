"""Dead letters: the jobs that ended as poison, kept with what they died of.

A letter is written by contract/crashes in the transaction that ends its job, and goes with the job
(retention). Here letters are read, counted, and replayed: a replay is the retry of the letter's job
(job_edits.make_anew), so the new job has the same tenant, key and input, and `made_from`.

Invariants:
1. A letter is replayed once unless it is asked for by name and `again`; two who ask at the same
   time make one job.
2. A letter that was replayed names the newest job made of it, whichever way that was made
   (job_edits.make_anew writes it).
3. A page holds exactly the letters older than its cursor that match, newest job first.
4. A tenant reads nothing of this: signatures and details are for operators.

Called by: replays.py, gateway/dashboard (dead_letters, jobs, sampler).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Engine,
    RowMapping,
    distinct,
    false,
    func,
    or_,
    select,
)

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.errors import LetterReplayed, NotFound
from headrace.contract.job_edits import RETRYABLE, make_anew
from headrace.contract.records import dead_letters, jobs, tenants

#: Letters a selection may name.
MAX_SELECTED = 500


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """What letters must have in common; what is None does not count."""

    signature: str | None = None  # all of it
    model: str | None = None
    tenant: str | None = None  # its name or id
    is_replayed: bool | None = None
    created_after: datetime | None = None  # when it died; inclusive
    created_before: datetime | None = None  # exclusive
    job_ids: tuple[str, ...] | None = None  # only these

    @property
    def is_empty(self) -> bool:
        return self == LetterFilter()


@dataclass(frozen=True, slots=True)
class LetterPage:
    """Letters, and the job that the next page begins after."""

    rows: Sequence[RowMapping]
    next_before: str | None


@dataclass(frozen=True, slots=True)
class Groups:
    """Letters by signature, the newest death first, and how many signatures there are in all."""

    rows: Sequence[RowMapping]
    num_groups: int


class DeadLetters:
    """Transactions on letters, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._single = autocommitting(engine)

    def groups(self, wanted: LetterFilter, *, limit: int) -> Groups:
        """Return the letters that match, counted by signature."""
        letters = dead_letters.c
        counted = (
            select(
                letters.signature,
                func.count().label("num_letters"),
                func.count().filter(letters.replayed_at.is_(None)).label("num_unreplayed"),
                func.min(letters.created_at).label("first_at"),
                func.max(letters.created_at).label("last_at"),
                func.array_agg(distinct(letters.model)).label("models"),
                func.array_agg(distinct(tenants.c.name)).label("tenants"),
                func.max(letters.job_id).label("newest"),
                func.count().over().label("num_groups"),
            )
            .join(tenants, tenants.c.id == letters.tenant_id)
            .where(*conditions(wanted))
            .group_by(letters.signature)
            .order_by(func.max(letters.created_at).desc(), letters.signature)
            .limit(limit)
            .subquery()
        )
        query = (
            select(*counted.c, letters.detail)  # of the newest job
            .join(dead_letters, letters.job_id == counted.c.newest)
            .order_by(counted.c.last_at.desc(), counted.c.signature)
        )
        with database_errors("group dead letters"), self._single.connect() as db:
            rows = db.execute(query).mappings().all()
        return Groups(rows, rows[0]["num_groups"] if rows else 0)

    def page(self, wanted: LetterFilter, *, limit: int, before: str | None = None) -> LetterPage:
        """Return the letters of the newest `limit` jobs that match and are older than `before`."""
        query = _shown().where(*conditions(wanted)).order_by(dead_letters.c.job_id.desc())
        if before is not None:
            query = query.where(dead_letters.c.job_id < before)
        with database_errors("list dead letters"), self._single.connect() as db:
            rows = db.execute(query.limit(limit + 1)).mappings().all()
        return LetterPage(rows[:limit], rows[limit - 1]["job_id"] if len(rows) > limit else None)

    def letter(self, job_id: str) -> RowMapping | None:
        """Return a job's letter; None when the job did not end as poison."""
        query = _shown().where(dead_letters.c.job_id == job_id)
        with database_errors("read dead letter"), self._single.connect() as db:
            return db.execute(query).mappings().first()

    def num_replayable(self, wanted: LetterFilter) -> int:
        """Count the letters that match and that a replay of many would take now."""
        query = select(func.count()).select_from(dead_letters)
        query = query.where(*conditions(wanted), *untouched())
        with database_errors("count dead letters"), self._single.connect() as db:
            return db.execute(query).scalar_one()

    def num_new(self, *, newer_than_s: float) -> Mapping[str, int]:
        """Return how many letters each model got lately; models without one are left out."""
        since = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, newer_than_s)
        query = (
            select(dead_letters.c.model, func.count())
            .where(dead_letters.c.created_at >= since)
            .group_by(dead_letters.c.model)
        )
        with database_errors("count new dead letters"), self._single.connect() as db:
            return {str(model): int(count) for model, count in db.execute(query).all()}

    def replay(self, job_id: str, *, again: bool = False) -> str:
        """Make a new job of a letter's; return its id."""
        locked = select(dead_letters).where(dead_letters.c.job_id == job_id).with_for_update()
        with database_errors("replay dead letter"), self._engine.begin() as db:
            row = db.execute(locked).mappings().first()
            if row is None:
                raise no_letter(job_id)
            if row["replayed_at"] is not None and not again:
                raise LetterReplayed(
                    f"replay of {job_id} was asked; it was replayed as {row['replayed_as']} "
                    "already: look how that ended, and send `again` to make one more"
                )
            ((_, made),) = make_anew(db, [job_id])
        return made


def no_letter(job_id: str) -> NotFound:
    return NotFound(
        f"there is no dead letter of {job_id[:60]!r}: check the id; a job has one when it ended "
        "as poison, until it is deleted"
    )


def conditions(wanted: LetterFilter) -> list[ColumnElement[bool]]:
    """Return the filter in SQL, over `dead_letters`."""
    letters, found = dead_letters.c, list[ColumnElement[bool]]()
    if wanted.signature is not None:
        found.append(letters.signature == wanted.signature)
    if wanted.model is not None:
        found.append(letters.model == wanted.model)
    if wanted.tenant is not None:
        mine = or_(tenants.c.id == wanted.tenant, tenants.c.name == wanted.tenant)
        found.append(letters.tenant_id.in_(select(tenants.c.id).where(mine)))
    if wanted.is_replayed is not None:
        is_open = letters.replayed_at.is_(None)
        found.append(~is_open if wanted.is_replayed else is_open)
    if wanted.created_after is not None:
        found.append(letters.created_at >= wanted.created_after)
    if wanted.created_before is not None:
        found.append(letters.created_at < wanted.created_before)
    if wanted.job_ids is not None:
        found.append(letters.job_id.in_(wanted.job_ids) if wanted.job_ids else false())
    return found


def untouched() -> list[ColumnElement[bool]]:
    """Return what holds for the letters that a replay of many takes."""
    ended = select(jobs.c.id).where(
        jobs.c.id == dead_letters.c.job_id, jobs.c.status.in_(RETRYABLE)
    )
    return [dead_letters.c.replayed_at.is_(None), ended.exists()]


def _shown() -> Any:
    """Select letters with the tenant's name, and how the job they were replayed as is now."""
    later = jobs.alias("later")
    return (
        select(
            *dead_letters.c,
            tenants.c.name.label("tenant"),
            later.c.status.label("replayed_status"),  # null: not replayed, or deleted since
        )
        .join(tenants, tenants.c.id == dead_letters.c.tenant_id)
        .outerjoin(later, later.c.id == dead_letters.c.replayed_as)
    )
