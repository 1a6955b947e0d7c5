"""What requests may hold: strict pydantic models, the source of validation and of /openapi.json.

Strict: no text for a number, no `true` for 1, no unknown field. What pydantic finds wrong is turned
into our errors by gateway/refusals.

Called by: gateway/jobs, gateway/sse, gateway/openapi. What is answered: gateway/answers.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from headrace.contract import wire

#: Upper bound of a deadline, seconds: a year.
MAX_DEADLINE_S = 31_536_000.0

_TOKEN_ID = re.compile(r"-?(0|[1-9][0-9]{0,9})")

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "expired"]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_ids_as_keys(value: Any) -> Any:
    """Turn the texts that JSON makes of token ids back into numbers."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not _TOKEN_ID.fullmatch(key):
            raise PydanticCustomError(
                "wrong_type", "keys must be token ids, such as \"50256\"; one is {key}",
                {"key": repr(key[:40])},
            )  # fmt: skip
    return {int(key): bias for key, bias in value.items()}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SamplingRequest(_Strict):
    """How tokens are chosen."""

    max_tokens: int = Field(default=256, ge=1, le=1 << 20, description="Tokens to make at most.")
    temperature: float = Field(
        default=1.0, ge=0, le=2, allow_inf_nan=False, description="0 = greedy."
    )
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, le=1 << 31, description="0 = all.")
    min_p: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, le=(1 << 63) - 1, description="Drawn when absent.")
    stop: Annotated[list[StopText], Field(max_length=16), BeforeValidator(_as_list)] = Field(
        default_factory=list,
        description="A text or up to 16; the output ends before the first that appears.",
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10, allow_inf_nan=False)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]],
        Field(max_length=300),
        BeforeValidator(_token_ids_as_keys),
    ] = Field(default_factory=dict, description="Token id -> what is added to its logit.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="0 = of the chosen token, k = also of the k likeliest.",
    )


class ChatMessage(_Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class JobRequest(_Strict):
    """A job: exactly one of prompt, prompt_token_ids, messages."""

    model: str = Field(min_length=1, max_length=200)
    prompt: str | None = Field(default=None, description="Text, tokenised as it is.")
    prompt_token_ids: list[int] | None = Field(default=None, min_length=1, max_length=1 << 20)
    messages: list[ChatMessage] | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="Rendered with the model's chat template.",
    )
    sampling: SamplingRequest = Field(default_factory=SamplingRequest)
    job_class: Literal["interactive", "batch"] = Field(default="interactive", alias="class")
    priority: Literal["high", "normal", "low"] = "normal"
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        le=MAX_DEADLINE_S,
        allow_inf_nan=False,
        description="From now; then it expires.",
    )
    metadata: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=64)],
            Annotated[str, Field(max_length=512)],
        ],
        Field(max_length=16),
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_prompt(self) -> JobRequest:
        given = [
            name
            for name in ("prompt", "prompt_token_ids", "messages")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise PydanticCustomError(
                "prompt_choice",
                "exactly one of prompt, prompt_token_ids and messages must be sent; found {found}",
                {"found": " and ".join(given) or "none"},
            )
        return self

    def input_json(self) -> dict[str, Any]:
        """Return the one form of prompt that was sent, as it is stored and shown."""
        sent = {"prompt", "prompt_token_ids", "messages"}
        return self.model_dump(include=sent, exclude_none=True)


def wire_sampling(sampling: SamplingRequest, *, seed: int) -> wire.Sampling:
    """Return the sampling a worker gets; `seed` stands in where the client sent none."""
    fields = dict(sampling)
    fields["stop"] = tuple(sampling.stop)
    fields["seed"] = seed if sampling.seed is None else sampling.seed
    return wire.Sampling(**fields)


def _split(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobsQuery(_Query):
    """Which jobs to list, newest first."""

    status: Annotated[list[Status] | None, BeforeValidator(_split)] = Field(
        default=None, description="One state or several, separated by commas."
    )
    model: str | None = None
    job_class: Literal["interactive", "batch"] | None = Field(default=None, alias="class")
    limit: int = Field(default=20, ge=1, le=100)
    cursor: str | None = Field(default=None, description="`next_cursor` of the page before.")


class EventsQuery(_Query):
    """Where to begin."""

    starting_after: str | None = Field(
        default=None,
        description="Id of the last event seen, -1 for none; Last-Event-ID wins over it.",
    )
