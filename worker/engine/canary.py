"""The job an engine gives itself before it says READY: one that cannot do it serves nobody.

A few tokens go the whole way, from an admission to the frames of its steps, through an Engine of
their own on the same runner. So an engine that dies of everything dies here, with no job in hand:
its worker is given none (engine_watch), and nobody innocent is blamed (crashes.py, invariant 1).

Invariants:
1. Nothing of it is left: pool, scheduler and counts are thrown away; what the runner keeps by slot
   and block is written anew for the next who has them.
2. It ends: a step that does not come back ends the process, with its stacks on stderr.

Called by: loop.py, before READY.
"""

from __future__ import annotations

import faulthandler
import socket
import sys
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np

from headrace.worker import frames
from headrace.worker.frames import Admit, Reason, SamplingParams, StepFrame

#: Tokens of its prompt, and of its answer, at most: a prefill and a decode.
NUM_PROMPT, NUM_OUTPUT = 8, 2
#: Seconds it may take: kernels may be compiled for it.
LIMIT_S = 120.0


class Engine(Protocol):
    """What of loop.Engine a job of its own needs."""

    max_seq_tokens: int

    @property
    def has_work(self) -> bool: ...

    def admit(self, asked: Admit) -> None: ...

    def step(self) -> None: ...


class CanaryDied(RuntimeError):
    """The engine runs, and its own job did not come out as it must."""


class _Kept:
    """In the place of the socket to the courier: keeps the frames."""

    def __init__(self) -> None:
        self.data = bytearray()

    def send(self, data: bytes, flags: int = 0) -> int:
        self.data += data
        return len(data)


def prove(make: Callable[[socket.socket], Engine], vocab_size: int) -> None:
    """Run one short job to its end; raise what the engine raises, or CanaryDied."""
    kept = _Kept()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        engine = make(cast("socket.socket", kept))
        asked = _asked(engine.max_seq_tokens, vocab_size)
        engine.admit(asked)
        while engine.has_work:
            engine.step()
    finally:
        faulthandler.cancel_dump_traceback_later()
    _check(bytes(kept.data), asked.max_tokens)


def _asked(max_seq_tokens: int, vocab_size: int) -> Admit:
    num_output = min(NUM_OUTPUT, max_seq_tokens - 1)
    num_prompt = min(NUM_PROMPT, max_seq_tokens - num_output)
    return Admit(
        seq_id=1,
        prompt=(np.arange(1, num_prompt + 1, dtype="<i4") % vocab_size).tobytes(),
        output=b"",
        params=SamplingParams(temperature=0.0, seed=1),
        max_tokens=num_output,
    )


def _check(sent: bytes, num_output: int) -> None:
    reader, entries = frames.FrameReader(), list[tuple[int, ...]]()
    reader.feed(sent)
    for kind, payload in reader.frames():
        notice = frames.unpack(kind, payload)
        if isinstance(notice, frames.Failure):
            raise CanaryDied(f"the engine's own job failed: {notice.text}")
        if isinstance(notice, StepFrame):
            entries += notice.entries.tolist()
    reasons = [Reason(entry[4]) for entry in entries]
    if reasons != [Reason.GOING_ON] * (num_output - 1) + [Reason.LENGTH]:
        found = " ".join(reason.name for reason in reasons)
        raise CanaryDied(f"the engine's own job of {num_output} tokens came out as: {found}")
