"""What requests about dead letters and replays may hold, and what is answered.

A field that is empty counts as not given: forms send all their fields.

Called by: gateway/dashboard/dead_letters, dead_letter_pages.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.contract.crashes import SIGNATURE_CHARS
from headrace.contract.dead_letters import MAX_SELECTED, LetterFilter
from headrace.contract.replays import MAX_RATE, MIN_RATE
from headrace.gateway.schemas import Status

Name = Annotated[str, Field(max_length=200)]
JobId = Annotated[str, Field(pattern=r"^job_[0-9a-f]{32}$")]


class LetterCriteria(BaseModel):
    """What dead letters are searched by; all that are given must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    signature: str | None = Field(
        default=None, max_length=SIGNATURE_CHARS, description="What it died of, all of it."
    )
    model: Name | None = None
    tenant: Name | None = Field(default=None, description="Its name or id.")
    replayed: bool | None = Field(default=None, description="Whether a job was made of it since.")
    created_after: datetime | None = Field(
        default=None, description="When it died: ISO 8601; without zone UTC."
    )
    created_before: datetime | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: given for name, given in value.items() if given != ""}

    def filter(self) -> LetterFilter:
        """Return it as the contract takes it."""
        return LetterFilter(
            signature=self.signature,
            model=self.model,
            tenant=self.tenant,
            is_replayed=self.replayed,
            created_after=_in_utc(self.created_after),
            created_before=_in_utc(self.created_before),
        )


def _in_utc(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=UTC)


class LettersQuery(LetterCriteria):
    """Which dead letters to list, newest job first."""

    limit: int = Field(default=50, ge=1, le=100)
    cursor: str | None = Field(default=None, description="`next_cursor` of the page before.")


class GroupsQuery(LetterCriteria):
    """Of which dead letters to show the signatures, the newest death first."""

    limit: int = Field(default=100, ge=1, le=500)


class ReplaysQuery(BaseModel):
    """Which replays to list, newest first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: int = Field(default=20, ge=1, le=100)
    cursor: str | None = Field(default=None, description="`next_cursor` of the page before.")


class LetterReplayRequest(BaseModel):
    """A replay of one letter, now."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    again: bool = Field(default=False, description="Also if it was replayed already.")


class ReplayCriteria(LetterCriteria):
    """As the list's, or a selection."""

    job_ids: list[JobId] | None = Field(
        default=None, min_length=1, max_length=MAX_SELECTED, description="Only these letters."
    )

    def filter(self) -> LetterFilter:
        """Return it as the contract takes it; whether it was replayed is not part of it."""
        job_ids = None if self.job_ids is None else tuple(sorted(set(self.job_ids)))
        found = super().filter()
        return LetterFilter(
            signature=found.signature,
            model=found.model,
            tenant=found.tenant,
            created_after=found.created_after,
            created_before=found.created_before,
            job_ids=job_ids,
        )


class ReplayRequest(BaseModel):
    """A replay of all letters that a filter matches and that were not replayed, at a rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    filter: ReplayCriteria = ReplayCriteria()
    all: bool = Field(default=False, strict=True, description="Required with an empty filter.")
    rate_per_min: int | None = Field(
        default=None, ge=MIN_RATE, le=MAX_RATE, strict=True, description="Jobs a minute; required."
    )
    dry_run: bool = Field(default=False, strict=True, description="Only count.")
    expect: int | None = Field(
        default=None, ge=0, strict=True, description="What the dry run counted; else required."
    )


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DeadLetter(_Answer):
    job_id: str
    tenant: str
    model: str
    signature: str
    detail: str
    num_runs: int = Field(description="Runs that died with it in hand.")
    created_at: datetime
    replayed_at: datetime | None
    replayed_as: str | None = Field(description="The newest job that was made of it.")
    replayed_status: Status | None = Field(description="How that is now; null: it is deleted.")


class DeadLetterList(_Answer):
    dead_letters: list[DeadLetter]
    next_cursor: str | None


class DeadLetterGroup(_Answer):
    signature: str
    num_letters: int
    num_unreplayed: int
    first_at: datetime
    last_at: datetime
    models: list[str]
    tenants: list[str]
    detail: str = Field(description="Of the newest job.")


class DeadLetterGroups(_Answer):
    groups: list[DeadLetterGroup]
    num_groups: int = Field(description="How many there are, shown or not.")


class Replay(_Answer):
    id: str
    filter: dict[str, Any]
    rate_per_min: int
    by: str
    created_at: datetime
    num_matched: int
    num_done: int
    num_refused: int = Field(description="Replayed by another, or deleted, meanwhile.")
    state: Literal["running", "done", "stopped"]
    left_s: float | None = Field(description="Until it has done all, at its rate.")
    ended_at: datetime | None
    stopped_by: str | None


class ReplayList(_Answer):
    replays: list[Replay]
    next_cursor: str | None


class ReplayStarted(_Answer):
    num_matched: int = Field(description="Letters that match and were not replayed.")
    replay: Replay | None = Field(description="null: it was a dry run.")
