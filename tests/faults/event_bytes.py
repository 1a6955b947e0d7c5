"""The checker's own reader of event streams: bytes in, events out, one connection at a time.

Written against the specification of server-sent events (WHATWG HTML, 9.2), not against the
gateway or its client, so that neither's mistake is repeated here.

Called by: checker.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec


class BadEvent(ValueError):
    """A line that no stream of ours may hold."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    name: str
    id: str | None  # None: the event has no id of its own
    data: dict[str, Any]


@dataclass(slots=True)
class EventBytes:
    """The parser of one connection. An event that its end cut off is never given out."""

    _rest: bytes = b""
    _name: str = ""
    _id: str | None = None
    _data: list[str] = field(default_factory=list)

    def take(self, data: bytes) -> Iterator[StreamEvent]:
        """Yield the events that these bytes complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                yield self._event()
            else:
                self._name, self._id = "", None

    def _field(self, line: bytes) -> None:
        if line.startswith(b":"):
            return
        name, _, value = line.partition(b":")
        text = value.removeprefix(b" ").decode()
        if name == b"event":
            self._name = text
        elif name == b"data":
            self._data.append(text)
        elif name == b"id":
            self._id = text
        elif name != b"retry" or not text.isdigit():
            raise BadEvent(f"a stream holds the line {line[:80]!r}")

    def _event(self) -> StreamEvent:
        try:
            data = msgspec.json.decode("\n".join(self._data))
        except msgspec.DecodeError as error:
            raise BadEvent(f"an event's data is no JSON: {error}") from error
        if not isinstance(data, dict):
            raise BadEvent(f"an event's data is a {type(data).__name__}, not an object")
        event = StreamEvent(self._name or "message", self._id, data)
        self._name, self._id, self._data = "", None, []
        return event
