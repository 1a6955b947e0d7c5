"""One step as it is planned, and as the runner is told of it: decodes, chunks, what has changed.

Decodes are slots whose last known token is to be computed; its value may not have come to the host
yet, the device has it. Chunks are runs of known tokens. A device runner keeps tables by slot and is
sent only what is new: who got a slot, and which blocks. A CPU runner reads everything from the
SlotTable (flat.py).

A decode's token is the last known one of its slot: the one sampled for it last, or the last of
those it started with (a prefix hit or a chunk may leave just one).

Invariants:
 1. A slot stands at most once among decodes and chunks.
 2. `due_slots` are all decodes and then the chunks that end with the last known token, in order.
 3. Applied in order, `new_blocks` of all batches give a runner the tables of the SlotTable;
    `started` come before their blocks and mean that the slot's state of before is void.
 4. Batches are built in the order in which they are submitted.
 5. Nothing is taken out of a firm plan.

Called by: scheduler.py (plan, build), runners (readers), outcome.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.slots import SlotTable


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known tokens of one sequence, computed in one step."""

    seq: Sequence
    slot: int
    start: int  # position of the first
    num_tokens: int
    is_due: bool  # the last one is the last known token: the next one is sampled from it


@dataclass(slots=True)
class Plan:
    """Tokens to compute in this step, each slot once."""

    decodes: np.ndarray  # [num_decodes] int32 slots
    max_prefill_tokens: int
    chunks: list[Chunk] = field(default_factory=list)
    num_prefill_tokens: int = 0
    planned: dict[bytes, int] = field(default_factory=dict)  # by name, the blocks it will fill
    num_noted: int = 0  # chunks whose blocks are in `planned`
    is_firm: bool = False  # a sequence of it reads what another's chunk of it will write

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + self.num_prefill_tokens

    def add(self, seq: Sequence, num_tokens: int) -> None:
        if seq.num_pending == 1:
            self.decodes = np.append(self.decodes, np.int32(seq.slot))
        else:
            is_due = num_tokens == seq.num_pending
            self.chunks.append(Chunk(seq, seq.slot, seq.num_computed, num_tokens, is_due))
            self.num_prefill_tokens += num_tokens

    def drop(self, slot: int) -> None:
        """Take a slot out whose sequence is being preempted."""
        assert not self.is_firm, "a chunk is taken out that another sequence may rely on"
        self.decodes = self.decodes[self.decodes != slot]
        self.chunks = [chunk for chunk in self.chunks if chunk.slot != slot]
        self.num_prefill_tokens = sum(chunk.num_tokens for chunk in self.chunks)
        self.planned.clear()
        self.num_noted = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One step; arrays are int32 and the runner's to keep."""

    table: SlotTable
    decode_slots: np.ndarray  # [num_decodes]
    decode_positions: np.ndarray  # [num_decodes] index of the row's token in its sequence
    chunks: list[Chunk]
    started: list[Sequence]  # got a slot since the last batch
    new_blocks: np.ndarray  # [num_new, 3] slot, index in its table, block; those of started too
    due_slots: np.ndarray  # [num_due] get their next token from this step
    due_epochs: np.ndarray  # [num_due] int64, of the slots when this was built
    context_tokens: int  # read from the cache by all rows' sequences

    @property
    def num_decodes(self) -> int:
        return len(self.decode_slots)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


def build_batch(
    table: SlotTable,
    decode_slots: np.ndarray,  # [num_decodes] int32
    chunks: list[Chunk],
    started: list[Sequence],
) -> Batch:
    """Lay a plan out, and take what is new in the table with it."""
    positions = table.num_computed[decode_slots]
    due_chunks = [chunk.slot for chunk in chunks if chunk.is_due]
    due_slots = np.concatenate((decode_slots, np.array(due_chunks, np.int32)))
    return Batch(
        table=table,
        decode_slots=decode_slots,
        decode_positions=positions,
        chunks=chunks,
        started=started,
        new_blocks=table.take_new_blocks(),
        due_slots=due_slots,
        due_epochs=table.epoch[due_slots],
        context_tokens=int(positions.sum())
        + len(positions)
        + sum(chunk.start + chunk.num_tokens for chunk in chunks),
    )
