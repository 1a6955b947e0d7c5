"""What operators want of workers: one row a worker that was ever ordered something.

Postgres is the authority, so an order outlives a Redis that is lost, and the worker: who comes back
under the name obeys it before its first claim. A worker without a row serves.

Invariants:
1. An order says what is wanted, not what to do: writing it again changes nothing.
2. `num_restarts` only grows; a worker obeys when it grew past what it had read at its start.

Called by: worker/order_watch (reads), gateway/dashboard/workers (writes, reads).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Engine, RowMapping, func, select
from sqlalchemy.dialects.postgresql import insert as upsert

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.records import jobs, worker_orders
from headrace.contract.wire import JobStatus


class Wanted(StrEnum):
    SERVING = "serving"
    DRAINED = "drained"  # claim nothing; what runs may finish for a while, then moves
    QUARANTINED = "quarantined"  # claim nothing; what runs moves at once


@dataclass(frozen=True, slots=True)
class Order:
    """The newest order of a worker."""

    wanted: Wanted = Wanted.SERVING
    num_restarts: int = 0  # ordered so far
    by: str = ""  # who ordered it; empty: nobody ever did
    at: datetime | None = None


class WorkerOrders:
    """Transactions on orders, over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._single = autocommitting(engine)

    def of(self, worker: str) -> Order:
        """Return the worker's order; one to serve, by nobody, if it was never ordered anything."""
        query = select(worker_orders).where(worker_orders.c.worker == worker)
        with database_errors("read order"), self._single.connect() as db:
            row = db.execute(query).mappings().first()
        return Order() if row is None else _order(row)

    def all(self) -> dict[str, Order]:
        """Return the orders of all workers that have one."""
        with database_errors("list orders"), self._single.connect() as db:
            rows = db.execute(select(worker_orders)).mappings().all()
        return {row["worker"]: _order(row) for row in rows}

    def want(self, worker: str, wanted: Wanted, *, by: str) -> Order:
        """Say what the worker is to be from now on."""
        return self._write(worker, {"wanted": wanted}, by=by)

    def restart(self, worker: str, *, by: str) -> Order:
        """Have the worker drain and start a new engine; what is wanted of it stays."""
        grown = {"num_restarts": worker_orders.c.num_restarts + 1}
        return self._write(worker, grown, by=by, first={"num_restarts": 1})

    def _write(
        self,
        worker: str,
        changes: dict[str, Any],
        *,
        by: str,
        first: dict[str, Any] | None = None,  # of a new row; None: as the changes
    ) -> Order:
        new = {"wanted": Wanted.SERVING, **(changes if first is None else first)}
        statement = (
            upsert(worker_orders)
            .values(worker=worker, ordered_by=by, **new)
            .on_conflict_do_update(
                index_elements=["worker"],
                set_={**changes, "ordered_by": by, "ordered_at": func.now()},
            )
            .returning(*worker_orders.c)
        )
        with database_errors("write order"), self._single.connect() as db:
            return _order(db.execute(statement).mappings().one())

    def num_running(self, workers: Sequence[str]) -> dict[str, int]:
        """Return how many jobs each of the workers runs according to their rows."""
        if not workers:
            return {}
        query = (
            select(jobs.c.worker, func.count())
            .where(jobs.c.status == JobStatus.RUNNING, jobs.c.worker.in_(workers))
            .group_by(jobs.c.worker)
        )
        with database_errors("count jobs of workers"), self._single.connect() as db:
            counts = {str(worker): int(count) for worker, count in db.execute(query).all()}
        return {worker: counts.get(worker, 0) for worker in workers}


def _order(row: RowMapping) -> Order:
    return Order(Wanted(row["wanted"]), row["num_restarts"], row["ordered_by"], row["ordered_at"])
