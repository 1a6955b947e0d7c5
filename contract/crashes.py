"""What becomes of a job whose engine, or worker, died with it in hand (design invariant 8).

A death is *certain* evidence when what ran can be blamed for it: an exception, a signal that a
fault of the process raises, a stall, memory used up. It is *uncertain* when anything else may have
been the cause: a kill from outside, a lost device, a worker that went silent. Who decides which is
worker/evidence.py; what follows is here:

    0 runs with all others     certain -> 1, alone in hand -> 2           three losses -> 2
    1 runs among suspects      certain -> 2                               three losses -> 2
    2 runs alone               certain, and it was alone -> dead          three losses -> dead

The level is `jobs.suspect`; a *loss* is an uncertain death in a row of them between which the job
gained no token in its log. `dead` is: the job fails with code `poison`, and has a dead letter.

Invariants:
1. A job is dead only after it ran alone and its engine died, and the next engine of that worker was
   sane (worker/inquests.py asks for judgement only then): nobody innocent ever is, as long as
   engines that do their own job do not die of others' at random.
2. A certain death raises the level of what was in hand, so poison is dead after at most three.
3. Verdict, counts, state, attempt and dead letter are one transaction, and only the newest attempt
   of a running job is judged: the rest is STALE, and a repeat changes nothing.
4. The level is in the row, so it outlives Redis: whoever enqueues or picks up the job learns it.

Called by: worker/suspicion (record for inquests, found_lost for intake).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, Text, and_, bindparam, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from headrace.contract.database import database_errors
from headrace.contract.errors import Poison
from headrace.contract.ledger import Ending, columns_of
from headrace.contract.records import attempts, dead_letters, jobs
from headrace.contract.timings import Timings
from headrace.contract.wire import FinishReason, JobStatus

#: Levels of suspicion, `jobs.suspect`.
NO_SUSPECT, IN_GROUP, ALONE = 0, 1, 2
#: Uncertain deaths in a row without a token between, after which a job is judged by them.
MAX_LOSSES = 3
#: Characters of a signature and of a detail that are kept.
SIGNATURE_CHARS, DETAIL_CHARS = 200, 2000
#: Signature of a job that died of uncertain deaths alone.
WORKER_LOST = "worker lost"


class Verdict(StrEnum):
    """What became of a job."""

    RELEASED = "released"  # nothing new: queued as before, or (found_lost) it may run on
    SUSPECTED = "suspected"  # queued, one level higher
    DEAD = "dead"  # it has failed, and has a dead letter
    STALE = "stale"  # not ours any more


@dataclass(frozen=True, slots=True)
class Judged:
    verdict: Verdict
    suspect: int = NO_SUSPECT  # its level from now on
    ending: Ending | None = None  # of a dead one, as its row has it


@dataclass(frozen=True, slots=True)
class InHand:
    """A job as its worker had it when the engine died."""

    job: str
    attempt: int
    num_logged: int  # tokens in its log
    if_dead: Ending  # with the output that subscribers saw
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What a job's row holds against it."""

    num_crashes: int = 0
    suspect: int = NO_SUSPECT
    num_losses: int = 0
    lost_at: int | None = None


#: Error text of a job that is dead. Its client reads it, so what the engine died of is not in it.
POISON_TEXT = (
    "the job ran alone and its engine died of it; it will not be run any more: change its prompt "
    "or parameters, or ask the operator, who has its dead letter, to replay it"
)


def poison_ending(output: Ending) -> Ending:
    """Return how a dead job ends, with the output it has."""
    return replace(
        output,
        status=JobStatus.FAILED,
        finish_reason=FinishReason.ERROR,
        error_code=Poison.code,
        error_text=POISON_TEXT,
    )


def judge(
    was: Standing, *, is_certain: bool, was_alone: bool, num_logged: int
) -> tuple[Standing, bool]:
    """Return what is held against a job after one more death, and whether it is dead."""
    if is_certain:
        level = ALONE if was_alone or was.suspect else IN_GROUP
        is_dead = was_alone and was.suspect == ALONE
        return Standing(was.num_crashes + 1, level), is_dead
    num_losses = was.num_losses + 1 if was.lost_at == num_logged else 1
    if num_losses < MAX_LOSSES:
        return replace(was, num_losses=num_losses, lost_at=num_logged), False
    return Standing(was.num_crashes, ALONE), was.suspect == ALONE


class Crashes:
    """The transactions on jobs whose engine died."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def record(
        self,
        in_hand: Sequence[InHand],
        worker: str,
        signature: str,
        detail: str,
        *,
        is_certain: bool,
        was_alone: bool,  # one job was in the engine, and nothing else still on its way out
    ) -> dict[str, Judged]:
        """End the attempts that an engine took with it: each job is queued again, or dead."""
        signature = (signature if is_certain else f"{WORKER_LOST}: {signature}")[:SIGNATURE_CHARS]
        with database_errors("record crash"), self._engine.begin() as db:
            verdicts, standings = _judge_all(
                db, in_hand, is_certain=is_certain, was_alone=was_alone
            )
            taken = [each for each in in_hand if verdicts[each.job].verdict is not Verdict.STALE]
            dead = [each for each in taken if verdicts[each.job].verdict is Verdict.DEAD]
            _note(db, standings)
            _requeue(db, [each.job for each in taken if each not in dead])
            _end_attempts(db, taken, "crashed" if is_certain else "lost", signature)
            _bury(db, dead, verdicts, signature, detail)
        return verdicts

    def found_lost(self, in_hand: InHand, worker: str) -> Judged:
        """Judge a job whose attempt before this one ended with its worker, in silence.

        RELEASED: this attempt may run on. Else it is over, and the job is queued again or dead.
        """
        with database_errors("record loss"), self._engine.begin() as db:
            verdicts, standings = _judge_all(db, [in_hand], is_certain=False, was_alone=True)
            _note(db, standings)
            judged = verdicts[in_hand.job]
            if judged.verdict is Verdict.SUSPECTED:
                _requeue(db, [in_hand.job])
                _end_attempts(db, [in_hand], "handed_back", None)
            elif judged.verdict is Verdict.DEAD:
                _end_attempts(db, [in_hand], JobStatus.FAILED, None)
                detail = f"three workers in a row went silent with it alone; found by {worker}"
                _bury(db, [in_hand], verdicts, WORKER_LOST, detail)
        return judged


def _judge_all(
    db: Connection,
    in_hand: Sequence[InHand],
    *,
    is_certain: bool,
    was_alone: bool,
) -> tuple[dict[str, Judged], dict[str, Standing]]:
    """Lock the rows and judge each job; returns verdicts, and the standings to be noted."""
    verdicts = {each.job: Judged(Verdict.STALE) for each in in_hand}
    by_job = {each.job: each for each in in_hand}
    columns = (jobs.c.num_crashes, jobs.c.suspect, jobs.c.num_losses, jobs.c.lost_at)
    rows = db.execute(
        select(jobs.c.id, jobs.c.attempt, *columns)
        .where(jobs.c.id.in_(by_job), jobs.c.status == JobStatus.RUNNING)
        .order_by(jobs.c.id)  # two that lock many rows in different orders would stop each other
        .with_for_update()
    ).all()
    standings: dict[str, Standing] = {}
    for job, attempt, *was in rows:
        this = by_job[job]
        if attempt != this.attempt:
            continue
        before = Standing(*was)
        after, is_dead = judge(
            before, is_certain=is_certain, was_alone=was_alone, num_logged=this.num_logged
        )
        standings[job] = after
        if is_dead:
            ending = poison_ending(this.if_dead)
            verdicts[job] = Judged(Verdict.DEAD, after.suspect, ending)
        elif is_certain or after.suspect > before.suspect:
            verdicts[job] = Judged(Verdict.SUSPECTED, after.suspect)
        else:
            verdicts[job] = Judged(Verdict.RELEASED, after.suspect)
    return verdicts, standings


def _note(db: Connection, standings: Mapping[str, Standing]) -> None:
    """Write down what is held against each job."""
    if standings:
        db.execute(
            update(jobs)
            .where(jobs.c.id == bindparam("of_job"))
            .values({name: bindparam(name) for name in Standing.__slots__}),
            [{"of_job": job, **asdict(standing)} for job, standing in standings.items()],
        )


def _requeue(db: Connection, job_ids: Sequence[str]) -> None:
    if job_ids:
        db.execute(
            update(jobs).where(jobs.c.id.in_(job_ids)).values(status=JobStatus.QUEUED, worker=None)
        )


def _end_attempts(
    db: Connection, taken: Sequence[InHand], outcome: str, signature: str | None
) -> None:
    for each in taken:
        told: dict[str, Any] = asdict(each.timings) if each.timings else {}
        db.execute(
            update(attempts)
            .where(attempts.c.job_id == each.job, attempts.c.number == each.attempt)
            .values(ended_at=func.now(), outcome=outcome, signature=signature, **told)
        )


def _bury(
    db: Connection,
    dead: Sequence[InHand],
    verdicts: Mapping[str, Judged],
    signature: str,
    detail: str,
) -> None:
    """Fail jobs with what their logs hold, and write their dead letters."""
    for each in dead:
        ending = verdicts[each.job].ending
        assert ending is not None, "a dead job has one"
        mine = jobs.c.id == each.job
        db.execute(update(jobs).where(mine).values(**columns_of(ending)))
        runs = select(func.count()).where(
            attempts.c.job_id == each.job,
            or_(
                attempts.c.outcome.in_(("crashed", "lost")),
                and_(attempts.c.ended_at.is_(None), attempts.c.number < each.attempt),
            ),
        )
        letter = select(
            jobs.c.id,
            jobs.c.tenant_id,
            jobs.c.model,
            literal(signature, Text),
            literal(detail[:DETAIL_CHARS], Text),
            runs.scalar_subquery(),
        ).where(mine)
        names = ["job_id", "tenant_id", "model", "signature", "detail", "num_runs"]
        db.execute(upsert(dead_letters).from_select(names, letter).on_conflict_do_nothing())
