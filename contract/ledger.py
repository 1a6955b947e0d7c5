"""The transactions on jobs: accept, pick up, finish, hand back, cancel, expire.

Invariants:
1. Accepted means durable: `accept_job` has committed job and outbox row when it returns.
2. The attempt number is handed out here alone (`pick_up`), so it grows even if Redis is lost.
3. A job ends once: every ending is one UPDATE that requires the state it ends from and, for a
   running job, the attempt that ends it. A repeat of the same ending is told so, not refused.
4. No transaction stays open over anything but its own statements.

The state machine is drawn at wire.JobStatus; each transition is the function named there.

Called by: gateway/jobs, worker/intake, worker/emit, tasks.

Size: one class of short transactions, read side by side to see that the states agree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Engine,
    RowMapping,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from headrace.contract.accepting import insert_job
from headrace.contract.database import autocommitting, database_errors
from headrace.contract.errors import DeadlineExceeded, IdempotencyMismatch
from headrace.contract.records import attempts, idempotency_keys, jobs, outbox
from headrace.contract.timings import Timings
from headrace.contract.wire import FinishReason, JobStatus

#: Columns of a job but its output, which lists and state checks do not need.
_SUMMARY = [c for c in jobs.c if not c.key.startswith("output_") or c.key == "output_gen"]
_OPEN = (JobStatus.QUEUED, JobStatus.RUNNING)
_OVERDUE = and_(jobs.c.status == JobStatus.QUEUED, jobs.c.deadline_at <= func.now())


#: Statements of the busiest paths, built once: building costs as much as running (0.5-1 ms).
_JOB = select(jobs).where(jobs.c.id == bindparam("job_id"))
_OWN_JOB = _JOB.where(jobs.c.tenant_id == bindparam("tenant_id"))
_OWN_SUMMARY = select(*_SUMMARY).where(
    jobs.c.id == bindparam("job_id"), jobs.c.tenant_id == bindparam("tenant_id")
)


@dataclass(frozen=True, slots=True)
class Accepted:
    job: RowMapping
    is_replay: bool  # an earlier request with the same Idempotency-Key made it


@dataclass(frozen=True, slots=True)
class PickUp:
    """A job as its new attempt finds it; `attempt` is None when it had already ended."""

    attempt: int | None
    status: str
    is_canceled: bool  # cancellation was asked before this attempt
    age_s: float = 0.0  # since it was accepted
    waited_s: float = 0.0  # since it was accepted, handed back, or given to an attempt that died
    was_lost: bool = False  # the last of these three
    asked_at: float = 0.0  # monotonic s of the caller, at the transaction's begin
    suspect: int = 0  # crashes.py: among whom it may run


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ends its job."""

    status: JobStatus
    finish_reason: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    gen: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    logprobs: Any = None
    error_code: str | None = None
    error_text: str | None = None


def _seconds_since(moment: Any) -> ColumnElement[float]:
    return func.extract("epoch", func.now() - moment).cast(Double)


#: What a pickup tells of a job.
_PICKED_UP = (
    jobs.c.id,
    jobs.c.attempt,
    jobs.c.status,
    jobs.c.cancel_requested_at,
    jobs.c.suspect,
    _seconds_since(jobs.c.created_at).label("age_s"),
)


def _seconds(seconds: float) -> ColumnElement[timedelta]:
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def columns_of(ending: Ending) -> dict[str, Any]:
    """Return what an ending writes into a job's row."""
    return {
        "status": ending.status,
        "finish_reason": ending.finish_reason,
        "finished_at": func.now(),
        "prompt_tokens": ending.prompt_tokens,
        "cached_tokens": ending.cached_tokens,
        "output_text": ending.text,
        "output_token_ids": list(ending.token_ids),
        "output_ends": list(ending.ends),
        "output_logprobs": ending.logprobs,
        "output_gen": ending.gen,
        "error_code": ending.error_code,
        "error_text": ending.error_text,
    }


class Finish(StrEnum):
    DONE = "done"
    REPEATED = "repeated"  # this attempt had ended it already
    STALE = "stale"  # a newer attempt has it, or it ended otherwise


class Cancel(StrEnum):
    CANCELED = "canceled"  # it was queued and has ended
    REQUESTED = "requested"  # it has run: its worker, or the sweeper, ends it with its output
    ENDED = "ended"  # too late
    MISSING = "missing"


class Ledger:
    """All transactions on jobs, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._single = autocommitting(engine)  # for single statements: one round trip each

    # -- gateway -----------------------------------------------------------------------------

    def accept_job(
        self, job: dict[str, Any], *, idempotency_key: str | None, request_sha256: bytes
    ) -> Accepted:
        """Commit the job with its labels and outbox row; or return what an earlier request made.

        `job` is as insert_job takes it.
        Raises IdempotencyMismatch when the key was used for another request.
        """
        if idempotency_key is None:
            with database_errors("accept job"), self._single.connect() as db:
                return Accepted(insert_job(db, job), is_replay=False)
        with database_errors("accept job"), self._engine.begin() as db:
            # Take the key first: a second request waits here until the first has committed.
            taken = db.execute(
                upsert(idempotency_keys)
                .values(
                    tenant_id=job["tenant_id"],
                    key=idempotency_key,
                    request_sha256=request_sha256,
                    job_id=job["id"],
                )
                .on_conflict_do_nothing()
                .returning(idempotency_keys.c.key)
            ).first()
            if taken is not None:
                return Accepted(insert_job(db, job), is_replay=False)
            row = (
                db.execute(
                    select(idempotency_keys.c.request_sha256, *jobs.c)
                    .join(jobs, jobs.c.id == idempotency_keys.c.job_id)
                    .where(
                        idempotency_keys.c.tenant_id == job["tenant_id"],
                        idempotency_keys.c.key == idempotency_key,
                    )
                )
                .mappings()
                .one()
            )
        if bytes(row["request_sha256"]) != request_sha256:
            raise IdempotencyMismatch(
                f"Idempotency-Key {idempotency_key!r} was used for another request "
                f"(job {row['id']}): send the same body, or a new key"
            )
        return Accepted(row, is_replay=True)

    def has_key(self, tenant_id: str, idempotency_key: str) -> bool:
        """Say whether an earlier request with this key was accepted."""
        key = idempotency_keys.c
        query = select(key.job_id).where(key.tenant_id == tenant_id, key.key == idempotency_key)
        with database_errors("look up key"), self._single.connect() as db:
            return db.execute(query).first() is not None

    def job(self, job_id: str, *, tenant_id: str | None = None) -> RowMapping | None:
        """Return a job's whole row; None when there is none, or it is another tenant's."""
        query = _JOB if tenant_id is None else _OWN_JOB
        with database_errors("read job"), self._single.connect() as db:
            found = db.execute(query, {"job_id": job_id, "tenant_id": tenant_id})
            return found.mappings().first()

    def summary(self, job_id: str, *, tenant_id: str) -> RowMapping | None:
        """Return a job's row without its output."""
        with database_errors("read job"), self._single.connect() as db:
            found = db.execute(_OWN_SUMMARY, {"job_id": job_id, "tenant_id": tenant_id})
            return found.mappings().first()

    def list_jobs(
        self,
        tenant_id: str,
        *,
        limit: int,
        before: str | None = None,
        status: Sequence[str] | None = None,
        model: str | None = None,
        job_class: str | None = None,
    ) -> Sequence[RowMapping]:
        """Return the tenant's jobs, newest first, older than the job `before`, without output."""
        query = select(*_SUMMARY).where(jobs.c.tenant_id == tenant_id)
        if before is not None:
            query = query.where(jobs.c.id < before)
        if status:
            query = query.where(jobs.c.status.in_(status))
        if model is not None:
            query = query.where(jobs.c.model == model)
        if job_class is not None:
            query = query.where(jobs.c.job_class == job_class)
        with database_errors("list jobs"), self._single.connect() as db:
            return db.execute(query.order_by(jobs.c.id.desc()).limit(limit)).mappings().all()

    def request_cancel(self, job_id: str, *, tenant_id: str) -> Cancel:
        """End a job that never ran as canceled; mark another for whoever ends it.

        A job that was handed back has tokens that subscribers have seen: it is ended with them, by
        its next worker or by the sweeper (`end_queued`).
        """
        mine = and_(jobs.c.id == job_id, jobs.c.tenant_id == tenant_id)
        with database_errors("cancel job"), self._engine.begin() as db:
            # Locked, so that a pickup between reading and writing cannot be missed.
            row = db.execute(
                select(jobs.c.status, jobs.c.attempt).where(mine).with_for_update()
            ).first()
            if row is None:
                return Cancel.MISSING
            if JobStatus(row.status).is_terminal:
                return Cancel.ENDED
            values: dict[str, Any] = {
                "cancel_requested_at": func.coalesce(jobs.c.cancel_requested_at, func.now())
            }
            never_ran = row.status == JobStatus.QUEUED and row.attempt == 0
            if never_ran:
                values |= {
                    "status": JobStatus.CANCELED,
                    "finish_reason": FinishReason.CANCELED,
                    "finished_at": func.now(),
                }
            db.execute(update(jobs).where(mine).values(**values))
        return Cancel.CANCELED if never_ran else Cancel.REQUESTED

    # -- worker ------------------------------------------------------------------------------

    def pick_up(self, job_ids: Sequence[str], worker: str) -> dict[str, PickUp | None]:
        """Begin a new attempt at each job; None for an id that has no row."""
        found: dict[str, PickUp | None] = dict.fromkeys(job_ids)
        with database_errors("pick up jobs"), self._engine.begin() as db:
            asked_at = time.monotonic()  # a new connection, which takes longer, is there already
            started = db.execute(
                update(jobs)
                .where(jobs.c.id.in_(job_ids), jobs.c.status.in_(_OPEN))
                .values(
                    status=JobStatus.RUNNING,
                    attempt=jobs.c.attempt + 1,
                    worker=worker,
                    started_at=func.coalesce(jobs.c.started_at, func.now()),
                )
                .returning(*_PICKED_UP)
            ).all()
            earlier = _earlier_attempts(db, [row for row in started if row.attempt > 1])
            for row in started:
                is_canceled = row.cancel_requested_at is not None
                waited_s, was_lost = earlier.get(row.id, (row.age_s, False))
                found[row.id] = PickUp(
                    attempt=row.attempt,
                    status=row.status,
                    is_canceled=is_canceled,
                    age_s=row.age_s,
                    waited_s=max(0.0, waited_s),
                    was_lost=was_lost,
                    asked_at=asked_at,
                    suspect=row.suspect,
                )
            if started:
                db.execute(
                    insert(attempts),
                    [{"job_id": r.id, "number": r.attempt, "worker": worker} for r in started],
                )
            others = [job_id for job_id in job_ids if found[job_id] is None]
            if others:
                rows = db.execute(select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(others)))
                for row in rows.all():
                    found[row.id] = PickUp(None, row.status, False)
        return found

    def finish(
        self, job_id: str, attempt: int, ending: Ending, timings: Timings | None = None
    ) -> Finish:
        """End a running job with its output; only its newest attempt may. Safe to repeat."""
        this = and_(jobs.c.id == job_id, jobs.c.attempt == attempt)
        with database_errors(f"finish {job_id}"), self._engine.begin() as db:
            done = db.execute(
                update(jobs)
                .where(this, jobs.c.status == JobStatus.RUNNING)
                .values(**columns_of(ending))
            )
            if not done.rowcount:
                row = db.execute(select(jobs.c.status).where(this)).first()
                is_mine = row is not None and row.status == ending.status
                return Finish.REPEATED if is_mine else Finish.STALE
            self._end_attempt(db, job_id, attempt, ending.status, timings)
        return Finish.DONE

    def hand_back(self, job_id: str, attempt: int, timings: Timings | None = None) -> bool:
        """Return a running job to the queue (drain); False when the attempt is stale."""
        with database_errors(f"hand back {job_id}"), self._engine.begin() as db:
            done = db.execute(
                update(jobs)
                .where(
                    jobs.c.id == job_id,
                    jobs.c.attempt == attempt,
                    jobs.c.status == JobStatus.RUNNING,
                )
                .values(status=JobStatus.QUEUED, worker=None)
            )
            if done.rowcount:
                self._end_attempt(db, job_id, attempt, "handed_back", timings)
        return bool(done.rowcount)

    @staticmethod
    def _end_attempt(
        db: Any, job_id: str, attempt: int, outcome: str, timings: Timings | None
    ) -> None:
        told = asdict(timings) if timings else {}
        db.execute(
            update(attempts)
            .where(attempts.c.job_id == job_id, attempts.c.number == attempt)
            .values(ended_at=func.now(), outcome=outcome, **told)
        )

    # -- tasks -------------------------------------------------------------------------------

    def outbox_jobs(self, *, older_than_s: float, limit: int) -> Sequence[RowMapping]:
        """Return the jobs whose enqueue nobody has confirmed, oldest first."""
        query = (
            select(*_SUMMARY, outbox.c.id.label("outbox_id"))
            .join(outbox, outbox.c.job_id == jobs.c.id)
            .where(outbox.c.created_at < func.now() - _seconds(older_than_s))
            .order_by(outbox.c.id)
            .limit(limit)
        )
        with database_errors("read outbox"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def unconfirmed(self, job_ids: Sequence[str]) -> set[str]:
        """Return those of the jobs whose enqueue nobody has confirmed: they have outbox rows."""
        if not job_ids:
            return set()
        query = select(outbox.c.job_id).where(outbox.c.job_id.in_(job_ids))
        with database_errors("look up outbox"), self._single.connect() as db:
            return set(db.execute(query).scalars())

    def outbox_size(self) -> tuple[int, float]:
        """Return the number of outbox rows and the age of the oldest, seconds; 0 without any."""
        age_s = func.coalesce(_seconds_since(func.min(outbox.c.created_at)), 0.0)
        with database_errors("count outbox"), self._single.connect() as db:
            num_rows, oldest_s = db.execute(select(func.count(), age_s).select_from(outbox)).one()
        return num_rows, oldest_s

    def outbox_done(self, job_ids: Sequence[str]) -> None:
        """Forget outbox rows whose jobs are enqueued (or need not be)."""
        if job_ids:
            with database_errors("clear outbox"), self._engine.begin() as db:
                db.execute(delete(outbox).where(outbox.c.job_id.in_(job_ids)))

    def ended_jobs(self, *, older_than_s: float, newer_than_s: float) -> Sequence[RowMapping]:
        """Return (id, model) of the jobs that ended between two ages."""
        query = select(jobs.c.id, jobs.c.model).where(
            jobs.c.finished_at <= func.now() - _seconds(older_than_s),
            jobs.c.finished_at > func.now() - _seconds(newer_than_s),
        )
        with database_errors("read ended jobs"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def open_jobs(self, *, after: str, limit: int) -> Sequence[RowMapping]:
        """Return queued and running jobs with ids after `after`, in order of age."""
        query = (
            select(*_SUMMARY)
            .where(jobs.c.status.in_(_OPEN), jobs.c.id > after)
            .order_by(jobs.c.id)
            .limit(limit)
        )
        with database_errors("read open jobs"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def expire_queued(self, *, limit: int) -> Sequence[RowMapping]:
        """End jobs that never ran and whose deadline has passed; returns (id, model, attempt)."""
        # A CTE, because an IN (SELECT ... FOR UPDATE) may be scanned again and end more than limit.
        overdue = (
            select(jobs.c.id)
            .where(_OVERDUE, jobs.c.attempt == 0)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .cte("overdue")
        )
        statement = (
            update(jobs)
            .where(jobs.c.id.in_(select(overdue.c.id)), jobs.c.status == JobStatus.QUEUED)
            .values(
                status=JobStatus.EXPIRED,
                finish_reason=FinishReason.EXPIRED,
                error_code=DeadlineExceeded.code,
                error_text="the job's deadline passed before a worker could start it",
                finished_at=func.now(),
            )
            .returning(jobs.c.id, jobs.c.model, jobs.c.attempt)
        )
        with database_errors("expire queued jobs"), self._engine.begin() as db:
            return db.execute(statement).mappings().all()

    def overdue_resumable(self, *, limit: int) -> Sequence[RowMapping]:
        """Return overdue jobs that were handed back: they are ended with what they had made."""
        query = select(*_SUMMARY).where(_OVERDUE, jobs.c.attempt > 0).limit(limit)
        with database_errors("read overdue jobs"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def end_queued(self, job_id: str, attempt: int, ending: Ending) -> bool:
        """End a job that was handed back, with its output; False if it moved on since it was read.

        While it is queued and its attempt stays the same nobody appends to its log, so an output
        read from the log before this call is the whole one.
        """
        statement = (
            update(jobs)
            .where(
                jobs.c.id == job_id,
                jobs.c.attempt == attempt,
                jobs.c.status == JobStatus.QUEUED,
            )
            .values(**columns_of(ending))
        )
        with database_errors(f"end {job_id}"), self._engine.begin() as db:
            return bool(db.execute(statement).rowcount)

    def delete_ended(self, *, before: datetime, limit: int) -> int:
        """Delete jobs that ended before a time, with all that hangs on them."""
        old = select(jobs.c.id).where(jobs.c.finished_at < before).limit(limit)
        with database_errors("retention"), self._engine.begin() as db:
            return db.execute(delete(jobs).where(jobs.c.id.in_(old))).rowcount

    def ping(self) -> None:
        """Raise DatabaseUnavailable unless Postgres answers."""
        with database_errors("ping"), self._single.connect() as db:
            db.execute(select(1))


def _earlier_attempts(db: Connection, started: Sequence[Any]) -> dict[str, tuple[float, bool]]:
    """Return by job how long ago the attempt before ended, or began if it died; and which."""
    if not started:
        return {}
    before = [(row.id, row.attempt - 1) for row in started]
    since = _seconds_since(func.coalesce(attempts.c.ended_at, attempts.c.started_at))
    rows = db.execute(
        select(attempts.c.job_id, since.label("waited_s"), attempts.c.ended_at.is_(None))
        .where(tuple_(attempts.c.job_id, attempts.c.number).in_(before))
    )  # fmt: skip
    return {job_id: (waited_s, was_lost) for job_id, waited_s, was_lost in rows}
