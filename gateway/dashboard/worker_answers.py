"""What is answered about workers, as pydantic models: their schemas in /openapi.json.

Answers are made by worker_figures.py; a test holds the two together.

Called by: gateway/dashboard/workers (documentation), tests.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Gpu(_Answer):
    name: str
    utilization: float = Field(ge=0, le=1, description="Share of the last second it worked.")
    memory_used_bytes: int
    memory_total_bytes: int
    power_w: float
    temperature_c: float


class WorkerOrder(_Answer):
    wanted: Literal["serving", "drained", "quarantined"]
    by: str = Field(description="The operator's name, or the key's id.")
    at: datetime


class Worker(_Answer):
    worker: str
    model: str | None
    state: Literal[
        "starting", "ready", "draining", "drained", "quarantined", "broken", "suspect", "dead"
    ]  # fmt: skip
    why: str = Field(description="Why it is suspect, broken or dead; else empty.")
    version: str | None
    host: str | None
    pid: int | None
    engine_pid: int | None
    started_at: datetime | None
    gpus: list[Gpu] = Field(description="Those its engine uses; empty on a CPU.")
    gpu: Gpu | None = Field(description="The first of them.")
    total_blocks: int
    free_blocks: int
    cached_blocks: int = Field(description="Free for new sequences, with what they may share.")
    kv_used: float = Field(ge=0, le=1, description="Share of the blocks that sequences hold.")
    num_held: int = Field(description="Jobs leased to it; of a dead one those not yet taken over.")
    num_running: int
    num_waiting: int
    num_preempted: int = Field(description="Since its start.")
    max_num_seqs: int
    batch: float = Field(description="Mean number of sequences a step decoded.")
    prefix_hit_rate: float | None = Field(description="Of prompt tokens since its start.")
    tokens_per_s: float
    step_ms: float | None
    step_age_s: float = Field(description="Since the last step; 0 while it has no work.")
    beat_age_s: float | None
    engine_restarts: int = Field(description="After deaths; ordered ones do not count.")
    order: WorkerOrder | None = Field(description="null: it was never ordered anything.")


class WorkerList(_Answer):
    workers: list[Worker]
