"""What pydantic found wrong, as one of our errors: the field's path, and what was found there.

The first fault is reported. Numbers are quoted; texts of prompts, messages, stops and metadata are
described by their length and never quoted, because problems end up in clients' logs.

Called by: gateway/jobs, gateway/sse.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from werkzeug.datastructures import MultiDict

from headrace.contract.errors import (
    HeadraceError,
    MissingField,
    OutOfRange,
    PromptChoice,
    UnknownField,
    WrongType,
)
from headrace.gateway.body import check_text, kind_of

Model = TypeVar("Model", bound=BaseModel)

#: Fields that may hold what a user wrote.
_PRIVATE = {"prompt", "prompt_token_ids", "messages", "stop", "metadata", "password"}
#: Fields that other servers know and this one does not yet, with what to do instead.
_COMING = {"n": "send one job a sample, with different seeds"}


def validate(model: type[Model], value: dict[str, Any]) -> Model:
    """Return `value` as the model; raise the error that says what is wrong with it."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refusal(first) from None


def validate_query(model: type[Model], args: MultiDict[str, str]) -> Model:
    """Return a query string as the model; a parameter may stand in it once."""
    value: dict[str, str] = {}
    for name, texts in args.lists():
        if len(texts) > 1:
            raise OutOfRange(f"parameter {_short(name)} stands {len(texts)} times: send it once")
        check_text(name, "a parameter's name")
        check_text(texts[0], name)
        value[name] = texts[0]
    return validate(model, value)


def _refusal(error: ErrorDetails) -> HeadraceError:
    path, kind = _path(error["loc"]), error["type"]
    if kind == "prompt_choice":
        return PromptChoice(error["msg"])
    if kind == "extra_forbidden":
        advice = _COMING.get(str(error["loc"][-1]), "remove it, or correct its name")
        return UnknownField(f"{path} is not a field of this request: {advice}")
    if kind == "missing":
        return MissingField(f"{path} is required; it was not sent")
    if kind == "wrong_type":
        return WrongType(f"{path}: {error['msg']}")
    text = f"{path}: {error['msg'].lower()}; found {_found(error)}"
    if kind.endswith("_type") or kind in {"int_parsing", "int_from_float", "float_parsing"}:
        return WrongType(text)
    return OutOfRange(text)


def _path(loc: tuple[int | str, ...]) -> str:
    """Write a location as clients would: sampling.stop[2]."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{part[:80]}" if path else part[:80]
    return path or "the body"


def _found(error: ErrorDetails) -> str:
    value = error["input"]
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return str(value).lower() if isinstance(value, bool) else kind_of(value)
    if isinstance(value, str) and _PRIVATE & set(error["loc"]):
        return kind_of(value)
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return _short(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
