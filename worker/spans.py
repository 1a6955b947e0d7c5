"""An attempt as spans: one for each part of its time, children of the request that made the job.

They are sent when the attempt is over (its result committed, or handed back). An attempt that died
sends none; the next one's `job.lost` stands for its time, so the parts of all attempts add up.

Called by: endings and hand_back.
"""

from __future__ import annotations

from headrace.contract.tracing import Traces, unix_offset_ns
from headrace.worker.running import RunningJob


class JobSpans:
    """The spans of one worker's jobs; without a collector nothing at all."""

    def __init__(self, traces: Traces | None, model: str, worker: str) -> None:
        self._traces = traces
        self._about = {"headrace.model": model, "headrace.worker": worker}

    def ended(self, job: RunningJob, outcome: str, error: str | None = None) -> None:
        """Tell of an attempt that is over; `outcome` is the job's status, or handed_back."""
        parent = job.spec.traceparent
        if self._traces is None or parent is None:
            return
        about = self._about | {"headrace.job": job.job, "headrace.attempt": job.attempt}
        num_resumed = sum(len(chunk.ids) for chunk in job.resumed)
        told: dict[str, dict[str, str | int]] = {
            "prefill": {"headrace.prompt_tokens": len(job.prompt_ids)},
            "decode": {"headrace.output_tokens": len(job.ids) - num_resumed},
            "publish": {"headrace.outcome": outcome},
        }
        offset_ns = unix_offset_ns()  # one for all: between two parts there is no gap
        for part, begin, end in job.stamps.points():
            self._traces.add(
                f"job.{part}",
                parent,
                offset_ns + int(begin * 1e9),
                offset_ns + int(end * 1e9),
                about | told.get(part, {}),
                error=error if part == "publish" else None,
            )
