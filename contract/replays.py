"""Replays of many dead letters at a set rate: rows that the tasks process works off.

    started  -> ended                 [Replays.step: no letter that it could take is left]
    started  -> ended, canceled_by    [Replays.stop]

A step is one transaction: it locks the replay's row, takes as many letters as are due, makes the
new jobs with their outbox rows (job_edits.make_anew), writes each one's idempotency key, counts,
and says up to when the rate is spent. So a process that is killed in the middle has done nothing,
and one whose commit went through has counted it.

Invariants:
1. A replay takes a letter at most once: steps of one replay come one after the other (the row
   lock), the letter says that it was replayed, and (tenant, `replay <id> <job>`) is a primary key.
2. A filter is replayed by one that has not ended: also of two who start one at the same instant.
3. It takes letters that were there when it began: a job that dies once more is not replayed by the
   same replay again and again.
4. It makes at most rate_per_min jobs a minute, and after an outage at most BURST_S of them at once:
   what was missed is not caught up with.
5. When it has ended, num_done + num_refused == num_matched unless it was stopped: refused are
   those that somebody else replayed, or that were deleted, meanwhile.

Called by: gateway/replays (steps), gateway/dashboard/dead_letters (all else).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.dead_letters import LetterFilter, conditions, untouched
from headrace.contract.errors import NotFound, ReplayEnded, ReplayUnderWay
from headrace.contract.ids import new_id
from headrace.contract.job_edits import BATCH, make_anew
from headrace.contract.records import dead_letters, idempotency_keys, replays

#: Jobs a minute a replay may make.
MIN_RATE, MAX_RATE = 1, 6000
#: Of those who start a replay one looks for another of its filter at a time; any other number.
START_LOCK = 0x7265_706C_6179
#: Seconds of its rate a replay may make up for at once: a tick that came late, no outage.
BURST_S = 5.0


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did."""

    num_made: int
    is_ended: bool


class Replays:
    """Transactions on replays, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._single = autocommitting(engine)

    def start(
        self, wanted: LetterFilter, *, rate_per_min: int, by: str, num_matched: int
    ) -> RowMapping:
        """Begin to replay the letters that match; its first job is made at the next step."""
        spent = func.now() - timedelta(minutes=1 / rate_per_min)
        given = filter_json(wanted)
        same = select(replays.c.id).where(replays.c.ended_at.is_(None), replays.c.filter == given)
        row = {
            "id": new_id("rpl"),
            "filter": given,
            "rate_per_min": rate_per_min,
            "by": by,
            "num_matched": num_matched,
            "paced_at": spent,
        }
        with database_errors("start replay"), self._engine.begin() as db:
            db.execute(select(func.pg_advisory_xact_lock(START_LOCK)))  # two would find none each
            if (other := db.execute(same.limit(1)).scalar()) is not None:
                raise ReplayUnderWay(
                    f"a replay of this filter was asked; {other} replays the same letters: wait "
                    "for its end, or stop it first"
                )
            return db.execute(insert(replays).values(row).returning(*replays.c)).mappings().one()

    def replay(self, replay_id: str) -> RowMapping:
        """Return a replay's row."""
        query = select(replays).where(replays.c.id == replay_id)
        with database_errors("read replay"), self._single.connect() as db:
            row = db.execute(query).mappings().first()
        if row is None:
            raise NotFound(f"there is no replay {replay_id[:60]!r}: list them, and check the id")
        return row

    def newest(self, *, limit: int, before: str | None = None) -> Sequence[RowMapping]:
        """Return replays, newest first, from the one before `before` on."""
        query = select(replays).order_by(replays.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(replays.c.id < before)
        with database_errors("list replays"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def open_ids(self) -> list[str]:
        """Return the replays that have not ended, oldest first."""
        query = select(replays.c.id).where(replays.c.ended_at.is_(None)).order_by(replays.c.id)
        with database_errors("list open replays"), self._single.connect() as db:
            return list(db.execute(query).scalars())

    def stop(self, replay_id: str, *, by: str) -> RowMapping:
        """End a replay where it is; the jobs it has made stay."""
        statement = (
            update(replays)
            .where(replays.c.id == replay_id, replays.c.ended_at.is_(None))
            .values(ended_at=func.now(), canceled_by=by)
            .returning(*replays.c)
        )
        with database_errors("stop replay"), self._single.connect() as db:
            row = db.execute(statement).mappings().first()
        if row is None:
            self.replay(replay_id)  # raises when there is none
            raise ReplayEnded(f"stop of {replay_id} was asked; it has ended: nothing is left to do")
        return row

    def step(self, replay_id: str) -> Step:
        """Make the jobs that are due now; return how many, and whether the replay has ended."""
        locked = (
            select(*replays.c, func.now().label("now"))
            .where(replays.c.id == replay_id, replays.c.ended_at.is_(None))
            .with_for_update(skip_locked=True)
        )
        with database_errors("step replay"), self._engine.begin() as db:
            row = db.execute(locked).mappings().first()
            if row is None:
                return Step(0, is_ended=False)  # another process has its turn, or it was stopped
            num_due, paced_at = _due(row["rate_per_min"], row["paced_at"], row["now"])
            if num_due == 0:
                return Step(0, is_ended=False)
            num_made = _make(db, row, num_due)
            # Fewer than are due: none is left, or others hold some, which is seen by looking again.
            is_ended = num_made < num_due and not db.execute(_left(row)).scalar_one()
            changes: dict[str, Any] = {
                "num_done": replays.c.num_done + num_made,
                "paced_at": paced_at,
            }
            if is_ended:
                refused = func.greatest(0, replays.c.num_matched - replays.c.num_done - num_made)
                changes |= {"ended_at": func.now(), "num_refused": refused}
            db.execute(update(replays).where(replays.c.id == replay_id).values(changes))
        return Step(num_made, is_ended)


def filter_json(wanted: LetterFilter) -> dict[str, Any]:
    """Return the filter as a replay's row keeps it, by the names of the API."""
    given = {
        "signature": wanted.signature,
        "model": wanted.model,
        "tenant": wanted.tenant,
        "created_after": wanted.created_after and wanted.created_after.isoformat(),
        "created_before": wanted.created_before and wanted.created_before.isoformat(),
        "job_ids": None if wanted.job_ids is None else sorted(wanted.job_ids),
    }
    return {name: value for name, value in given.items() if value is not None}


def filter_of(given: dict[str, Any]) -> LetterFilter:
    """Return what filter_json was made from."""
    return LetterFilter(
        signature=given.get("signature"),
        model=given.get("model"),
        tenant=given.get("tenant"),
        created_after=_moment(given.get("created_after")),
        created_before=_moment(given.get("created_before")),
        job_ids=tuple(given["job_ids"]) if "job_ids" in given else None,
    )


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _due(rate_per_min: int, paced_at: datetime, now: datetime) -> tuple[int, datetime]:
    """Return how many jobs the rate allows now, and up to when it is spent once they are made."""
    apart = timedelta(minutes=1 / rate_per_min)
    most = min(BATCH, max(1, int(rate_per_min * BURST_S / 60)))
    num = (now - paced_at) // apart
    if num > most:
        return most, now
    return max(0, num), paced_at + num * apart if num > 0 else paced_at


def _make(db: Connection, replay: RowMapping, num: int) -> int:
    """Make new jobs of the next letters; return how many."""
    query = (
        select(dead_letters.c.job_id, dead_letters.c.tenant_id)
        .where(*_matching(replay))
        .order_by(dead_letters.c.job_id)
        .limit(num)
        .with_for_update(of=dead_letters)
    )
    letters = {row.job_id: row.tenant_id for row in db.execute(query).all()}
    made = make_anew(db, list(letters))
    if made:
        db.execute(
            insert(idempotency_keys),
            [
                {
                    "tenant_id": letters[old],
                    "key": _key(replay["id"], old),
                    "request_sha256": b"",
                    "job_id": new,
                }
                for old, new in made
            ],
        )
    return len(made)


def _left(replay: RowMapping) -> Any:
    return select(exists(select(dead_letters.c.job_id).where(*_matching(replay))))


def _matching(replay: RowMapping) -> list[ColumnElement[bool]]:
    """Return the conditions of the letters that this replay is still to take."""
    taken = select(idempotency_keys.c.key).where(
        idempotency_keys.c.tenant_id == dead_letters.c.tenant_id,
        idempotency_keys.c.key == literal(_key(replay["id"], "")) + dead_letters.c.job_id,
    )
    return [
        *conditions(filter_of(replay["filter"])),
        *untouched(),
        dead_letters.c.created_at <= replay["created_at"],
        ~taken.exists(),
    ]


def _key(replay_id: str, job_id: str) -> str:
    """Return an idempotency key that no client can send: theirs hold no space."""
    return f"replay {replay_id} {job_id}"
