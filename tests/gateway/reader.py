"""Reads an event stream of the test client as a subscriber would, with a deadline."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flask.testing import FlaskClient

TERMINAL = {"succeeded", "failed", "canceled", "expired"}


@dataclass(frozen=True)
class Seen:
    name: str
    data: dict[str, Any]
    id: str | None


class Reader:
    """One subscription; `with` closes it as a client that leaves."""

    def __init__(
        self,
        client: FlaskClient,
        job: str,
        *,
        after: str | None = None,
        header: str | None = None,
        path: str | None = None,
    ) -> None:
        self.response = client.get(
            path or f"/v1/jobs/{job}/events",
            query_string={} if after is None else {"starting_after": after},
            headers={} if header is None else {"Last-Event-ID": header},
        )
        self.pings = 0
        self._events = self._parse()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.response.close()

    def next(self, *, within_s: float = 15.0) -> Seen:
        """Return the next event; pings do not count, but let the deadline be seen."""
        deadline = time.monotonic() + within_s
        for event in self._events:
            if event is not None:
                return event
            self.pings += 1
            assert time.monotonic() < deadline, "no event came in time"
        raise AssertionError("the stream ended")

    def until(self, name: str) -> list[Seen]:
        """Return the events up to the first of that name."""
        found = [self.next()]
        while found[-1].name != name:
            found.append(self.next())
        return found

    def rest(self) -> list[Seen]:
        """Return all events up to the end of the stream, which must follow the terminal one."""
        found = [self.next()]
        while found[-1].name not in TERMINAL:
            found.append(self.next())
        assert list(self._events) == []
        return found

    def wait_for_ping(self) -> None:
        for event in self._events:
            assert event is None
            return

    def _parse(self) -> Iterator[Seen | None]:
        text = ""
        for part in self.response.iter_encoded():
            text += part.decode()
            while "\n\n" in text:
                block, _, text = text.partition("\n\n")
                lines = dict(line.split(": ", 1) for line in block.split("\n"))
                if "event" in lines:
                    yield Seen(lines["event"], json.loads(lines["data"]), lines.get("id"))
                elif "" in lines:
                    yield None


def tokens_of(events: list[Seen]) -> tuple[list[int], str]:
    """Return ids and text after the last reset, and check that the indexes are contiguous."""
    ids: list[int] = []
    text, first = "", None
    for event in events:
        if event.name == "reset":
            ids, text, first = [], "", None
        if event.name == "token":
            first = event.data["index"] if first is None else first
            assert event.data["index"] == first + len(ids)
            ids += event.data["token_ids"]
            text += event.data["text"]
            assert event.id is not None
            assert event.id.split(".")[0] == str(first + len(ids) - 1)
    return ids, text
