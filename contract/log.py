"""Logging: one event, one line, as `name key=value ...` or as a JSON object; never a prompt.

Event names are past participles (`job.claimed`). All of headrace's lines come from the logger
`headrace`; lines of libraries (Celery, OpenTelemetry) from WARNING on take the same form.

Invariants:
1. A line is one line, whatever its values are, and says which process it is of.
2. What a process said of itself with `identify` (its worker) is on all its lines; `job` is given
   with each event that is about one.
3. Prompts, outputs and secrets are never values, and an exception's text is never written: it may
   hold any of them. `failure` writes its type and its frames.

Called by: each process's entry point (`configure`), everything else (`event`, `failure`).
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Literal

logger = logging.getLogger("headrace")

Format = Literal["text", "json"]
#: Attribute of a record that holds what its event was given.
_FIELDS = "headrace_fields"


class _Stderr(logging.Handler):
    """Ours, so that a second `configure` can tell it from another's."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


class _Text(logging.Formatter):
    """`time LEVEL process=P name key=value ...`."""

    def __init__(self, about: dict[str, object]) -> None:
        super().__init__("%(asctime)s %(levelname)s")
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        name, fields = _event_of(record)
        head = f"{self.formatTime(record)} {record.levelname} process={self._about['process']}"
        return " ".join([head, _line(name, _with_identity(self._about, fields))])


class _Json(logging.Formatter):
    """One object a line: at, level, process, event, and the event's fields as they are."""

    def __init__(self, about: dict[str, object]) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        name, fields = _event_of(record)
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"at": at.replace("+00:00", "Z"), "level": record.levelname}
        line |= {"process": self._about["process"], "event": name}
        # What an event says of the line itself must not replace it.
        given = {(f"{k}_" if k in line else k): _plain(v) for k, v in fields.items()}
        return json.dumps(_with_identity(self._about, line | given))


#: What `identify` has said; the process's own, so module state with one owner.
_identity: dict[str, object] = {"process": "headrace"}


def configure(level: str, process: str, form: Format = "text") -> None:
    """Send all lines to stderr in one form; the process's name stands on each."""
    _identity.clear()
    _identity["process"] = process
    handler = _Stderr()
    handler.setFormatter(_Json(_identity) if form == "json" else _Text(_identity))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
    others = logging.getLogger()
    others.handlers = [h for h in others.handlers if not isinstance(h, _Stderr)] + [handler]
    others.setLevel(logging.WARNING)


def identify(**about: str) -> None:
    """Put fields on all lines to come: `worker=...` once its name is known."""
    _identity.update(about)


def event(name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one event."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", _line(name, fields), extra={_FIELDS: (name, fields)})


def failure(name: str, error: BaseException, **fields: object) -> None:
    """Log what nobody foresaw: the exception's type and frames, not its text."""
    found = traceback.extract_tb(error.__traceback__)
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in found]
    event(
        name,
        level=logging.ERROR,
        **fields,
        error=type(error).__name__,
        frames=" < ".join(reversed(frames)),
    )


def _event_of(record: logging.LogRecord) -> tuple[str, dict[str, object]]:
    """Return name and fields of an event; a library's line is an event `log.written`."""
    given = getattr(record, _FIELDS, None)
    if given is not None:
        return given
    fields: dict[str, object] = {"logger": record.name, "text": record.getMessage()}
    if record.exc_info and record.exc_info[0] is not None:
        fields["error"] = record.exc_info[0].__name__
    return "log.written", fields


def _with_identity(about: dict[str, object], fields: dict[str, object]) -> dict[str, object]:
    return fields | {k: v for k, v in about.items() if k not in ("process", *fields)}


def _line(name: str, fields: dict[str, object]) -> str:
    return " ".join([name, *(f"{k}={_value(v)}" for k, v in fields.items())])


def _value(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    is_plain = text.isprintable() and not any(c in ' "' for c in text)
    return text if text and is_plain else ascii(text)


def _plain(value: object) -> object:
    """Return what JSON can hold: a number that is one, a bool and None stay what they are."""
    if isinstance(value, float):
        return value if value - value == 0 else str(value)
    return value if isinstance(value, bool | int) or value is None else str(value)
