"""OpenTelemetry traces of jobs: off unless a collector is named, and then one trace a job.

A client's `traceparent` (W3C Trace Context) is checked here, kept with the job and carried to the
worker. Spans are given with their begin and end once both are known; nothing is wrapped around the
work, and the context of a span never lives in a thread.

    job.accept        gateway: child of the client's span, or the root; its context is kept as the
                      job's, so all that follows are its children
    job.queue | job.lost, job.prepare, job.prefill, job.decode, job.publish
                      worker: one of each an attempt, cut from its Stamps, so they have no gaps

Invariants:
1. Off costs nothing: without a collector `Traces.connect` is None, and neither OpenTelemetry's
   tracing nor its exporter is imported (redis-py imports its metrics wherever it finds them).
2. A malformed `traceparent` is as good as none (its specification says so); it is never an error.
3. A trace that its client does not record (flag 0) is not recorded here, but is passed on.
4. No span holds a prompt, an output or a secret: names, ids and numbers only.
5. A collector that is away loses spans, and delays nothing.

Called by: gateway/services and worker/lifecycle (connect), gateway/jobs, worker/spans.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.contract import log

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

#: version, trace id, span id, flags; a later version may have more after them.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
#: Seconds that spans may take to leave when the process ends.
CLOSE_S = 2.0

Attributes = Mapping[str, str | int | float]


def checked_traceparent(header: str | None) -> str | None:
    """Return the header as version 00 writes it, or None for one that is to be ignored."""
    match = _TRACEPARENT.fullmatch(header.strip(" \t")) if header else None
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    is_known = version != "ff" and not (version == "00" and rest)
    if not is_known or int(trace_id, 16) == 0 or int(span_id, 16) == 0:
        return None
    return f"00-{trace_id}-{span_id}-{int(flags, 16) & 1:02x}"


def unix_offset_ns() -> int:
    """Return what makes Unix nanoseconds of monotonic ones, by the clocks of now."""
    return time.time_ns() - time.monotonic_ns()


@dataclass(frozen=True, slots=True)
class OpenSpan:
    """A span that was begun; `traceparent` is what its children are given."""

    span: Span
    traceparent: str

    def end(self, attributes: Attributes, *, error: str | None = None) -> None:
        """End it now, with what is known of it; an error is its code."""
        from opentelemetry.trace import Status, StatusCode

        self.span.set_attributes(dict(attributes))
        if error is not None:
            self.span.set_status(Status(StatusCode.ERROR, error))
        self.span.end()


class Traces:
    """The way of one process's spans to the collector."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("headrace")

    @classmethod
    def connect(cls, url: str, share: float, process: str, instance: str = "") -> Traces | None:
        """Return the way to a collector (nothing is sent yet); None when none is named."""
        if not url:
            return None
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        about = {"service.name": f"headrace-{process}", "service.instance.id": instance}
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)),
            resource=Resource({name: value for name, value in about.items() if value}),
            shutdown_on_exit=False,
        )
        endpoint = url.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        log.event("traces.sent", process=process)
        return cls(provider)

    def begin(self, name: str, parent: str | None, begin_ns: int) -> OpenSpan:
        """Begin a span under a checked traceparent, or as the root of a new trace."""
        span = self._tracer.start_span(name, _context_of(parent), start_time=begin_ns)
        context = span.get_span_context()
        trace_id, span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        return OpenSpan(span, f"00-{trace_id}-{span_id}-{int(context.trace_flags):02x}")

    def add(
        self,
        name: str,
        parent: str | None,
        begin_ns: int,
        end_ns: int,
        attributes: Attributes,
        *,
        error: str | None = None,
    ) -> None:
        """Add a span whose begin and end are known."""
        from opentelemetry.trace import Status, StatusCode

        span = self._tracer.start_span(
            name, _context_of(parent), attributes=dict(attributes), start_time=begin_ns
        )
        if error is not None:
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(end_time=max(begin_ns, end_ns))

    def close(self) -> None:
        """Send what is left, for at most CLOSE_S: a collector that is away may not hold us up."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def _context_of(parent: str | None) -> Context:
    from opentelemetry.context import Context
    from opentelemetry.trace import (
        NonRecordingSpan,
        SpanContext,
        TraceFlags,
        set_span_in_context,
    )

    if parent is None:
        return Context()
    _, trace_id, span_id, flags = parent.split("-")
    context = SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))
    return set_span_in_context(NonRecordingSpan(context), Context())
