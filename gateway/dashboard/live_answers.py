"""What overview, queues and feed take and answer, as pydantic models: for checks and /openapi.json.

Called by: gateway/dashboard/live_routes, tests.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.contract.live import Severity, Span


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Quantiles(_Answer):
    p50: float
    p99: float


class ModelSample(_Answer):
    """The figures of one model, or of all together."""

    jobs_in_per_s: float | None = Field(description="null: there is nothing yet to compare with.")
    jobs_out_per_s: float | None
    failed_per_s: float | None
    tokens_per_s: float | None
    num_queued: int
    num_running: int
    oldest_s: float | None = Field(description="Age of the oldest queued job.")
    ttft_ms: Quantiles | None = Field(description="Of the last minute; null: nothing was measured.")
    itl_ms: Quantiles | None
    e2e_ms: Quantiles | None
    num_workers: int


class Sample(ModelSample):
    """The figures of the fleet, sampled every five seconds."""

    at: datetime
    live_streams: int
    models: dict[str, ModelSample]


class AlarmAnswer(_Answer):
    """One thing that is wrong now."""

    code: str
    severity: Severity
    text: str
    since: datetime
    model: str | None


class OverviewAnswer(_Answer):
    """Whether the fleet is well."""

    at: datetime
    sample: Sample | None
    alarms: list[AlarmAnswer]
    redis: Literal["up", "away"]
    postgres: Literal["up", "away"]
    history: dict[str, list[float | None]] = Field(
        description="One list a series; `at` in Unix seconds."
    )


class OverviewQuery(BaseModel):
    """Which history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    span: Span = Field(default=Span.HOUR, description="hour: every 5 s; day: every minute.")


class Claim(_Answer):
    worker: str
    num_jobs: int


class Queue(_Answer):
    """The jobs of one class and tenant of a model."""

    model: str
    job_class: str
    tenant_id: str
    tenant: str
    num_queued: int
    num_held: int = Field(description="Given to workers and not ended.")
    oldest_s: float | None
    claimed_by: list[Claim]
    lag: int = Field(description="Entries of the stream that were never given to a worker.")
    num_takeovers: int = Field(description="Jobs taken from a silent worker, of the last day.")
    is_paused: bool
    paused_by: str | None
    paused_at: datetime | None


class PauseAnswer(_Answer):
    """What is paused; null stands for all."""

    model: str | None
    job_class: str | None
    tenant_id: str | None
    tenant: str | None
    paused_by: str
    paused_at: datetime


class QueuesAnswer(_Answer):
    queues: list[Queue]
    pauses: list[PauseAnswer]


class PurgeAnswer(_Answer):
    num_canceled: int
    has_more: bool = Field(description="The call ended as many as one may: ask again.")


class QueueChoice(_Strict):
    """Which queues to pause or resume; null, or nothing, is all."""

    model: str | None = Field(default=None, min_length=1, max_length=200)
    job_class: Literal["interactive", "batch"] | None = None
    tenant: str | None = Field(
        default=None, min_length=1, max_length=200, description="Name or id."
    )


class PurgeRequest(_Strict):
    """Which queues of one model to empty."""

    model: str = Field(min_length=1, max_length=200)
    job_class: Literal["interactive", "batch"] | None = None
    tenant: str | None = Field(
        default=None, min_length=1, max_length=200, description="Name or id."
    )
    confirm: str = Field(max_length=200, description="The model's name, typed once more.")
