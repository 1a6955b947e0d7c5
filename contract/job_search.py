"""Search of jobs over all tenants, newest first: for the operator's job pages and bulk actions.

An answer of 50 among ten million rows must not depend on how many match. `ORDER BY id DESC LIMIT
50` alone walks to the end of an index when nothing matches; an index on the rare thing alone
gathers half the table when everything does. So a search is a walk with a way out:

    1. Walk an index that the filter begins (`_LEADS`, or the labels of its metadata), newest first,
       a bounded number of rows a statement, and look at each row for the rest of the filter. Of two
       such indexes take the one whose rows are rarer lately: it has fewer to look at.
    2. After each stretch the share that matched says how far the page is. If it is near, walk on.
    3. If it is far and an index knows the rest (errors by trigrams, metadata by label), gather all
       that match there, and sort them: there are few, or the walk would have met them.

Invariants:
1. A page holds exactly the newest matches older than its cursor, whichever way found them.
2. A statement ends within TIMEOUT_MS: SearchTooBroad then says to narrow the search.
3. Ids are UUIDv7, so a range of times is a range of ids: no index on created_at exists.
4. Nothing here writes.
5. A label is not believed: the row's metadata is looked at as well.

Called by: gateway/dashboard/jobs, bench/job_search.

Size: the plan of a filter and the walk that follows it, which change together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    Select,
    Text,
    and_,
    any_,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    union_all,
)
from sqlalchemy.exc import OperationalError

from headrace.contract.database import database_errors
from headrace.contract.errors import SearchTooBroad
from headrace.contract.labels import label_of
from headrace.contract.records import ERROR, attempts, job_labels, jobs, tenants
from headrace.contract.wire import JobStatus

#: Milliseconds a statement of a search may take, and one that gathers the ids of a bulk action.
TIMEOUT_MS = 2_000
GATHER_TIMEOUT_MS = 10_000
#: Rows of the first stretches of a walk, from which the share that matches is told; and rows beyond
#: which no walk goes on while an index could be asked. In order of id rows lie side by side, eight
#: to a page: 40,000 take 20 ms. Those of a tenant lie each on its own page, but the index would
#: gather the matches of all tenants. Those of failed jobs do too, and their index gathers few.
STRETCHES, MAX_WALK = (500, 4_000), 40_000
SCATTERED_STRETCHES, MAX_SCATTERED_WALK, MAX_FAILED_WALK = (500, 1_500), 15_000, 3_000

#: A job's columns without its output, as Ledger.summary returns them.
_SUMMARY = [c for c in jobs.c if not c.key.startswith("output_") or c.key == "output_gen"]
_ERROR = literal_column(ERROR, Text)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What jobs must have in common; what is None or empty does not count."""

    id: str | None = None  # an id, or its beginning
    tenant: str | None = None  # its name or id
    statuses: tuple[str, ...] = ()
    model: str | None = None
    job_class: str | None = None
    worker: str | None = None  # of the newest attempt
    error: str | None = None  # part of its code or text, whatever the case; 3 characters or more
    meta: tuple[str, str] | None = None
    created_after: datetime | None = None  # inclusive
    created_before: datetime | None = None  # exclusive
    is_unretried: bool = False  # no other job was made from it

    @property
    def is_empty(self) -> bool:
        return self == JobFilter()


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of a page (`tenant` is the tenant's name) and the id that the next one begins after."""

    rows: Sequence[RowMapping]
    next_before: str | None


class JobSearch:
    """Searches over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def page(self, wanted: JobFilter, *, limit: int, before: str | None = None) -> Page:
        """Return the newest `limit` jobs that match and are older than the job `before`."""
        with self._searching("search jobs", TIMEOUT_MS) as db:
            tenant_ids = _tenant_ids(db, wanted)
            if tenant_ids == []:
                return Page((), None)
            # One more than asked says whether there is a next page.
            ids = _Walk(db, _plan(wanted, tenant_ids), before).newest(limit + 1)
            rows = _rows(db, ids[:limit])
        return Page(rows, ids[limit - 1] if len(ids) > limit else None)

    def ids(self, wanted: JobFilter, *, limit: int) -> list[str]:
        """Return the ids of up to `limit` jobs that match, in no order: for counts and bulks."""
        with self._searching("gather jobs", GATHER_TIMEOUT_MS) as db:
            tenant_ids = _tenant_ids(db, wanted)
            if tenant_ids == []:
                return []
            query = select(jobs.c.id).where(*_plan(wanted, tenant_ids).whole).limit(limit)
            return list(db.execute(query).scalars())

    def job(self, job_id: str) -> RowMapping | None:
        """Return a job's whole row with its tenant's name."""
        query = (
            select(*jobs.c, tenants.c.name.label("tenant"))
            .join(tenants, tenants.c.id == jobs.c.tenant_id)
            .where(jobs.c.id == job_id)
        )
        with self._searching("read job", TIMEOUT_MS) as db:
            return db.execute(query).mappings().first()

    def attempts(self, job_id: str) -> Sequence[RowMapping]:
        """Return a job's attempts, first to last."""
        query = select(attempts).where(attempts.c.job_id == job_id).order_by(attempts.c.number)
        with self._searching("read attempts", TIMEOUT_MS) as db:
            return db.execute(query).mappings().all()

    def made_of(self, job_id: str) -> list[str]:
        """Return the ids of the jobs that were retried or cloned from this one."""
        query = select(jobs.c.id).where(jobs.c.made_from == job_id).order_by(jobs.c.id).limit(100)
        with self._searching("read copies", TIMEOUT_MS) as db:
            return list(db.execute(query).scalars())

    @contextmanager
    def _searching(self, what: str, timeout_ms: int) -> Generator[Connection]:
        """Open a transaction for searching; a statement that takes too long is SearchTooBroad."""
        options = {
            "statement_timeout": str(timeout_ms),
            "plan_cache_mode": "force_custom_plan",  # a plan for any value is bad for most
            "jit": "off",  # compiling takes longer than what it would speed up
            "work_mem": "32MB",  # room for bitmaps that know rows, not only pages
        }
        settings = [func.set_config(name, value, True) for name, value in options.items()]
        with database_errors(what):
            try:
                with self._engine.begin() as db:
                    db.execute(select(*settings))
                    yield db
            except OperationalError as error:
                if not isinstance(error.orig, psycopg.errors.QueryCanceled):
                    raise
                raise SearchTooBroad(
                    f"{what}: it took longer than {timeout_ms / 1000:g} s: narrow it, for example "
                    "by a range of time or a tenant"
                ) from None


def _tenant_ids(db: Connection, wanted: JobFilter) -> list[str] | None:
    """Return the tenants that the filter means; None for all."""
    if wanted.tenant is None:
        return None
    mine = or_(tenants.c.id == wanted.tenant, tenants.c.name == wanted.tenant)
    return list(db.execute(select(tenants.c.id).where(mine)).scalars())


def _rows(db: Connection, ids: Sequence[str]) -> Sequence[RowMapping]:
    if not ids:
        return ()
    query = (
        select(*_SUMMARY, tenants.c.name.label("tenant"))
        .join(tenants, tenants.c.id == jobs.c.tenant_id)
        .where(jobs.c.id.in_(ids))
        .order_by(jobs.c.id.desc())
    )
    return db.execute(query).mappings().all()


def first_id_at(moment: datetime) -> str:
    """Return what no id made at or after the moment sorts before."""
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    milliseconds = since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000
    return f"job_{min(max(milliseconds, 0), (1 << 48) - 1):012x}"


def _id_range(wanted: JobFilter, ids: Column[Any] = jobs.c.id) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if wanted.id is not None:
        found += [ids >= wanted.id, ids < wanted.id + "g"]  # behind all hex digits
    if wanted.created_after is not None:
        found.append(ids >= first_id_at(wanted.created_after))
    if wanted.created_before is not None:
        found.append(ids < first_id_at(wanted.created_before))
    return found


def _like(part: str) -> str:
    return "%" + re.sub(r"([\\%_])", r"\\\1", part) + "%"


@dataclass(frozen=True, slots=True)
class _Lead:
    """An order to walk in, and what is then looked up row by row."""

    scans: list[list[ColumnElement[bool]]]  # the conditions of each of its index scans
    rest: list[ColumnElement[bool]]
    max_walk: int
    ids: Column[Any] = jobs.c.id  # the column that is walked
    is_sure: bool = False  # the rest is expected to hold for every row


@dataclass(frozen=True, slots=True)
class _Plan:
    """A filter as conditions: by one lead or another, and all of it."""

    leads: list[_Lead]
    whole: list[ColumnElement[bool]]
    is_indexed: bool  # an index knows what is rare


#: What a walk may be led by, the strongest first. Each is the beginning of an index that ends with
#: the id; that of the model has the status in between, so a walk of it is one scan a status.
_LEADS = (
    ("tenant", "status"),
    ("tenant",),
    ("worker",),
    ("failed",),
    ("model", "status"),
    ("model",),
    ("status",),
    ("job_class",),
)


def _plan(wanted: JobFilter, tenant_ids: list[str] | None) -> _Plan:
    either: dict[str, list[ColumnElement[bool]]] = {}  # by name, the values it may have
    if tenant_ids is not None:
        either["tenant"] = [jobs.c.tenant_id == tenant_id for tenant_id in tenant_ids]
    for name in ("worker", "model", "job_class"):
        if (value := getattr(wanted, name)) is not None:
            either[name] = [jobs.c[name] == value]
    if wanted.statuses:
        either["status"] = [jobs.c.status == status for status in wanted.statuses]
    if wanted.error is not None:
        either["failed"] = [jobs.c.error_code.is_not(None)]
    ids, hard = _id_range(wanted), _hard(wanted)
    whole = [or_(*values) for values in either.values()] + ids + hard + _labeled(wanted)
    found = [lead for lead in _LEADS if all(name in either for name in lead)]
    lead = () if wanted.id is not None or not found else found[0]
    leads: list[_Lead] = []
    if wanted.meta is not None and wanted.id is None:
        leads.append(_label_lead(wanted, [or_(*values) for values in either.values()] + hard))
    if lead == ("model",):
        lead = ("model", "status")
        either["status"] = [jobs.c.status == status for status in JobStatus]
    is_indexed = wanted.error is not None or wanted.meta is not None
    if lead or not leads:
        rest = [or_(*values) for name, values in either.items() if name not in lead] + hard
        scans = [[*each, *ids] for each in itertools.product(*(either[name] for name in lead))]
        leads.append(_Lead(scans, rest, _max_walk(lead, is_indexed)))
    return _Plan(leads, whole, is_indexed)


def _max_walk(lead: tuple[str, ...], is_indexed: bool) -> int:
    if not (is_indexed and lead):
        return MAX_WALK
    return MAX_FAILED_WALK if lead == ("failed",) else MAX_SCATTERED_WALK


def _label_lead(wanted: JobFilter, rest: list[ColumnElement[bool]]) -> _Lead:
    scan = [*_labels(wanted), *_id_range(wanted, job_labels.c.job_id)]
    return _Lead([scan], rest, MAX_SCATTERED_WALK, job_labels.c.job_id, is_sure=len(rest) == 1)


def _labels(wanted: JobFilter) -> list[ColumnElement[bool]]:
    return [] if wanted.meta is None else [job_labels.c.label == label_of(*wanted.meta)]


def _labeled(wanted: JobFilter) -> list[ColumnElement[bool]]:
    labels = _labels(wanted)
    return [jobs.c.id.in_(select(job_labels.c.job_id).where(*labels))] if labels else []


def _hard(wanted: JobFilter) -> list[ColumnElement[bool]]:
    """Return the conditions that no index holds in order of id."""
    found: list[ColumnElement[bool]] = []
    if wanted.error is not None:
        found.append(_ERROR.ilike(_like(wanted.error)))
    if wanted.meta is not None:
        name, value = wanted.meta
        found.append(jobs.c.meta.contains({name: value}))
    if wanted.is_unretried:
        later = jobs.alias("later")
        found.append(~select(later.c.id).where(later.c.made_from == jobs.c.id).exists())
    return found


class _Walk:
    """One search: from the newest match to as many as a page wants."""

    def __init__(self, db: Connection, plan: _Plan, before: str | None) -> None:
        self._db = db
        self._plan = plan
        self._before = before
        self._lead = self._rarest(plan.leads)

    def newest(self, count: int) -> list[str]:
        if not self._lead.rest:
            return list(self._db.execute(self._stretch(self._lead, count)).scalars())
        found: list[str] = []
        num_walked = 0
        most = self._lead.max_walk
        lengths = STRETCHES if most == MAX_WALK else SCATTERED_STRETCHES
        for length in (count, *lengths) if self._lead.is_sure else lengths:
            num_walked += length
            if self._walk(found, count, length):
                return found
        while found and (ahead := num_walked * (count - len(found)) / len(found)) <= most:
            length = max(STRETCHES[0], int(ahead * 1.3))
            num_walked += length
            if self._walk(found, count, length):
                return found
        return found + self._gather(count - len(found))

    def _rarest(self, leads: Sequence[_Lead]) -> _Lead:
        """Return the lead whose first stretch reaches farthest back, asked of the indexes alone."""
        if len(leads) == 1:
            return leads[0]

        def reach(lead: _Lead) -> tuple[str, int]:
            last, num = self._end(lead, SCATTERED_STRETCHES[0])
            return (last if last and num == SCATTERED_STRETCHES[0] else "", num)

        return min(leads, key=reach)

    def _end(self, lead: _Lead, length: int) -> tuple[str | None, int]:
        """Return the last id of the next stretch, None when nothing is left, and its rows."""
        ahead = self._stretch(lead, length).subquery()
        last, num = self._db.execute(select(func.min(ahead.c.id), func.count(ahead.c.id))).one()
        return last, num

    def _walk(self, found: list[str], count: int, length: int) -> bool:
        """Look at the next `length` rows; True when the page is full or nothing is left.

        First where they end, from the index alone; then all of them at once, which lets Postgres
        read their pages ahead. In order of the index it would wait for each page by itself.
        """
        last, num, these = self._ahead(length)
        if last is None:
            return True
        walked = (
            select(jobs.c.id, and_(*self._lead.rest).label("is_match"))
            .where(*these)
            .cte("walked")
            .prefix_with("MATERIALIZED")
        )
        matching = select(walked.c.id).where(walked.c.is_match).order_by(walked.c.id.desc())
        found += self._db.execute(matching.limit(count - len(found))).scalars()
        self._before = last
        return len(found) >= count or num < length

    def _ahead(self, length: int) -> tuple[str | None, int, list[ColumnElement[bool]]]:
        """Return what _end does and the conditions of the jobs up to there."""
        lead = self._lead
        if lead.ids is not jobs.c.id:  # labels: as few as they are, by name
            ids = list(self._db.execute(self._stretch(lead, length)).scalars())
            these = jobs.c.id == any_(literal(ids, ARRAY(Text)))
            return (ids[-1] if ids else None), len(ids), [these]
        last, num = self._end(lead, length)
        scans = [and_(true(), *scan, *self._older(lead)) for scan in lead.scans]
        return last, num, [or_(*scans), jobs.c.id >= (last or "")]

    def _older(self, lead: _Lead) -> list[ColumnElement[bool]]:
        return [] if self._before is None else [lead.ids < self._before]

    def _gather(self, count: int) -> list[str]:
        """Find the rest without a bound: by the index that knows it, or by a plain search."""
        older = [] if self._before is None else [jobs.c.id < self._before]
        query = select(jobs.c.id).where(*self._plan.whole, *older)
        if self._plan.is_indexed:  # no ORDER BY in it, lest the planner walk once more
            query = select(query.cte("gathered").prefix_with("MATERIALIZED").c.id)
        newest_first = query.selected_columns.id.desc()
        return list(self._db.execute(query.order_by(newest_first).limit(count)).scalars())

    def _stretch(self, lead: _Lead, length: int) -> Select[Any]:
        """Select the next ids, newest first: one index scan, or several merged."""
        parts: list[Any] = [
            select(lead.ids.label("id"))
            .where(*scan, *self._older(lead))
            .order_by(lead.ids.desc())
            .limit(length)
            for scan in lead.scans
        ]
        if len(parts) == 1:
            return parts[0]
        merged = union_all(*(select(part.subquery()) for part in parts)).subquery()
        return select(merged.c.id).order_by(merged.c.id.desc()).limit(length)
