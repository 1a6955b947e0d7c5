"""Server-sent events out of a byte stream.

Lines end with LF or CRLF only. httpx's own line splitter also breaks at U+2028 and its like, which
JSON text may hold as they are, and would cut an event in two.

Called by `client`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

#: What ends a job's stream.
TERMINAL = frozenset({"succeeded", "failed", "canceled", "expired"})


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    data: dict[str, Any]
    id: str | None = None  # None: the position in the stream did not move

    @property
    def is_terminal(self) -> bool:
        return self.name in TERMINAL


def parse_events(chunks: Iterable[bytes]) -> Iterator[Event]:
    """Yield each complete event; an event that the stream breaks off in is dropped."""
    fields: dict[str, list[str]] = {}
    for line in _lines(chunks):
        if line:
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
            continue
        if "data" in fields:
            yield Event(
                fields.get("event", ["message"])[-1],
                json.loads("\n".join(fields["data"])),
                fields["id"][-1] if "id" in fields else None,
            )
        fields = {}


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode()
