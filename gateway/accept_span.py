"""The span of accepting a job, and the trace context that is kept with it.

With a collector the kept context is this span's, so that the worker's spans are its children;
without one it is the client's own, unchanged: a worker may have a collector where we have none.

Invariants:
1. A `traceparent` that is malformed changes nothing about the answer (tracing invariant 2).

Called by: gateway/jobs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.contract.errors import HeadraceError
from headrace.contract.ledger import Accepted
from headrace.contract.tracing import Attributes, Traces, checked_traceparent


@dataclass(slots=True)
class Accepting:
    """What is known of the request while it is being accepted."""

    traceparent: str | None  # to be kept with the job
    accepted: Accepted | None = None  # set once it is


@contextmanager
def accept_span(traces: Traces | None, header: str | None, started_s: float) -> Iterator[Accepting]:
    """Trace what is done inside as `job.accept`, from `started_s` (perf_counter) on."""
    parent = checked_traceparent(header)
    if traces is None:
        yield Accepting(parent)
        return
    begin_ns = time.time_ns() - int((time.perf_counter() - started_s) * 1e9)
    span = traces.begin("job.accept", parent, begin_ns)
    about, error = Accepting(span.traceparent), "internal"
    try:
        yield about
        error = None
    except HeadraceError as refused:
        error = refused.code
        raise
    finally:
        span.end({} if about.accepted is None else _attributes(about.accepted), error=error)


def _attributes(accepted: Accepted) -> Attributes:
    row = accepted.job
    return {
        "headrace.job": row["id"],
        "headrace.model": row["model"],
        "headrace.job_class": row["job_class"],
        "headrace.is_replay": accepted.is_replay,
    }
