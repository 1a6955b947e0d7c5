"""The one statement that accepts a job: its row, its labels and its outbox row, or none of them.

Called by: ledger.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Double, Executable, RowMapping, bindparam, func, insert, select

from headrace.contract.labels import labeling
from headrace.contract.records import jobs, outbox
from headrace.contract.wire import JobStatus

#: Columns of a job that its client decides, by way of the gateway.
_GIVEN = ("id", "tenant_id", "key_id", "model", "job_class", "priority", "input", "sampling",
          "meta", "cost_tokens", "deadline_at", "made_from", "traceparent")  # fmt: skip
_OPTIONAL = ("deadline_at", "deadline_s", "made_from", "traceparent")


def _accepting() -> Executable:
    values: dict[str, Any] = {
        name: bindparam(name, type_=jobs.c[name].type)
        for name in (*_GIVEN, "status")
        if name != "deadline_at"
    }
    # A time, or seconds from now by the server's clock, as all other times are.
    values["deadline_at"] = func.coalesce(
        bindparam("deadline_at", type_=jobs.c.deadline_at.type),
        func.now() + func.make_interval(0, 0, 0, 0, 0, 0, bindparam("deadline_s", type_=Double)),
    )
    accepted = insert(jobs).values(**values).returning(*jobs.c).cte("accepted")
    noted = insert(outbox).from_select(["job_id"], select(accepted.c.id)).cte("noted")
    labeled = labeling(accepted).cte("labeled")
    return select(*(accepted.c[c.key] for c in jobs.c)).add_cte(noted, labeled)


#: Built once: building it costs as much as running it (0.5-1 ms).
_ACCEPT = _accepting()


def insert_job(db: Connection, job: dict[str, Any]) -> RowMapping:
    """Write a job in one round trip and return its row.

    `job` holds the columns of _GIVEN; its deadline is `deadline_at`, or `deadline_s` from now.
    """
    values = {**dict.fromkeys(_OPTIONAL), "status": JobStatus.QUEUED, **job}
    return db.execute(_ACCEPT, values).mappings().one()
