"""What requests of the operator's job views may hold, and what is answered.

A field that is empty counts as not given: forms send all their fields.

Called by: gateway/dashboard/jobs, job_bulk, job_pages.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from headrace.contract.job_search import JobFilter
from headrace.gateway.answers import Job, JobSummary
from headrace.gateway.schemas import Status

#: Characters of an error's part: fewer have no trigram, and would match nearly everything.
MIN_ERROR_CHARS = 3

Name = Annotated[str, Field(max_length=200)]
Action = Literal["cancel", "retry", "priority"]
Priority = Literal["high", "normal", "low"]


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _split(value: Any) -> Any:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


class JobCriteria(BaseModel):
    """What jobs are searched by; all that are given must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, BeforeValidator(_stripped)] | None = Field(
        default=None, pattern=r"^job_[0-9a-f]{1,32}$", description="A job's id, or its beginning."
    )
    tenant: Name | None = Field(default=None, description="Its name or id.")
    status: Annotated[list[Status] | None, BeforeValidator(_split)] = Field(
        default=None, max_length=6, description="One state or several, separated by commas."
    )
    model: Name | None = None
    job_class: Literal["interactive", "batch"] | None = None
    error: str | None = Field(
        default=None,
        min_length=MIN_ERROR_CHARS,
        max_length=200,
        description="Part of the error's code or text, whatever the case.",
    )
    meta: str | None = Field(
        default=None,
        pattern=r"^[^:]{1,64}:",
        max_length=64 + 1 + 512,
        description="`key:value`: the job's metadata holds exactly that.",
    )
    created_after: datetime | None = Field(default=None, description="ISO 8601; without zone UTC.")
    created_before: datetime | None = None
    worker: Name | None = Field(default=None, description="Of the newest attempt.")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: given for name, given in value.items() if given != ""}

    def filter(self) -> JobFilter:
        """Return it as the search takes it."""
        name, _, value = (self.meta or "").partition(":")
        return JobFilter(
            id=self.id,
            tenant=self.tenant,
            statuses=tuple(self.status or ()),
            model=self.model,
            job_class=self.job_class,
            error=self.error,
            meta=None if self.meta is None else (name, value),
            created_after=_in_utc(self.created_after),
            created_before=_in_utc(self.created_before),
            worker=self.worker,
        )


def _in_utc(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


class JobSearchQuery(JobCriteria):
    """Which jobs to list, newest first."""

    limit: int = Field(default=50, ge=1, le=100)
    cursor: str | None = Field(default=None, description="`next_cursor` of the page before.")


class PriorityRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    priority: Priority


class CloneRequest(BaseModel):
    """Fields of a job request to have other values; `sampling` is changed field by field."""

    model_config = ConfigDict(extra="allow", frozen=True)


class BulkRequest(BaseModel):
    """An action on all jobs that a filter matches and that it can be done to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: JobCriteria
    action: Action
    priority: Priority | None = Field(default=None, description="With the action `priority`.")
    dry_run: bool = Field(default=False, strict=True, description="Only count.")
    expect: int | None = Field(
        default=None, ge=0, strict=True, description="What the dry run counted; else required."
    )


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdminJobSummary(JobSummary):
    """A job as operators' lists show it."""

    tenant: str
    worker: str | None
    made_from: str | None = Field(description="The job that it was retried or cloned from.")


class AdminJobList(_Answer):
    jobs: list[AdminJobSummary]
    next_cursor: str | None


class Attempt(_Answer):
    attempt: int
    worker: str
    started_at: datetime
    ended_at: datetime | None
    outcome: str | None
    admitted_ms: int | None
    first_token_ms: int | None
    last_token_ms: int | None
    resumed_at: int | None
    num_tokens: int | None
    signature: str | None = Field(description="What its engine died of.")


class Span(_Answer):
    span: Literal["queue", "prepare", "prefill", "decode", "publish", "running", "lost"]
    attempt: int | None
    worker: str | None
    start_ms: float = Field(description="After the job was accepted.")
    duration_ms: float


class LetterOfJob(_Answer):
    signature: str
    num_runs: int
    created_at: datetime
    replayed_at: datetime | None
    replayed_as: str | None


class AdminJob(Job):
    """A job with all that is known of it."""

    tenant: str
    worker: str | None
    made_from: str | None
    retried_as: list[str] = Field(description="Jobs that were made from it.")
    dead_letter: LetterOfJob | None = Field(description="Of a job that ended as poison.")
    cancel_requested_at: datetime | None
    attempts: list[Attempt]
    timeline: list[Span] = Field(description="Where the time went; adds up to the job's.")


class BulkResult(_Answer):
    num_matched: int
    num_done: int
    num_refused: int = Field(description="They moved on meanwhile, or were not reached.")
    stopped: str | None = Field(description="Why it ended before the last job.")
