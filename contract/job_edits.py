"""What operators do to jobs, many at a time: cancel, make anew, give another priority.

Invariants:
1. Each call is one transaction over the ids it was given; callers cut long lists (BATCH).
2. A state changes only as the ledger would change it: what never ran ends as canceled, what has run
   is marked for whoever ends it; nothing else sets a state here.
3. A job ends once, so "retry" makes a new job of the same tenant, key and input, with `made_from`
   and an outbox row; its deadline, if it had one, is as far from now as the first was.
4. Rows that another transaction holds are not waited for: they come back as not done. Two
   transactions that lock many rows in different orders would stop each other. Dead letters are
   waited for, locked in the order of their ids.
5. However a job was made anew, its dead letter, if it has one, says so in the same transaction.

Called by: gateway/dashboard/jobs; make_anew by dead_letters and replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    Text,
    and_,
    bindparam,
    case,
    column,
    func,
    insert,
    literal,
    select,
    update,
    values,
)

from headrace.contract.database import database_errors
from headrace.contract.ids import new_id
from headrace.contract.labels import labeling
from headrace.contract.records import dead_letters, jobs, outbox
from headrace.contract.wire import FinishReason, JobStatus

#: Jobs of one transaction: short enough that nobody waits for its locks.
BATCH = 500

#: States a job can be canceled, made anew, or moved in.
CANCELABLE = (JobStatus.QUEUED, JobStatus.RUNNING)
RETRYABLE = (JobStatus.FAILED, JobStatus.CANCELED, JobStatus.EXPIRED)
MOVABLE = (JobStatus.QUEUED,)

#: What a new job takes from the one it is made from.
_COPIED = ("tenant_id", "key_id", "model", "job_class", "priority", "input", "sampling", "meta",
           "cost_tokens")  # fmt: skip
_NEVER_RAN = and_(jobs.c.status == JobStatus.QUEUED, jobs.c.attempt == 0)
#: Columns that specs.spec_of or specs.end_of read.
_NEEDED = [c for c in jobs.c if c.key not in ("output_text", "output_ends", "output_logprobs")]


class JobEdits:
    """Transactions on lists of jobs, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def cancel(self, job_ids: Sequence[str]) -> Sequence[RowMapping]:
        """End what never ran, mark the rest; return the rows of all that were still open."""
        ended = {
            "status": JobStatus.CANCELED,
            "finish_reason": FinishReason.CANCELED,
            "finished_at": func.now(),
        }
        statement = (
            update(jobs)
            .where(jobs.c.id.in_(self._locked(job_ids, CANCELABLE)))
            .values(
                cancel_requested_at=func.coalesce(jobs.c.cancel_requested_at, func.now()),
                **{
                    name: case((_NEVER_RAN, value), else_=jobs.c[name])
                    for name, value in ended.items()
                },
            )
            .returning(*_NEEDED)
        )
        with database_errors("cancel jobs"), self._engine.begin() as db:
            return db.execute(statement).mappings().all()

    def retry(self, job_ids: Sequence[str]) -> list[tuple[str, str]]:
        """Make a new job of each that ended without success; return pairs (old id, new id)."""
        with database_errors("retry jobs"), self._engine.begin() as db:
            return make_anew(db, job_ids)

    def set_priority(self, job_ids: Sequence[str], priority: str) -> Sequence[RowMapping]:
        """Give the jobs that are queued another priority; return their rows."""
        statement = (
            update(jobs)
            .where(jobs.c.id.in_(self._locked(job_ids, MOVABLE)))
            .values(priority=priority)
            .returning(*_NEEDED)
        )
        with database_errors("change priority"), self._engine.begin() as db:
            return db.execute(statement).mappings().all()

    @staticmethod
    def _locked(job_ids: Sequence[str], statuses: Sequence[str]) -> Any:
        locked = (
            select(jobs.c.id)
            .where(jobs.c.id.in_(job_ids), jobs.c.status.in_(statuses))
            .with_for_update(skip_locked=True)
            .cte("locked")
        )
        return select(locked.c.id)


def make_anew(db: Connection, job_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Retry in the caller's transaction; return pairs (old id, new id)."""
    pairs = [(job_id, new_id("job")) for job_id in job_ids]
    if not pairs:
        return []
    named = values(column("old", Text), column("new", Text), name="pairs").data(pairs)
    taken: dict[str, Any] = {name: jobs.c[name] for name in _COPIED}
    taken |= {
        "id": named.c.new,
        "made_from": jobs.c.id,
        "status": literal(JobStatus.QUEUED.value),
        "deadline_at": func.now() + (jobs.c.deadline_at - jobs.c.created_at),
    }
    old = (
        select(*(value.label(name) for name, value in taken.items()))
        .join(named, jobs.c.id == named.c.old)
        .where(jobs.c.status.in_(RETRYABLE))
    )
    made = db.execute(
        insert(jobs).from_select(list(taken), old).returning(jobs.c.made_from, jobs.c.id)
    ).all()
    if not made:
        return []
    db.execute(insert(outbox), [{"job_id": row.id} for row in made])
    db.execute(labeling(jobs, jobs.c.id.in_([row.id for row in made])))
    done = [(row.made_from, row.id) for row in made]
    _mark_replayed(db, done)
    return done


def _mark_replayed(db: Connection, made: Sequence[tuple[str, str]]) -> None:
    """Write into the dead letters of these jobs what they were made anew as."""
    letters = dead_letters.c
    locked = select(letters.job_id).where(letters.job_id.in_([old for old, _ in made]))
    found = set(db.execute(locked.order_by(letters.job_id).with_for_update()).scalars())
    told = [{"of_job": old, "new_job": new} for old, new in made if old in found]
    if told:
        db.execute(
            update(dead_letters)
            .where(letters.job_id == bindparam("of_job"))
            .values(replayed_at=func.now(), replayed_as=bindparam("new_job")),
            told,
        )
