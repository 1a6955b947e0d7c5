"""The body of POST /v1/jobs out of options, and out of the lines of a file.

Values are passed on as they are given: the API decides what is valid and says so. Only what cannot
be a body at all is refused here, before anything is sent.

Called by `cli_jobs` and `batch`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.fleet.failure import FleetError


def parse_metadata(pairs: Sequence[str]) -> dict[str, str]:
    """Return the `k=v` options as a mapping."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise FleetError(f"--metadata is {pair[:60]!r}: write it as NAME=VALUE")
        if name in found:
            raise FleetError(f"--metadata gives {name!r} twice: give each name once")
        found[name] = value
    return found


def parse_messages(text: str) -> list[Any]:
    """Return --messages, JSON or `@FILE` with JSON in it, as a list."""
    where = "--messages"
    if text.startswith("@"):
        where = text[1:]
        text = _read(Path(where))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FleetError(f"{where} holds no JSON ({error}): write a list of messages") from error
    if not isinstance(value, list):
        raise FleetError(f"{where} holds a {type(value).__name__}: write a list of messages")
    return value


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given; what was not is left to the API's defaults."""
    return {name: value for name, value in values.items() if value not in (None, [], {})}


def read_bodies(path: Path, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one body for each line of a JSONL file; the line wins over `defaults`.

    All lines are checked before the first is sent: half a file submitted helps nobody.
    """
    bodies: list[dict[str, Any]] = []
    # Not splitlines: JSON strings may hold U+2028 and its like.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FleetError(
                f"{path}, line {number}: no JSON ({error}); nothing was sent"
            ) from error
        if not isinstance(body, dict):
            raise FleetError(
                f"{path}, line {number}: a {type(body).__name__}; write one job object a line;"
                " nothing was sent"
            )
        merged = {**defaults, **body}
        if isinstance(body.get("sampling"), dict) and "sampling" in defaults:
            merged["sampling"] = {**defaults["sampling"], **body["sampling"]}
        bodies.append(merged)
    if not bodies:
        raise FleetError(f"{path} holds no job: write one job object a line")
    return bodies


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(f"{path} cannot be read: {error}") from error
