"""Refuse what would only wait: a queue that is full answers 429 before anything is written.

    reason   limit                                    code               for class batch
    jobs     max_queued_jobs of a model               queue_full         BATCH_SHARE of it
    tokens   max_queued_tokens of a model             queue_full         BATCH_SHARE of it
    tenant   max_queued_jobs_per_tenant of a model    tenant_queue_full  the same
    unseen   MAX_UNSEEN jobs while Redis is away      queue_unavailable  the same   (503)

Tokens are the prompt's, estimated where they are not counted yet, and max_tokens: the cost by which
workers claim. Batch work is refused first, so that interactive jobs still find room. What workers
hand back and what operators retry is never refused; it counts.

Invariants:
1. A refusal touches neither Postgres nor a tokenizer. But a request with an Idempotency-Key may
   repeat one that was accepted and whose answer was lost, so before it is refused its key is looked
   up, MAX_LOOKUPS at a time: refused for ever, its client would take a job that runs for one that
   does not exist. A flood of new keys costs one read of an index each, and no more at once.
2. Each refusal says when to come back: Retry-After is the time in which RETRY_SHARE of what waits
   will have left at the rate of the last half minute, between 1 and MAX_RETRY_S.
3. While Redis is away jobs are accepted as ever, on the last known depth, but no more than
   MAX_UNSEEN a process: what nobody can count must end somewhere.

Called by: gateway/jobs, gateway/dashboard/playground; gateway/services makes it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.contract import log
from headrace.contract.errors import (
    HeadraceError,
    QueueFull,
    QueueUnavailable,
    TenantQueueFull,
)
from headrace.contract.settings import GatewaySettings
from headrace.contract.waiting import Load
from headrace.contract.wire import JobClass
from headrace.gateway.metrics import Metrics
from headrace.gateway.prompt_check import rough_tokens
from headrace.gateway.queue_depths import QueueDepths
from headrace.gateway.schemas import JobRequest

#: Why a job can be refused.
REASONS = ("jobs", "tokens", "tenant", "unseen")
#: Share of a model's limits that jobs of the class batch may fill.
BATCH_SHARE = 0.8
#: Jobs a process accepts while it cannot ask Redis how many wait.
MAX_UNSEEN = 5_000
#: Keys looked up at once for requests about to be refused, and seconds one waits for its turn.
MAX_LOOKUPS, LOOKUP_S = 2, 5.0
#: Share of what waits after whose leaving there is room again for those that were told to wait.
RETRY_SHARE = 0.1
#: Seconds of Retry-After: at most, and where no rate is known yet.
MAX_RETRY_S, UNKNOWN_RETRY_S = 60, 10


@dataclass(slots=True)
class Admitted:
    """A request that may go on; `is_accepted` is set once its job is committed."""

    is_accepted: bool = False


class Admission:
    """The limits of one process, on depths that all share."""

    def __init__(self, depths: QueueDepths, settings: GatewaySettings, metrics: Metrics) -> None:
        self._depths = depths
        self._max_jobs = settings.max_queued_jobs
        self._max_tokens = settings.max_queued_tokens
        self._max_tenant_jobs = settings.max_queued_jobs_per_tenant
        self._metrics = metrics
        self._lookups = threading.BoundedSemaphore(MAX_LOOKUPS)
        self._shown: set[tuple[str, str]] = set()  # models of the fleet x classes

    @contextmanager
    def place(
        self, asked: JobRequest, tenant: str, is_replay: Callable[[], bool] | None = None
    ) -> Iterator[Admitted]:
        """Let a request in, or raise what refuses it; `is_replay` looks its key up."""
        load = Load(1, rough_tokens(asked) + asked.sampling.max_tokens)
        refused = self._refusal(asked, tenant, load)
        if refused is not None:
            reason, error = refused
            if is_replay is None or not self._is_known(is_replay):
                self._count(asked, tenant, reason, error)
                raise error
        place = self._depths.take(asked.model, tenant, load)
        if place is not None:
            self._show(asked)
        admitted = Admitted()
        try:
            yield admitted
        finally:
            if place is not None:
                self._depths.settle(place, is_accepted=admitted.is_accepted)

    def _refusal(
        self, asked: JobRequest, tenant: str, load: Load
    ) -> tuple[str, HeadraceError] | None:
        """Return why a job cannot be let in; None when it can."""
        found = self._depths.of(asked.model, tenant)
        if found is None:
            return None
        total, own = found
        if self._depths.is_away and self._depths.num_unseen >= MAX_UNSEEN:
            return "unseen", QueueUnavailable(
                f"a job was sent; Redis is away, and {self._depths.num_unseen:,} jobs were "
                "accepted since: send it again when the queue is back",
                retry_after_s=UNKNOWN_RETRY_S,
            )
        share = BATCH_SHARE if asked.job_class == JobClass.BATCH else 1.0
        max_jobs, max_tokens = int(self._max_jobs * share), int(self._max_tokens * share)
        after = self._retry_after_s(asked.model, total)
        what = f"a job of class {asked.job_class} was sent for {asked.model}"
        then = "send it again after the seconds of Retry-After"
        if self._max_jobs and total.num_jobs >= max_jobs:
            text = f"{what}; {total.num_jobs:,} jobs wait, and its class may fill {max_jobs:,}"
            return "jobs", QueueFull(f"{text} (max_queued_jobs): {then}", retry_after_s=after)
        if self._max_tokens and total.num_jobs and total.num_tokens + load.num_tokens > max_tokens:
            text = f"{what} that may cost {load.num_tokens:,} tokens; {total.num_tokens:,} wait, "
            text += f"and its class may fill {max_tokens:,} (max_queued_tokens): {then}"
            return "tokens", QueueFull(text, retry_after_s=after)
        if self._max_tenant_jobs and own.num_jobs >= self._max_tenant_jobs:
            text = f"{what}; {own.num_jobs:,} jobs of this tenant wait, and the limit is "
            text += f"{self._max_tenant_jobs:,} (max_queued_jobs_per_tenant): {then}"
            return "tenant", TenantQueueFull(text, retry_after_s=after)
        return None

    def _retry_after_s(self, model: str, total: Load) -> int:
        rate = self._depths.jobs_per_s(model)
        if rate is None:
            return UNKNOWN_RETRY_S
        if rate <= 0:
            return MAX_RETRY_S
        return min(MAX_RETRY_S, max(1, math.ceil(RETRY_SHARE * total.num_jobs / rate)))

    def _is_known(self, is_replay: Callable[[], bool]) -> bool:
        if not self._lookups.acquire(timeout=LOOKUP_S):
            return False  # so many wait for this: the client asks again
        try:
            return is_replay()
        finally:
            self._lookups.release()

    def _show(self, asked: JobRequest) -> None:
        """Begin the series of refusals at 0: a rate needs a value before the first one."""
        if (asked.model, asked.job_class) not in self._shown:
            self._shown.add((asked.model, asked.job_class))
            for reason in REASONS:
                self._metrics.jobs_refused.labels(asked.model, asked.job_class, reason)

    def _count(self, asked: JobRequest, tenant: str, reason: str, error: HeadraceError) -> None:
        self._metrics.jobs_refused.labels(asked.model, asked.job_class, reason).inc()
        log.event(
            "job.refused",
            model=asked.model,
            tenant=tenant,
            reason=reason,
            retry_after_s=error.retry_after_s,
        )
