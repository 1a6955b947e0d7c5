"""Request bodies: from bytes to a JSON object that is safe to store, or a 4xx that says why not.

Invariants:
1. No more than max_body_bytes + 1 is ever read, with or without a Content-Length.
2. Nesting is bounded before anything recursive sees the body.
3. What is returned has no NUL and no lone surrogate in any text or key (Postgres stores neither),
   no duplicate key, no NaN and no infinity.
4. Refusals quote no more of the body than a field's name.

Called by: gateway/jobs.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from flask import Request

from headrace.contract.errors import (
    BodyTooLarge,
    InvalidJson,
    InvalidText,
    OutOfRange,
    UnsupportedMediaType,
    WrongType,
)

#: A JSON string, also one that never ends; possessive, so it cannot backtrack.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_FORBIDDEN = re.compile("[\x00\ud800-\udfff]")


def read_json_object(request: Request, *, max_body_bytes: int, max_depth: int) -> dict[str, Any]:
    """Return the body as a JSON object."""
    if request.mimetype != "application/json":
        found = repr(request.mimetype[:80]) if request.mimetype else "none"
        raise UnsupportedMediaType(
            f"the body must be application/json; its Content-Type is {found}: set the header"
        )
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise UnsupportedMediaType(
            f"Content-Encoding {encoding[:40]!r} is not read here: send the body uncompressed"
        )
    return parse_json_object(read_body(request, max_body_bytes), max_depth)


def read_body(request: Request, max_body_bytes: int) -> bytes:
    """Return the body's bytes, or refuse one that is too large without reading it all."""
    announced = request.content_length
    if announced is not None and announced > max_body_bytes:
        raise _too_large(f"{announced:,} bytes", max_body_bytes)
    parts: list[bytes] = []
    left = max_body_bytes + 1
    while left > 0 and (part := request.stream.read(left)):
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise _too_large(f"more than {max_body_bytes:,} bytes", max_body_bytes)
    return b"".join(parts)


def parse_json_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """Parse strictly (module docstring, 2 and 3)."""
    check_depth(body, max_depth)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidText(
            f"the body is not UTF-8: byte {error.start} cannot be read: encode it as UTF-8"
        ) from None
    if "\x00" in text:
        raise InvalidText("the body holds a NUL character: remove it")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float
        )
    except json.JSONDecodeError as error:
        raise InvalidJson(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ValueError:  # an integer of thousands of digits (sys.set_int_max_str_digits)
        raise OutOfRange("the body holds an integer of thousands of digits: shorten it") from None
    if not isinstance(value, dict):
        raise WrongType(f"the body must be a JSON object; it is a {kind_of(value)}")
    if "\\u" in text:  # without an escape neither NUL nor surrogate can have come in
        check_text(value)
    return value


def check_depth(body: bytes, max_depth: int) -> None:
    """Refuse nesting beyond max_depth, looking at the bytes alone."""
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", body)):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > max_depth:
            raise InvalidJson(f"the body is nested deeper than {max_depth} levels: make it flatter")


def check_text(value: Any, path: str = "") -> None:
    """Refuse a NUL or lone surrogate in any text or key below `value`."""
    if isinstance(value, str):
        match = _FORBIDDEN.search(value)
        if match is not None:
            what = "a NUL" if match[0] == "\x00" else "a lone surrogate"
            raise InvalidText(
                f"{path or 'a text'} holds {what} at character {match.start()}: remove it"
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            check_text(key, f"a key of {path or 'the body'}")
            check_text(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            check_text(item, f"{path}[{index}]")


def kind_of(value: Any) -> str:
    """Name a JSON value's type, and its size where it has one, but never what is in it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    if isinstance(value, dict):
        return f"object of {len(value)} fields"
    return f"list of {len(value)}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise InvalidJson(f"the field {double[:80]!r} stands twice in one object: keep one")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJson(f"the body holds {name}, which is not JSON: send a finite number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise OutOfRange(f"the number {digits[:40]} is too large: send a finite number")
    return value


def _too_large(found: str, limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has {found}; the limit is {limit:,} (max_body_bytes)")
