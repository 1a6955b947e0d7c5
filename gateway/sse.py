"""Server-sent events: `GET /v1/jobs/{id}/events`.

Each event is `event:`, where one may resume after it `id:`, and one line of JSON. `id:` is the
index of the last token in the event, `N`, or `N.G` for a log that was begun anew; the browser sends
it back as `Last-Event-ID`. A comment line comes after every heartbeat_s of silence, because a
client that left is noticed only when something is written to it.

What a client does not read waits in bounded places, and one that reads nothing is cut off after
write_timeout_s (gateway/outlet); it resumes as after any lost connection.

An id that cannot be is refused before the stream begins: one beyond the output of a job that has
ended, or beyond max_tokens of one that has not.

Called by: gateway/routes, gateway/dashboard/jobs (any tenant's jobs).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec
from flask import Response, request
from sqlalchemy import RowMapping

from headrace.contract.errors import InvalidEventId
from headrace.contract.specs import end_of
from headrace.contract.wire import JobStatus
from headrace.gateway.cursor import Event, Resume, StreamCursor, parse_event_id
from headrace.gateway.jobs import find_job
from headrace.gateway.metrics import Metrics
from headrace.gateway.outlet import PIECE_BYTES, Outlet
from headrace.gateway.refusals import validate_query
from headrace.gateway.schemas import EventsQuery
from headrace.gateway.services import Services
from headrace.gateway.stream import JobStream

#: Milliseconds a browser waits before it connects again.
RETRY_MS = 1000

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx would gather events
}


class FindJob(Protocol):
    """Finds a job for whoever asks, or raises NotFound: a tenant its own, an operator any."""

    def __call__(self, services: Services, job_id: str, *, with_output: bool) -> RowMapping: ...


class EventRoutes:
    """The view of a job's events."""

    def __init__(self, services: Services, find: FindJob = find_job) -> None:
        self._services = services
        self._find = find

    def events(self, job_id: str) -> Response:
        services = self._services
        query = validate_query(EventsQuery, request.args)
        text = request.headers.get("Last-Event-ID") or query.starting_after
        resume = Resume() if text is None else parse_event_id(text)
        row = self._find(services, job_id, with_output=False)
        if JobStatus(row["status"]).is_terminal:
            row = self._find(services, job_id, with_output=True)
        check_resume(row, resume)
        if request.method == "HEAD":
            return Response(headers=HEADERS)
        cursor = StreamCursor(job_id, resume)
        if JobStatus(row["status"]).is_terminal:  # all there will ever be is in this row
            events = iter([cursor.take_row(row)])
        else:
            events = JobStream(
                cursor,
                model=row["model"],
                job=job_id,
                ledger=services.ledger,
                token_log=services.token_log,
                follower=services.follower,
                metrics=services.metrics,
                heartbeat_s=services.settings.heartbeat_s,
            ).events()
        outlet = Outlet.of(
            request.environ, services.settings.write_timeout_s, services.closing.is_set
        )
        return Response(encoded(events, services.metrics, outlet), headers=HEADERS)


def check_resume(row: RowMapping, resume: Resume) -> None:
    """Refuse an event id that this job can never have sent."""
    claimed = resume.next - 1
    if JobStatus(row["status"]).is_terminal:
        end = end_of(row)
        if resume.gen is not None and resume.gen != end.gen:
            return  # of a log that was given up: the stream says so with `reset`
        if resume.next > end.next:
            raise InvalidEventId(
                f"event id {claimed} was sent; job {row['id']} ended with {end.next} tokens: "
                "send the last id received, or -1"
            )
    elif claimed >= row["sampling"]["max_tokens"]:
        raise InvalidEventId(
            f"event id {claimed} was sent; job {row['id']} makes at most "
            f"{row['sampling']['max_tokens']} tokens: send the last id received, or -1"
        )


def encoded(events: Iterable[list[Event]], metrics: Metrics, outlet: Outlet) -> Iterator[bytes]:
    """Write batches of events as bytes of an event stream; [] becomes a comment line.

    It ends where the client takes nothing any more.
    """
    metrics.stream_opened()
    try:
        yield b"retry: %d\n\n" % RETRY_MS
        for batch in events:
            for piece in _pieces(batch):
                if not outlet.has_room():
                    metrics.streams_cut.inc()
                    return
                yield piece
            for event in batch:
                metrics.events.labels(event.name).inc()
    finally:
        metrics.stream_closed()


def _pieces(batch: list[Event]) -> Iterator[bytes]:
    """Encode a batch as far as it is written: a large one is never in memory as a whole."""
    ready = b"" if batch else b": ping\n\n"
    for event in batch:
        ready += encode_event(event)
        while len(ready) > PIECE_BYTES:
            yield ready[:PIECE_BYTES]
            ready = ready[PIECE_BYTES:]
    if ready:
        yield ready


def encode_event(event: Event) -> bytes:
    """Write one event; msgspec's JSON has no line breaks outside of escapes."""
    head = (
        f"event: {event.name}\n" if event.id is None else f"event: {event.name}\nid: {event.id}\n"
    )
    return head.encode() + b"data: " + msgspec.json.encode(event.data) + b"\n\n"
