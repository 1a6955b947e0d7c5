"""One action on all jobs that a filter matches: counted first, then done in batches.

Invariants:
1. A filter is required, and at most MAX_JOBS match: no slip of the hand reaches the whole fleet.
2. The real run is refused unless the count is that of the dry run, give or take 1 %.
3. Each batch is a transaction of its own, and its jobs are told to Redis before the next begins; an
   outage in the middle leaves whole batches, and the answer says how far it came.
4. Only jobs that the action can be done to are matched; a retry also leaves out those that another
   job was made from, so a run that stopped can be started again.

Called by: gateway/dashboard/jobs; check_expected by dead_letters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from headrace.contract import log
from headrace.contract.errors import (
    BulkChanged,
    BulkTooLarge,
    MissingField,
    Unavailable,
)
from headrace.contract.job_edits import BATCH, CANCELABLE, MOVABLE, RETRYABLE
from headrace.contract.job_search import JobFilter
from headrace.contract.specs import spec_of
from headrace.contract.streams import Move
from headrace.gateway.cancel import tell_canceled
from headrace.gateway.dashboard.job_schemas import BulkRequest
from headrace.gateway.services import Services

#: Jobs of one call.
MAX_JOBS = 100_000
#: Part of the expected count by which the matches may differ.
TOLERANCE = 0.01

_STATUSES = {"cancel": CANCELABLE, "retry": RETRYABLE, "priority": MOVABLE}


class JobBulk:
    """Bulk actions over the stores."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def run(self, asked: BulkRequest) -> dict[str, int | str | None]:
        """Count, or do it; returns num_matched, num_done, num_refused, stopped."""
        job_ids = self._matching(asked)
        if asked.dry_run:
            return _result(len(job_ids), 0, 0, None)
        check_expected(asked.expect, len(job_ids))
        act = self._act(asked)
        num_done, left, stopped = 0, list[str](), None
        try:
            for batch in _batches(job_ids):
                done = act(batch)
                num_done += len(done)
                left += sorted(set(batch) - done)
            for batch in _batches(left):  # some were locked: by a pickup, say
                num_done += len(act(batch))
        except Unavailable as error:
            stopped = f"{error.code}: {error.detail}"
        num_refused = len(job_ids) - num_done
        log.event("bulk.done", action=asked.action, done=num_done, refused=num_refused)
        return _result(len(job_ids), num_done, num_refused, stopped)

    def _matching(self, asked: BulkRequest) -> list[str]:
        wanted = asked.filter.filter()
        if asked.action == "priority" and asked.priority is None:
            raise MissingField("priority is required with the action `priority`; it was not sent")
        if wanted.is_empty:
            raise MissingField(
                "filter is empty, so it matches every job: name at least one field of it"
            )
        possible = _STATUSES[asked.action]
        statuses = tuple(s for s in possible if not wanted.statuses or s in wanted.statuses)
        if not statuses:
            return []
        narrowed: JobFilter = replace(
            wanted, statuses=statuses, is_unretried=asked.action == "retry"
        )
        job_ids = self._services.search.ids(narrowed, limit=MAX_JOBS + 1)
        if len(job_ids) > MAX_JOBS:
            raise BulkTooLarge(
                f"{asked.action} of more than {MAX_JOBS:,} jobs was asked; one call takes "
                f"{MAX_JOBS:,}: narrow the filter, for example by a range of time"
            )
        return sorted(job_ids)  # the oldest first

    def _act(self, asked: BulkRequest) -> Callable[[Sequence[str]], set[str]]:
        match asked.action:
            case "cancel":
                return self._cancel
            case "retry":
                return self._retry
            case "priority":
                return lambda batch: self._set_priority(batch, asked.priority or "normal")

    def _cancel(self, batch: Sequence[str]) -> set[str]:
        rows = self._services.edits.cancel(batch)
        tell_canceled(self._services, rows)
        return {row["id"] for row in rows}

    def _retry(self, batch: Sequence[str]) -> set[str]:
        """Make the new jobs; the relay enqueues them, from their outbox rows."""
        return {old for old, _ in self._services.edits.retry(batch)}

    def _set_priority(self, batch: Sequence[str], priority: str) -> set[str]:
        rows = self._services.edits.set_priority(batch, priority)
        streams = self._services.streams
        return {
            row["id"]
            for row in sorted(rows, key=lambda row: row["id"])  # the oldest first, also there
            if streams.move(spec_of(row), row["cost_tokens"]) is not Move.GIVEN
        }


def check_expected(expect: int | None, found: int) -> None:
    """Raise unless so many were found as a dry run had counted."""
    if expect is None:
        raise MissingField("expect is required; it was not sent: send what a dry run counted")
    if abs(found - expect) > expect * TOLERANCE:
        raise BulkChanged(
            f"{expect:,} jobs were expected; the filter matches {found:,} now: look again, and "
            "send the new count"
        )


def _batches(job_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for first in range(0, len(job_ids), BATCH):
        yield job_ids[first : first + BATCH]


def _result(
    matched: int, done: int, refused: int, stopped: str | None
) -> dict[str, int | str | None]:
    return {
        "num_matched": matched,
        "num_done": done,
        "num_refused": refused,
        "stopped": stopped,
    }
