"""From a job's row to its messages: the one place that builds a JobSpec, or a JobEnd from a row.

Called by: gateway/outbox (enqueue at accept), gateway/upkeep (relay and sweeper, which enqueue
again), gateway/job_json and worker/intake (the end of a job that has ended).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, cast

import msgspec
from sqlalchemy import RowMapping

from headrace.contract import wire


def spec_of(row: RowMapping) -> wire.JobSpec:
    """Build the spec from a row of `jobs`, whole or summary."""
    given = cast("dict[str, Any]", row["input"])
    ids = given.get("prompt_token_ids")
    messages = given.get("messages")
    deadline_at = cast("datetime | None", row["deadline_at"])
    return wire.JobSpec(
        job=row["id"],
        tenant=row["tenant_id"],
        model=row["model"],
        job_class=wire.JobClass(row["job_class"]),
        priority=wire.Priority(row["priority"]),
        sampling=sampling_of(row),
        prompt=given.get("prompt"),
        prompt_token_ids=None if ids is None else tuple(ids),
        messages=None if messages is None else tuple(messages),
        deadline_ms=None if deadline_at is None else int(deadline_at.timestamp() * 1000),
        traceparent=row["traceparent"],
    )


def end_of(row: RowMapping) -> wire.JobEnd:
    """Return the end record of a job that has ended, as its worker wrote it or would have.

    A job that ended in the queue has no output: its log counts as one begun anew after its last
    attempt, which never wrote to it.
    """
    gen = row["output_gen"]
    return wire.JobEnd(
        job=row["id"],
        gen=row["attempt"] if gen is None else gen,
        next=len(row["output_token_ids"] or ()),
        status=wire.JobStatus(row["status"]),
        finish_reason=wire.FinishReason(row["finish_reason"]) if row["finish_reason"] else None,
        prompt_tokens=row["prompt_tokens"] or 0,
        cached_tokens=row["cached_tokens"] or 0,
        error_code=row["error_code"],
        error_text=row["error_text"],
    )


def sampling_of(row: RowMapping) -> wire.Sampling:
    """Return the job's sampling; JSON made texts of the ids in logit_bias."""
    return msgspec.convert(row["sampling"], wire.Sampling, str_keys=True)


def sampling_json(sampling: wire.Sampling) -> dict[str, Any]:
    """Return the form in which `sampling` is kept in a row and shown to clients."""
    return cast("dict[str, Any]", msgspec.to_builtins(sampling, str_keys=True))
