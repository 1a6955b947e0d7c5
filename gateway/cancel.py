"""What is told to Redis after Postgres has taken a cancellation: the end, or the wish.

Called by: gateway/jobs (the client's cancel), gateway/dashboard/jobs (the operator's) and queues
(a purge).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy import RowMapping

from headrace.contract import log
from headrace.contract.errors import QueueUnavailable
from headrace.contract.specs import end_of
from headrace.contract.wire import JobStatus
from headrace.gateway.services import Services


def tell_ended(services: Services, model: str, rows: Sequence[RowMapping]) -> None:
    """Do for jobs that ended in the queue what a worker would: end their logs, drop their entries.

    In this order: with its entry gone and no end in its log a job keeps subscribers waiting.
    """
    services.token_log.end(model, [end_of(row) for row in rows])
    services.streams.finish(model, [(row["id"], "") for row in rows])


def tell_canceled(services: Services, rows: Iterable[RowMapping]) -> None:
    """Write the end records of the jobs that have ended, and ask the workers of the others.

    A Redis that is away is no failure: Postgres keeps it, and the sweeper tells Redis later.
    """
    by_model: dict[str, list[RowMapping]] = defaultdict(list)
    for row in rows:
        by_model[row["model"]].append(row)
    for model, group in by_model.items():
        ended = [row for row in group if JobStatus(row["status"]).is_terminal]
        try:
            if ended:
                tell_ended(services, model, ended)
                for row in ended:
                    services.enqueuer.confirm(row["id"])
            for row in group:
                if not JobStatus(row["status"]).is_terminal:
                    services.streams.cancel(model, row["id"])
        except QueueUnavailable as error:
            for row in group:
                log.event(
                    "cancel.left_to_sweeper",
                    level=logging.WARNING,
                    job=row["id"],
                    why=error.detail,
                )
