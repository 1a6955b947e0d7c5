"""The figures of a run: counts, pauses, memory. No judgement; the checker makes that.

A pause is a silence that a fault caused: from the last event of a job before its attempt or its
connection was replaced to the first event after that brings a token or the end. Silence is what a
subscriber sees, so a pause holds all of it: lease, queue, prefill, reconnect.

A silence is the same for a stream whose connections all stayed: from the last news before a
pub/sub connection was killed to the first after it, the step of the model included.

Called by: checker.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.tests.faults import record as rec
from headrace.tests.faults.event_bytes import StreamEvent

NEWS = frozenset({"token", "succeeded", "failed", "canceled", "expired"})


@dataclass(slots=True)
class _Subscriber:
    """What pauses are made of, of one job."""

    at_s: float = 0.0  # last event of any kind that was news of the job
    connection: int = 0
    attempt: int = 0
    is_broken: bool = False  # attempt or connection was replaced since the last token


@dataclass(slots=True)
class Figures:
    num_finished: int = 0
    num_lost: int = 0
    num_missing: int = 0
    num_repeated: int = 0
    num_resets: int = 0
    num_events: int = 0
    num_bytes: int = 0
    pauses_s: list[float] = field(default_factory=list)
    silences_s: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    connections: int = 0
    refused: dict[str, rec.Answer] = field(default_factory=dict)  # key -> its last answer, no job
    memory: dict[tuple[str, int], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    stale_writes: dict[tuple[str, int], float] = field(default_factory=dict)
    streams_open: list[float] = field(default_factory=list)  # at each fault that cuts streams
    _jobs: dict[str, _Subscriber] = field(default_factory=dict)
    _pubsub_killed_at_s: float = 0.0  # the last time

    def take(self, record: rec.Record) -> None:
        match record:
            case rec.Answer():
                self.answers[record.status] += 1
                if record.job is None:
                    self.refused[record.key] = record
                else:
                    self.refused.pop(record.key, None)
            case rec.Opened():
                self.connections += 1
            case rec.Chunk():
                self.num_bytes += len(record.data)
            case rec.Fault():
                self.faults[record.name] += 1
                if "streams_open" in record.detail:
                    self.streams_open.append(float(record.detail["streams_open"]))
                if record.name == "kill-pubsub":
                    self._pubsub_killed_at_s = record.at_s
            case rec.Sample(name="rss_bytes"):
                self.memory[record.process, record.pid].append((record.at_s, record.value))
            case rec.Sample(name="stale_writes"):
                self.stale_writes[record.process, record.pid] = record.value
            case _:
                pass

    def saw(self, chunk: rec.Chunk, event: StreamEvent) -> None:
        """Note an event of a job's stream, and the pause before it if a fault made one."""
        self.num_events += 1
        job = self._jobs.setdefault(chunk.job, _Subscriber(at_s=chunk.at_s))
        if chunk.connection != job.connection:
            job.connection, job.is_broken = chunk.connection, True
        if event.name == "started":
            attempt = int(event.data.get("attempt", 0))
            job.is_broken = job.is_broken or attempt > max(job.attempt, 1)
            if not job.attempt:
                job.at_s = chunk.at_s
            job.attempt = max(job.attempt, attempt)
        elif event.name in NEWS:
            if job.is_broken and job.attempt:
                self.pauses_s.append(chunk.at_s - job.at_s)
            elif job.attempt and job.at_s < self._pubsub_killed_at_s:
                self.silences_s.append(chunk.at_s - job.at_s)
            job.is_broken, job.at_s = False, chunk.at_s

    @property
    def num_stale_writes(self) -> int:
        return int(sum(self.stale_writes.values()))

    @property
    def silence_p99_s(self) -> float:
        return quantile(self.silences_s, 0.99)

    @property
    def resume_p99_s(self) -> float:
        return quantile(self.pauses_s, 0.99)

    def unended_refusals(
        self, asked: Mapping[str, rec.Asked], job_of: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the keys that were asked and never accepted, and the last answer they got."""
        found: dict[str, str] = {}
        for key in asked.keys() - job_of.keys():
            last = self.refused.get(key)
            said = "no answer" if last is None else f"{last.status} {last.error}"
            found[key] = f"asked, never accepted: the last answer was {said}"
        return found

    def summary(self) -> dict[str, Any]:
        return {
            "finished": self.num_finished,
            "lost": self.num_lost,
            "repeated": self.num_repeated,
            "missing": self.num_missing,
            "resets": self.num_resets,
            "pauses": len(self.pauses_s),
            "resume_p50_s": round(quantile(self.pauses_s, 0.5), 3),
            "resume_p99_s": round(self.resume_p99_s, 3),
            "resume_max_s": round(max(self.pauses_s, default=0.0), 3),
            "silences": len(self.silences_s),
            "silence_p50_s": round(quantile(self.silences_s, 0.5), 3),
            "silence_p99_s": round(self.silence_p99_s, 3),
            "silence_max_s": round(max(self.silences_s, default=0.0), 3),
            "streams_open_at_fault_p50": int(quantile(self.streams_open, 0.5)),
            "streams_open_at_fault_max": int(max(self.streams_open, default=0)),
            "stale_writes_refused": self.num_stale_writes,
            "faults_done": dict(self.faults),
            "answers": {str(status): count for status, count in sorted(self.answers.items())},
            "connections": self.connections,
            "events": self.num_events,
            "bytes": self.num_bytes,
            "rss_max_mb": self._peaks(),
            "rss_slope_mb_per_h": self._slopes(),
        }

    def _peaks(self) -> dict[str, float]:
        peaks: dict[str, float] = defaultdict(float)
        for (process, _), samples in self.memory.items():
            peaks[process] = max(peaks[process], *(value / 1e6 for _, value in samples))
        return {name: round(value, 1) for name, value in sorted(peaks.items())}

    def _slopes(self) -> dict[str, float]:
        """Return how memory grew in each process that lived long enough to tell, MB an hour."""
        slopes: dict[str, float] = {}
        for (process, pid), samples in sorted(self.memory.items()):
            settled = samples[len(samples) // 4 :]  # what a start takes is no leak
            if len(settled) >= 12:
                slopes[f"{process}:{pid}"] = round(slope(settled) * 3600 / 1e6, 2)
        return slopes


def quantile(values: list[float], share: float) -> float:
    """Return the value that `share` of all do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def slope(samples: list[tuple[float, float]]) -> float:
    """Return the least-squares slope of (seconds, value), value a second."""
    count = len(samples)
    mean_x = sum(x for x, _ in samples) / count
    mean_y = sum(y for _, y in samples) / count
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0
