"""What a step has brought: token values into the slots, and the entries of its frame.

A result counts only if its slot's stay is still the one at submit: after a stop token or a cancel
the steps already in flight bring rows that nobody asked for any more.

Invariants:
 1. A slot's values are written in order of position, each once.
 2. A stay gets exactly one reason that is not GOING_ON, with its last entry.
 3. No Python loop runs over the rows; only over those that asked for log-probabilities.

Called by: loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.worker.engine.batch import Batch
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.slots import NOT_RECEIVED
from headrace.worker.frames import ENTRY, Reason

LENGTH, GOING_ON = np.uint8(Reason.LENGTH), np.uint8(Reason.GOING_ON)
Logprobs = tuple[float, np.ndarray, np.ndarray]  # (the chosen's, ids, theirs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Rows that count, in order of the batch's due slots."""

    slots: np.ndarray  # [num_rows]
    entries: np.ndarray  # [num_rows] of frames.ENTRY
    logprobs: list[Logprobs]  # of the entries that say they have them, in order

    @property
    def sound(self) -> np.ndarray:
        """Slots whose values are numbers."""
        return self.slots[self.entries["reason"] != Reason.FAILED]

    @property
    def ended(self) -> list[tuple[int, Reason]]:
        rows = np.flatnonzero(self.entries["reason"])
        reasons = self.entries["reason"][rows].tolist()
        return list(zip(self.slots[rows].tolist(), map(Reason, reasons), strict=True))


def take_results(batch: Batch, sampled: Sampled) -> Outcome:
    """Write a step's values into the slots whose stay goes on, and say what to tell of them."""
    table, slots = batch.table, batch.due_slots
    rows = np.flatnonzero(table.epoch[slots] == batch.due_epochs)
    tokens, is_finite, is_stop = sampled.tokens, sampled.is_finite, sampled.is_stop
    if len(rows) < len(slots):
        slots, tokens = slots[rows], tokens[rows]
        is_finite, is_stop = is_finite[rows], is_stop[rows]
    index = table.num_received[slots]
    reasons = np.where(index + 1 == table.num_max[slots], LENGTH, GOING_ON)
    reasons[is_stop] = Reason.STOP_TOKEN
    if not is_finite.all():
        tokens = np.where(is_finite, tokens, NOT_RECEIVED)
        reasons[~is_finite] = Reason.FAILED
    table.tokens[slots, index] = tokens
    table.num_received[slots] = index + is_finite
    entries = np.zeros(len(rows), ENTRY)
    entries["seq_id"] = table.seq_id[slots]
    entries["token"] = tokens
    entries["index"] = index - table.num_prompt[slots]
    entries["cached_tokens"] = table.cached_tokens[slots]
    entries["reason"] = reasons
    entries["num_logprobs"] = -1
    logprobs = _logprobs(entries, rows, sampled)
    return Outcome(slots, entries, logprobs)


def end_entries(ends: list[tuple[Sequence, Reason]]) -> np.ndarray:  # [num_ends] of frames.ENTRY
    """Lay out the entries of ends that came without a token."""
    rows = [
        (seq.asked.seq_id, -1, seq.num_output, seq.cached_tokens, int(reason), -1, 0)
        for seq, reason in ends
    ]
    return np.array(rows, ENTRY)


def _logprobs(
    entries: np.ndarray,  # [num_rows] of ENTRY, changed in place
    rows: np.ndarray,  # [num_rows] of the step, ascending
    sampled: Sampled,
) -> list[Logprobs]:
    """Say in the entries which have log-probabilities, and return these in order."""
    found: list[Logprobs] = []
    if not sampled.logprobs:
        return found
    for at, row in enumerate(rows.tolist()):
        values = sampled.logprobs.get(row)
        if values is not None and entries["token"][at] >= 0:
            entries["num_logprobs"][at] = len(values[1])
            found.append(values)
    return found
