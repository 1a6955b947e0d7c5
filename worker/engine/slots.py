"""Slots: the places of running sequences, and their counters as arrays.

A sequence gets a slot when it starts and keeps it until it ends or is preempted. Everything that a
step needs to know of all running sequences stands here by slot, so that planning a step, taking its
results and telling of them are a handful of array operations, however many run. A device runner
keeps its own state by the same slots.

Of a sequence's tokens, `num_known` exist; `num_received` of them have come to the host, and the
values of the others are on the device in steps in flight; `num_computed` were submitted to have
their keys and values computed. Without steps in flight the first two are equal.

    free -> used  [give]        used -> free  [take_back]

Invariants, asserted by `check()`:
 1. A slot is used by one sequence or free; a free one's counters are 0 and its table is all -1.
 2. num_received <= num_known <= num_max, and num_computed < num_known.
 3. While a sequence has a slot its counters and token values are here and nowhere else:
    `Sequence.tokens` is a view of the slot's row.
 4. An epoch never comes back: (slot, epoch) names one stay of one sequence.
 5. A row of `tables` holds num_blocks blocks, enough for num_computed tokens, then only -1.

Called by: scheduler.py (owner), batch.py, flat.py and outcome.py; read by runners.
"""

from __future__ import annotations

import numpy as np

from headrace.worker.engine.sequence import Place, Sequence

#: what a token's place holds while its value has not come: no vocabulary has it.
NOT_RECEIVED = -1


class SlotTable:
    """Arrays by slot; [max_num_seqs] each where no shape is given."""

    def __init__(self, max_num_seqs: int, max_seq_tokens: int, block_size: int) -> None:
        def counters() -> np.ndarray:
            return np.zeros(max_num_seqs, np.int32)

        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        self.sequences: list[Sequence | None] = [None] * max_num_seqs
        self.epoch = np.zeros(max_num_seqs, np.int64)  # stays ended so far
        self.seq_id = np.zeros(max_num_seqs, np.uint64)
        self.arrival = np.zeros(max_num_seqs, np.int64)
        self.is_batch = np.zeros(max_num_seqs, bool)
        self.num_prompt = counters()
        self.num_known = counters()  # tokens that exist, those in flight included
        self.num_received = counters()  # of these, values that the host has
        self.num_computed = counters()  # submitted to be computed
        self.num_max = counters()  # prompt + max_tokens; 0 = the slot is free
        self.num_blocks = counters()  # held
        self.num_sent_blocks = counters()  # of these, told to the runner in a batch
        self.num_named = counters()  # leading blocks offered to the prefix index
        self.num_shared = counters()  # blocks that have another owner besides
        self.cached_tokens = counters()
        max_blocks = -(-max_seq_tokens // block_size)
        self.tables = np.full((max_num_seqs, _spread(max_blocks)), -1, np.int32)[:, :max_blocks]
        # Memory comes with the first write, so long rows that nobody needs cost nothing.
        self.tokens = np.zeros((max_num_seqs, _spread(max_seq_tokens)), np.int32)
        self._free = list(range(max_num_seqs - 1, -1, -1))

    @property
    def num_used(self) -> int:
        return self.max_num_seqs - len(self._free)

    @property
    def has_values_in_flight(self) -> bool:
        return bool((self.num_known != self.num_received).any())

    def used(self) -> np.ndarray:
        """Return the used slots, in order."""
        return np.flatnonzero(self.num_max)

    def decodes(self) -> np.ndarray:
        """Return the slots with one token to compute and output left to make.

        Those that share a prefix stand together: what a device reads for one is in its cache for
        the next.
        """
        is_decode = (self.num_known - self.num_computed == 1) & (self.num_known < self.num_max)
        slots = np.flatnonzero(is_decode).astype(np.int32)
        return slots[np.argsort(self.tables[slots, 0], kind="stable")]

    def prefills(self) -> np.ndarray:
        """Return the slots with more than one token to compute: all their values are known."""
        return np.flatnonzero(self.num_known - self.num_computed > 1)

    def by_seniority(self, slots: np.ndarray) -> list[int]:
        """Order slots as they are served; the last one is preempted first."""
        if len(slots) > 1:
            slots = slots[np.lexsort((self.arrival[slots], self.is_batch[slots]))]
        return slots.tolist()

    def sequence(self, slot: int) -> Sequence:
        """Return who uses a used slot."""
        seq = self.sequences[slot]
        assert seq is not None, f"slot {slot} is free"
        return seq

    def give(self, seq: Sequence) -> int:
        """Let a waiting sequence in; there must be a free slot."""
        slot, num_received = self._free.pop(), seq.num_received
        num_max = seq.num_prompt + seq.asked.max_tokens
        row = self.tokens[slot, :num_max]
        row[:num_received] = seq.tokens[:num_received]
        row[num_received:] = NOT_RECEIVED
        self.sequences[slot] = seq
        self.seq_id[slot], self.arrival[slot] = seq.asked.seq_id, seq.arrival
        self.is_batch[slot] = seq.asked.is_batch
        self.num_prompt[slot], self.num_max[slot] = seq.num_prompt, num_max
        self.num_known[slot] = self.num_received[slot] = num_received
        at = slice(slot, slot + 1)
        place = Place(
            slot=slot,
            num_known=self.num_known[at],
            num_received=self.num_received[at],
            num_computed=self.num_computed[at],
            num_blocks=self.num_blocks[at],
            table=self.tables[slot],
        )
        seq.move_in(place, row)
        return slot

    def take_back(self, slot: int) -> list[int]:
        """Free a slot, leaving the received tokens with the sequence; return the blocks it held."""
        seq, table = self.sequence(slot), self.table(slot)
        seq.move_out()
        self.sequences[slot] = None
        self.epoch[slot] += 1
        self.tables[slot, : len(table)] = -1
        for counter in self._counters():
            counter[slot] = 0
        self._free.append(slot)
        return table

    def table(self, slot: int) -> list[int]:
        """Return the blocks a slot holds, in order of position."""
        return self.tables[slot, : self.num_blocks[slot]].tolist()

    def add_blocks(self, slot: int, blocks: list[int]) -> None:
        """Append to a slot's table."""
        held = self.num_blocks[slot]
        self.tables[slot, held : held + len(blocks)] = blocks
        self.num_blocks[slot] += len(blocks)

    def add_block_each(self, slots: np.ndarray, blocks: list[int]) -> None:
        """Append one block to each slot's table."""
        self.tables[slots, self.num_blocks[slots]] = blocks
        self.num_blocks[slots] += 1

    def take_new_blocks(self) -> np.ndarray:  # [num_new, 3] int32: slot, index in table, block
        """Return what has been added to tables since the last call."""
        slots = np.flatnonzero(self.num_blocks != self.num_sent_blocks)
        if not len(slots):
            return np.empty((0, 3), np.int32)
        sent, counts = self.num_sent_blocks[slots], (self.num_blocks - self.num_sent_blocks)[slots]
        starts = np.cumsum(counts) - counts
        indices = np.arange(counts.sum()) + np.repeat(sent - starts, counts)
        owners = np.repeat(slots, counts)
        self.num_sent_blocks[slots] = self.num_blocks[slots]
        return np.stack((owners, indices, self.tables[owners, indices]), 1).astype(np.int32)

    def _counters(self) -> list[np.ndarray]:
        return [
            *(self.num_prompt, self.num_known, self.num_received, self.num_computed, self.num_max),
            *(self.num_blocks, self.num_sent_blocks, self.num_named, self.num_shared),
            self.cached_tokens,
        ]

    def check(self) -> None:
        """Assert the invariants."""
        free = np.array(self._free, np.int64)
        assert len(set(self._free)) == len(self._free)  # 1
        assert not any(counter[free].any() for counter in self._counters())  # 1
        assert (self.tables[free] == -1).all()  # 1
        assert all(self.sequences[slot] is None for slot in self._free)  # 1
        used = self.used()
        assert len(used) == self.num_used  # 1
        assert (self.num_received <= self.num_known).all()  # 2
        assert (self.num_known <= self.num_max).all()  # 2
        assert (self.num_computed[used] < self.num_known[used]).all()  # 2
        for slot in used.tolist():
            seq, num_blocks = self.sequence(slot), self.num_blocks[slot]
            assert seq.slot == slot  # 3
            assert np.shares_memory(seq.tokens, self.tokens[slot])  # 3
            assert (seq.tokens[: seq.num_received] >= 0).all()  # 3
            assert (seq.tokens[seq.num_received :] == NOT_RECEIVED).all()  # 3
            assert num_blocks * self.block_size >= self.num_computed[slot]  # 5
            assert (self.tables[slot, :num_blocks] >= 0).all()  # 5
            assert (self.tables[slot, num_blocks:] == -1).all()  # 5


def _spread(width: int) -> int:
    """Return a row length of int32 that makes the same column of all rows fall in other sets.

    A step writes one value of each row; with rows of a round length these would all be in the same
    set of the processor's cache: an odd number of lines of 64 bytes avoids it.
    """
    num_lines = -(-width // 16)
    return (num_lines | 1) * 16
