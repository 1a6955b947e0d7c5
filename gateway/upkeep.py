"""What must happen even if nobody asks: relay, deadlines, lost jobs, retention.

Each function is idempotent and may run twice at once: enqueueing a known job does nothing, and
every ending is one conditional UPDATE.

Invariants:
1. A job that is queued in Postgres is in its lane, or will be at the next run (design invariant 2).
2. A running job is enqueued again only when Redis has not known it for longer than a lease: a live
   worker restores its own within a third of one. That its worker beats proves nothing: it may have
   come back under its name, or have failed to begin the job. A queued one whose outbox row is there
   is the relay's: it was accepted a moment ago, and is being enqueued just now.
3. A job that nobody runs and that must not run any more (canceled, past its deadline), because its
   worker is dead or handed it back, ends with the tokens its log holds: what subscribers saw is
   what is stored.
4. An end that is committed reaches the job's log, also when whoever committed it could not say so.
5. Before lost jobs are put back, so are the pauses of their queues.
6. A job whose row cannot be read (no gateway of ours wrote it) fails, and keeps no other waiting.

Called by: gateway/tasks (Celery); never inference.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
from sqlalchemy import RowMapping

from headrace.contract import log
from headrace.contract.errors import DeadlineExceeded, JobUnreadable
from headrace.contract.ledger import Ending, Finish, Ledger
from headrace.contract.operators import Operators
from headrace.contract.pauses import Pauses
from headrace.contract.specs import end_of, spec_of
from headrace.contract.streams import JobStreams, Workers
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import FinishReason, JobStatus

#: Rows read or written by one statement.
PAGE = 500
#: Seconds after its end in which a job's missing end record is looked for. One that is older is
#: found at the job's next pickup (its entry is still there), or by its subscribers in Postgres.
LATE_S = 120.0
#: How a job ends that no worker ends: reason, error code and text.
_ENDS: dict[JobStatus, tuple[FinishReason, str | None, str | None]] = {
    JobStatus.CANCELED: (FinishReason.CANCELED, None, None),
    JobStatus.EXPIRED: (
        FinishReason.EXPIRED,
        DeadlineExceeded.code,
        "the job's deadline passed while no worker ran it",
    ),
    JobStatus.FAILED: (
        FinishReason.ERROR,
        JobUnreadable.code,
        "what was stored of the job cannot be read by this version: send it again",
    ),
}


class Upkeep:
    """The tasks, over the stores."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        operators: Operators,
        streams: JobStreams,
        tokens: TokenLog,
        workers: Workers,
        pauses: Pauses,
        lease_s: float,
        retention_days: int,
    ) -> None:
        self._ledger = ledger
        self._operators = operators
        self._streams = streams
        self._tokens = tokens
        self._workers = workers
        self._pauses = pauses
        self._lease_s = lease_s
        self._retention = timedelta(days=retention_days)
        self._unknown_since: dict[str, float] = {}  # running job -> monotonic s, as of last sweep

    def relay(
        self, *, older_than_s: float = 1.0, meanwhile: Callable[[], object] = lambda: None
    ) -> int:
        """Enqueue the jobs whose enqueue nobody confirmed; returns how many rows were done.

        `meanwhile` is called after each page: a long backlog must not keep others from their turn.
        """
        num_done = 0
        while rows := self._ledger.outbox_jobs(older_than_s=older_than_s, limit=PAGE):
            num_new = self._enqueue(row for row in rows if not JobStatus(row["status"]).is_terminal)
            self._ledger.outbox_done([row["id"] for row in rows])
            num_done += len(rows)
            log.event("outbox.relayed", rows=len(rows), enqueued=num_new)
            meanwhile()
        return num_done

    def expire(self) -> int:
        """End the queued jobs whose deadline has passed, and tell their subscribers."""
        num_expired = 0
        while rows := self._ledger.expire_queued(limit=PAGE):
            self._tell_ends([row["id"] for row in rows])
            num_expired += len(rows)
            log.event("jobs.expired", jobs=len(rows))
        for row in self._ledger.overdue_resumable(limit=PAGE):
            num_expired += self._end_with_log(row, JobStatus.EXPIRED)
        return num_expired

    def sweep(self, *, meanwhile: Callable[[], object] = lambda: None) -> int:
        """Put lost jobs back, end dead workers' unwanted ones; returns how many were touched."""
        for model in self._pauses.restore():
            log.event("pauses.restored", level=logging.WARNING, model=model)
        alive = self._workers.alive().keys()
        missed, self._unknown_since = self._unknown_since, {}  # a sweep cut short starts over
        found: dict[str, float] = {}
        num_touched, after = 0, ""
        while rows := self._ledger.open_jobs(after=after, limit=PAGE):
            after = rows[-1]["id"]
            num_touched += self._enqueue(self._lost(rows, missed, found))
            for row in rows:
                if row["status"] == JobStatus.RUNNING:
                    num_touched += self._look_after(row, is_alive=row["worker"] in alive)
                elif row["cancel_requested_at"] is not None:
                    num_touched += self._end_with_log(row, JobStatus.CANCELED)
            meanwhile()
        self._unknown_since = found
        num_touched += self._tell_late_ends()
        if num_touched:
            log.event("jobs.swept", level=logging.WARNING, jobs=num_touched)
        return num_touched

    def retain(self) -> int:
        """Delete jobs that ended longer ago than they are kept, and sessions that are over."""
        if num_sessions := self._operators.delete_ended_sessions():
            log.event("sessions.deleted", sessions=num_sessions)
        before = datetime.now(UTC) - self._retention
        num_deleted = 0
        while found := self._ledger.delete_ended(before=before, limit=PAGE):
            num_deleted += found
        if num_deleted:
            log.event("jobs.deleted", jobs=num_deleted)
        return num_deleted

    # -- parts -------------------------------------------------------------------------------

    def _enqueue(self, rows: Iterable[RowMapping]) -> int:
        num_new = 0
        for row in rows:
            try:
                spec = spec_of(row)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                log.failure("job.unreadable", error, job=row["id"])
                self._end_with_log(row, JobStatus.FAILED)
                continue
            num_new += self._streams.enqueue(spec, row["cost_tokens"], suspect=row["suspect"])
        return num_new

    def _lost(
        self, rows: Sequence[RowMapping], missed: dict[str, float], found: dict[str, float]
    ) -> list[RowMapping]:
        """Return what is to be enqueued again; `found` gets the running jobs Redis knows not."""
        lost: list[RowMapping] = []
        now, unknown = time.monotonic(), self._unknown(rows)
        queued = [row["id"] for row in unknown if row["status"] == JobStatus.QUEUED]
        of_the_relay = self._ledger.unconfirmed(queued)
        for row in unknown:
            if row["id"] in of_the_relay:
                continue
            if row["status"] == JobStatus.RUNNING:
                since = found[row["id"]] = missed.get(row["id"], now)
                if now - since <= self._lease_s:
                    continue
            lost.append(row)
        return lost

    def _unknown(self, rows: Sequence[RowMapping]) -> list[RowMapping]:
        by_model: dict[str, list[RowMapping]] = defaultdict(list)
        for row in rows:
            by_model[row["model"]].append(row)
        lost: list[RowMapping] = []
        for model, group in by_model.items():
            known = self._streams.knows(model, [row["id"] for row in group])
            lost += [row for row, is_known in zip(group, known, strict=True) if not is_known]
        return lost

    def _look_after(self, row: RowMapping, *, is_alive: bool) -> bool:
        """See to a running job that was canceled or is overdue; True when something was done."""
        canceled_at, deadline_at = row["cancel_requested_at"], row["deadline_at"]
        grace = timedelta(seconds=self._lease_s)  # its worker, or the next, has the first word
        now = datetime.now(UTC)
        if canceled_at is not None and is_alive:
            self._streams.cancel(row["model"], row["id"])  # in case the first message was lost
            return False
        if is_alive:
            return False
        if canceled_at is not None and now > canceled_at + grace:
            return self._end_with_log(row, JobStatus.CANCELED)
        if deadline_at is not None and now > deadline_at + grace:
            return self._end_with_log(row, JobStatus.EXPIRED)
        return False

    def _end_with_log(self, row: RowMapping, status: JobStatus) -> bool:
        """End a job that nobody runs with what its log holds."""
        view = self._tokens.read(row["model"], row["id"])
        ends: list[int] = []
        for chunk in view.chunks:
            start = ends[-1] if ends else 0
            ends += [start + end for end in chunk.ends]
        reason, code, text = _ENDS[status]
        sampling = row["sampling"]
        asked = isinstance(sampling, dict) and sampling.get("logprobs") is not None
        logprobs = [item for chunk in view.chunks for item in chunk.logprobs or ()]
        ending = Ending(
            status=status,
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens(row) if ends else 0,
            gen=view.chunks[-1].gen if view.chunks else 0,
            text="".join(chunk.text for chunk in view.chunks),
            token_ids=tuple(token for chunk in view.chunks for token in chunk.ids),
            ends=tuple(ends),
            logprobs=msgspec.to_builtins(logprobs) if asked else None,
            error_code=code,
            error_text=text,
        )
        job, attempt = row["id"], row["attempt"]
        if row["status"] == JobStatus.QUEUED:
            is_done = self._ledger.end_queued(job, attempt, ending)
        else:
            is_done = self._ledger.finish(job, attempt, ending) is Finish.DONE
        if not is_done:
            return False
        self._tell_ends([job])
        return True

    def _prompt_tokens(self, row: RowMapping) -> int:
        """Return what the prompt is charged as: counted by a worker, or by the client itself."""
        counted = self._tokens.prompt_tokens(row["model"], row["id"])
        if counted is not None:
            return counted
        given = row["input"].get("prompt_token_ids") if isinstance(row["input"], dict) else None
        return len(given) if isinstance(given, list) else 0

    def _tell_late_ends(self) -> int:
        """Append the end records that are missing an outage after their commit."""
        by_model: dict[str, list[str]] = defaultdict(list)
        for row in self._ledger.ended_jobs(older_than_s=self._lease_s, newer_than_s=LATE_S):
            by_model[row["model"]].append(row["id"])
        late: list[str] = []
        for model, job_ids in by_model.items():
            lacks = self._tokens.lacks_end(model, job_ids)
            late += [job_id for job_id, is_late in zip(job_ids, lacks, strict=True) if is_late]
        self._tell_ends(late)
        return len(late)

    def _tell_ends(self, job_ids: Sequence[str]) -> None:
        """Append the end records of jobs that have ended, and drop their entries."""
        for job_id in job_ids:
            row = self._ledger.job(job_id)
            if row is not None:
                self._tokens.end(row["model"], [end_of(row)])
                self._streams.finish(row["model"], [(job_id, "")])
