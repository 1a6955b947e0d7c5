"""What is answered, as pydantic models: the response schemas of /openapi.json.

Answers are made from rows by gateway/job_json, which is faster; a test holds the two together.

Called by: gateway/routes (documentation), tests.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.gateway.schemas import Status


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TopLogprob(_Answer):
    token_id: int
    logprob: float | None = Field(description="null: minus infinity.")


class TokenLogprob(_Answer):
    logprob: float | None
    top: list[TopLogprob]


class Output(_Answer):
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None


class Usage(_Answer):
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int


class JobError(_Answer):
    code: str
    detail: str | None


class JobSummary(_Answer):
    """A job as lists show it."""

    id: str
    object: Literal["job"]
    status: Status
    model: str
    job_class: Literal["interactive", "batch"] = Field(alias="class")
    priority: Literal["high", "normal", "low"]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime | None
    attempt: int = Field(description="Pickups so far.")
    input: dict[str, Any] = Field(description="The prompt as it was sent.")
    sampling: dict[str, Any] = Field(description="What is in effect, with the seed.")
    metadata: dict[str, str]
    finish_reason: Literal["stop", "length", "canceled", "expired", "error"] | None
    error: JobError | None


class Job(JobSummary):
    """A job with its result."""

    output: Output | None = Field(description="null until the job has ended.")
    usage: Usage | None


class JobList(_Answer):
    object: Literal["list"]
    data: list[JobSummary]
    next_cursor: str | None


class Model(_Answer):
    id: str
    object: Literal["model"]
    max_seq_tokens: int
    vocab_size: int
    dtype: str
    has_chat_template: bool
    ready: bool = Field(description="A live worker serves it now.")


class ModelList(_Answer):
    object: Literal["list"]
    data: list[Model]


class WorkersHealth(_Answer):
    num_ready: int
    num_stuck: int = Field(description="Their engine has work and makes no step.")
    num_other: int = Field(description="Starting, draining, drained or set aside.")
    num_silent: int = Field(description="No beat any more, within the last hour.")
    oldest_step_s: float = Field(description="Age of the oldest last step of those with work.")


class Health(_Answer):
    status: Literal["alive", "ready", "degraded"]
    postgres: Literal["up"] | None = None
    redis: Literal["up", "away"] | None = None
    workers: WorkersHealth | None = None


class Problem(_Answer):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable; what a program should look at.")
    retryable: bool
