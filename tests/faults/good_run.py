"""A run that kept every promise, made by hand, and the ways to spoil it.

The checker's tests take it apart: a checker that finds nothing in a good run and something in every
spoiled one can be believed when it finds nothing in a real one. Streams are written here as bytes,
event by event, so that a spoiler may do to them what a broken gateway could.

Called by: test_checker.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.tests.faults import record as rec
from headrace.worker.engine.stub import stub_token

VOCAB = 49152
PROMPT = [1001, 1002, 1003]


@dataclass
class Event:
    name: str
    data: dict[str, Any]
    id: str | None = None

    def as_bytes(self) -> bytes:
        head = f"event: {self.name}\n" + (f"id: {self.id}\n" if self.id is not None else "")
        return head.encode() + b"data: " + msgspec.json.encode(self.data) + b"\n\n"


@dataclass
class Job:
    """One job of the run, as its client and Postgres saw it; spoilers change it."""

    asked: rec.Asked
    job: str
    row: rec.Row
    #: events by connection
    connections: list[list[Event]]
    answers: list[rec.Answer] = field(default_factory=list)
    extra: list[rec.Record] = field(default_factory=list)

    def tokens(self) -> list[tuple[list[Event], int]]:
        """Return where the token events are: (connection, index in it)."""
        return [
            (events, at)
            for events in self.connections
            for at, event in enumerate(events)
            if event.name == "token"
        ]


@dataclass
class GoodRun:
    jobs: list[Job]
    extra: list[rec.Record] = field(default_factory=list)

    def records(self) -> list[rec.Record]:
        found: list[rec.Record] = []
        for job in self.jobs:
            found += [job.asked, *job.answers]
            for number, events in enumerate(job.connections):
                found.append(rec.Opened(job.job, number, None, 200, 1.0))
                data = b"retry: 1000\n\n" + b"".join(event.as_bytes() for event in events)
                half = len(data) // 2  # cut anywhere: an event may come in two pieces
                found.append(rec.Chunk(job.job, number, 1.0 + number, data[:half]))
                found.append(rec.Chunk(job.job, number, 1.1 + number, data[half:] + b": ping\n\n"))
                found.append(rec.Closed(job.job, number, "end", 1.2 + number))
            found += job.extra
        return [*found, *(job.row for job in self.jobs), *self.extra]


def good_run(seed: int = 1, num_jobs: int = 4) -> GoodRun:
    """Make a run of some jobs, one of them poison, one canceled, the rest as they should be."""
    draw = random.Random(seed)
    jobs = [good_job(draw, number) for number in range(num_jobs)]
    return GoodRun([*jobs, poison_job(draw, num_jobs), canceled_job(draw, num_jobs + 1)])


def good_job(draw: random.Random, number: int) -> Job:
    count = draw.randint(4, 20)
    asked, job = _asked(draw, number, count), f"job_{number:032x}"
    ids = [stub_token(asked.seed, index, VOCAB) for index in range(count)]
    return _job(asked, job, ids, "succeeded", "length", None, draw)


def poison_job(draw: random.Random, number: int) -> Job:
    asked = msgspec.structs.replace(_asked(draw, number, 9), poison="segfault")
    ids = [stub_token(asked.seed, index, VOCAB) for index in range(2)]
    made = _job(asked, f"job_{number:032x}", ids, "failed", "error", "poison", draw)
    attempts = [rec.Attempt(n, "w0", "crashed") for n in (1, 2)] + [rec.Attempt(3, "w0", "failed")]
    made.row = msgspec.structs.replace(
        made.row, attempt=3, attempts=attempts, dead_letter="SIGSEGV", num_crashes=3
    )
    return made


def canceled_job(draw: random.Random, number: int) -> Job:
    asked = _asked(draw, number, 30)
    ids = [stub_token(asked.seed, index, VOCAB) for index in range(5)]
    made = _job(asked, f"job_{number:032x}", ids, "canceled", "canceled", None, draw)
    made.row = msgspec.structs.replace(made.row, is_canceled=True)
    made.extra.append(rec.Canceled(made.job, 202, 1.0))
    return made


def _asked(draw: random.Random, number: int, count: int) -> rec.Asked:
    return rec.Asked(f"key-{number}", "one", draw.randrange(1 << 62), count, list(PROMPT))


def _job(
    asked: rec.Asked,
    job: str,
    ids: list[int],
    status: str,
    reason: str,
    code: str | None,
    draw: random.Random,
) -> Job:
    texts = [f"t{token} " for token in ids]
    ends = [sum(map(len, texts[: at + 1])) for at in range(len(texts))]
    row = rec.Row(
        job=job,
        key=asked.key,
        campaign=asked.key,
        tenant=asked.tenant,
        status=status,
        attempt=2,
        finish_reason=reason,
        error_code=code,
        prompt_tokens=len(PROMPT),
        text="".join(texts),
        token_ids=ids,
        ends=ends,
        gen=0,
        is_canceled=False,
        num_crashes=0,
        dead_letter=None,
        attempts=[rec.Attempt(1, "w0", "handed_back"), rec.Attempt(2, "w1", status)],
    )
    answers = [
        rec.Answer(asked.key, 503, None, 0.4, "database_unavailable"),
        rec.Answer(asked.key, 202, job, 0.5),
    ]
    return Job(asked, job, row, _connections(job, ids, texts, row, draw), answers)


def _connections(
    job: str, ids: list[int], texts: list[str], row: rec.Row, draw: random.Random
) -> list[list[Event]]:
    events = [
        Event("queued", {"job": job}),
        Event("started", {"job": job, "attempt": 1, "worker": "w0"}),
    ]
    at = 0
    while at < len(ids):
        count = draw.randint(1, 3)
        part = ids[at : at + count]
        data = {"job": job, "index": at, "count": len(part), "token_ids": part}
        data["text"] = "".join(texts[at : at + count])
        at += len(part)
        events.append(Event("token", data, str(at - 1)))
    usage = {
        "prompt_tokens": len(PROMPT),
        "cached_tokens": 0,
        "completion_tokens": len(ids),
        "total_tokens": len(PROMPT) + len(ids),
    }
    error = None if row.error_code is None else {"code": row.error_code, "detail": "why"}
    end = {"job": job, "status": row.status, "finish_reason": row.finish_reason}
    last = Event(row.status, end | {"usage": usage, "error": error}, str(len(ids) - 1))
    cut = draw.randint(2, len(events))
    again = Event("started", {"job": job, "attempt": 2, "worker": "w1"})
    return [events[:cut], [again, *events[cut:], last]]
