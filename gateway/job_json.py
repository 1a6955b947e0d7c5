"""A job as clients see it, from its row or its end record: one form for every route and event.

Called by: gateway/jobs (rows), gateway/cursor (end records and replays).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import RowMapping

from headrace.contract import wire
from headrace.contract.specs import end_of


def job_json(row: RowMapping) -> dict[str, Any]:
    """Return the job; `output` and `usage` stand in it unless the row is a summary."""
    status = wire.JobStatus(row["status"])
    job: dict[str, Any] = {
        "id": row["id"],
        "object": "job",
        "status": status.value,
        "model": row["model"],
        "class": row["job_class"],
        "priority": row["priority"],
        "created_at": row["created_at"],
        "started_at": row["started_at"],
        "finished_at": row["finished_at"],
        "deadline_at": row["deadline_at"],
        "attempt": row["attempt"],
        "input": row["input"],
        "sampling": row["sampling"],
        "metadata": row["meta"],
        "finish_reason": row["finish_reason"],
        "error": _error(row["error_code"], row["error_text"]),
    }
    if "output_text" in row:
        job["output"] = _output(row)
        job["usage"] = _usage(end_of(row)) if status.is_terminal else None
    return job


def output_chunk(row: RowMapping) -> wire.TokenChunk | None:
    """Return the whole output of an ended job as one chunk; None when it made no token."""
    if not row["output_token_ids"]:
        return None
    logprobs = row["output_logprobs"]
    return wire.TokenChunk(
        job=row["id"],
        attempt=row["attempt"],
        gen=end_of(row).gen,
        first=0,
        ids=tuple(row["output_token_ids"]),
        text=row["output_text"],
        ends=tuple(row["output_ends"]),
        logprobs=None
        if logprobs is None
        else msgspec.convert(logprobs, tuple[wire.TokenLogprobs, ...]),
    )


def terminal_json(end: wire.JobEnd) -> dict[str, Any]:
    """Return the fields of a terminal event but `job`."""
    return {
        "status": end.status.value,
        "finish_reason": None if end.finish_reason is None else end.finish_reason.value,
        "usage": _usage(end),
        "error": _error(end.error_code, end.error_text),
    }


def logprobs_json(logprobs: Sequence[wire.TokenLogprobs]) -> list[dict[str, Any]]:
    """Return one object a token: its own logprob and the likeliest alternatives."""
    return [
        {
            "logprob": token.chosen,
            "top": [{"token_id": token_id, "logprob": value} for token_id, value in token.top],
        }
        for token in logprobs
    ]


def _output(row: RowMapping) -> dict[str, Any] | None:
    if row["output_text"] is None:
        return None
    chunk = output_chunk(row)
    logprobs = None if chunk is None else chunk.logprobs
    return {
        "text": row["output_text"],
        "token_ids": row["output_token_ids"] or [],
        "logprobs": None if logprobs is None else logprobs_json(logprobs),
    }


def _usage(end: wire.JobEnd) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "cached_tokens": end.cached_tokens,
        "completion_tokens": end.next,
        "total_tokens": end.prompt_tokens + end.next,
    }


def _error(code: str | None, detail: str | None) -> dict[str, str | None] | None:
    return None if code is None else {"code": code, "detail": detail}
