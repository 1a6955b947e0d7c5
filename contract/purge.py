"""Cancel what waits in a queue and never ran, page by page: the rows' part of a purge.

Invariants:
1. A page ends exactly the jobs it returns, each by the transition QUEUED -> CANCELED that
   ledger.request_cancel makes; a job that is picked up meanwhile is left alone.
2. Pages go by id, so a purge is one walk over the open jobs, however many it ends.

Called by: gateway/dashboard/queues.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine, RowMapping, func, select, update

from headrace.contract.database import database_errors
from headrace.contract.records import jobs
from headrace.contract.wire import FinishReason, JobStatus

#: Columns of the end record (specs.end_of), and where the job is.
_ENDED = [
    jobs.c[name]
    for name in (
        *("id", "model", "status", "attempt", "finish_reason", "error_code", "error_text"),
        *("prompt_tokens", "cached_tokens", "output_gen", "output_token_ids"),
    )
]


class Purge:
    """Transactions that empty queues."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def cancel_page(
        self, *, model: str, job_class: str | None, tenant_id: str | None, after: str, limit: int
    ) -> Sequence[RowMapping]:
        """End the next jobs of the queue with ids after `after`; return them in order of age."""
        wanted = [
            jobs.c.status == JobStatus.QUEUED,
            jobs.c.attempt == 0,
            jobs.c.model == model,
            jobs.c.id > after,
        ]
        if job_class is not None:
            wanted.append(jobs.c.job_class == job_class)
        if tenant_id is not None:
            wanted.append(jobs.c.tenant_id == tenant_id)
        page = (
            select(jobs.c.id)
            .where(*wanted)
            .order_by(jobs.c.id)
            .limit(limit)
            .with_for_update(skip_locked=True)
            .cte("page")
        )
        statement = (
            update(jobs)
            .where(jobs.c.id.in_(select(page.c.id)), jobs.c.status == JobStatus.QUEUED)
            .values(
                status=JobStatus.CANCELED,
                finish_reason=FinishReason.CANCELED,
                cancel_requested_at=func.coalesce(jobs.c.cancel_requested_at, func.now()),
                finished_at=func.now(),
            )
            .returning(*_ENDED)
        )
        with database_errors("purge queue"), self._engine.begin() as db:
            rows = db.execute(statement).mappings().all()
        return sorted(rows, key=lambda row: row["id"])
