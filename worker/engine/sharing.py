"""Prefixes that several sequences have in common: found, joined, offered, and counted once.

A sequence that starts joins the blocks of its prefix that there are: named ones (prefix.py), and
those that the very step it starts in is going to compute for another. A step's keys and values are
all written in a layer before any of its rows reads there, so a prefix is computed once though all
who want it come together, and nobody waits a step for it.

How many blocks running sequences hold together is the sum of their tables less what is counted more
than once. `num_shared` of a slot is the number of its blocks with another owner besides; with
pool.num_shared, the number of such blocks, it bounds what is counted twice in any set of sequences:

    counted twice >= sum of num_shared - pool.num_shared,  and exactly that of all that run

Invariants, asserted by `check()`:
 1. A block is named only when it was submitted to be computed, and its tokens and the one after
    them are received: so no stop token is in it, whose row a device leaves out. A block that a
    plan is going to compute is named once another joins it; from then on nothing leaves the plan.
 2. `num_shared` of a slot counts the blocks of its table that have two owners or more.

Called by: scheduler.py (owner), forecast.py (beside).
"""

from __future__ import annotations

import numpy as np

from headrace.worker.engine.batch import Plan
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.slots import SlotTable


class Sharing:
    """Which blocks of a slot's table are others' as well."""

    def __init__(self, pool: KVPool, table: SlotTable) -> None:
        self._pool = pool
        self._table = table

    def find(self, seq: Sequence, plan: Plan) -> list[int]:
        """Return the blocks that a waiting sequence would join if it started in this plan."""
        block_size = self._pool.block_size
        seq.extend_names(block_size, seq.num_received)
        # At least one token is computed, or there would be no logits.
        names = seq.names[: (seq.num_received - 1) // block_size]
        blocks = self._pool.find(names)
        if len(blocks) < len(names):
            self._note_planned(plan)
            for name in names[len(blocks) :]:
                if (block := plan.planned.get(name)) is None:
                    break
                blocks.append(block)
        return blocks

    def join(self, slot: int, seq: Sequence, plan: Plan) -> None:
        """Begin a slot's table with what there is of its prefix, or will be after this step."""
        pool, table = self._pool, self._table
        if not (blocks := self.find(seq, plan)):
            return
        names = seq.names[: len(blocks)]
        for i in range(pool.match(names), len(blocks)):
            pool.name(blocks[i], names[i])
            plan.is_firm = True
        table.add_blocks(slot, pool.acquire(names))
        table.num_named[slot] = len(blocks)
        table.num_computed[slot] = len(blocks) * pool.block_size
        owners = np.array(pool.count_owners(blocks), np.int32)
        table.num_shared += self._count_held(slice(None), blocks, owners == 2)
        table.num_shared[slot] = np.count_nonzero(owners > 1)

    def leave(self, slot: int) -> None:
        """Note that a slot is about to give up its blocks."""
        table = self._table
        if table.num_shared[slot]:
            blocks = table.table(slot)
            owners = np.array(self._pool.count_owners(blocks), np.int32)
            table.num_shared -= self._count_held(slice(None), blocks, owners == 2)
            table.num_shared[slot] = 0

    def beside(
        self,
        slots: np.ndarray,  # [num_seqs]
        seq: Sequence,  # waiting
        plan: Plan,
    ) -> tuple[np.ndarray, int]:
        """Return what num_shared, of the slots and of the sequence, and of the pool would be."""
        blocks = self.find(seq, plan)
        owners = np.array(self._pool.count_owners(blocks), np.int32)
        is_sole = owners == 1
        counts = self._table.num_shared[slots] + self._count_held(slots, blocks, is_sole)
        num_shared = self._pool.num_shared + np.count_nonzero(is_sole)
        return np.append(counts, np.count_nonzero(owners)), int(num_shared)

    def offer_full_blocks(self, slots: np.ndarray) -> None:
        """Name the blocks of these slots that are full and whose next token has come."""
        table, block_size = self._table, self._pool.block_size
        num_full = self._num_nameable(slots)
        for at in np.flatnonzero(num_full > table.num_named[slots]).tolist():
            slot, end = int(slots[at]), int(num_full[at])
            seq, first = table.sequence(slot), int(table.num_named[slot])
            seq.extend_names(block_size, end * block_size)
            for i, block in enumerate(table.tables[slot, first:end].tolist(), first):
                self._pool.name(block, seq.names[i])
            table.num_named[slot] = end

    def _note_planned(self, plan: Plan) -> None:
        """Bring `plan.planned` up to date: the blocks that its chunks are going to fill."""
        table, block_size = self._table, self._pool.block_size
        for chunk in plan.chunks[plan.num_noted :]:
            seq, first = chunk.seq, int(table.num_named[chunk.slot])
            end = min(chunk.start + chunk.num_tokens, seq.num_received - 1) // block_size
            seq.extend_names(block_size, end * block_size)
            blocks = table.tables[chunk.slot, first:end].tolist()
            plan.planned.update(zip(seq.names[first:end], blocks, strict=True))
        plan.num_noted = len(plan.chunks)

    def _count_held(
        self, slots: np.ndarray | slice, blocks: list[int], is_counted: np.ndarray
    ) -> np.ndarray | int:  # [num_slots], or 0 for all of them
        """Return how many of the counted blocks each slot holds, at the same place of its table."""
        places = np.flatnonzero(is_counted)
        if not len(places):
            return 0
        span = slice(int(places[0]), int(places[-1]) + 1)
        wanted = np.where(is_counted, blocks, -2)[span]
        return np.count_nonzero(self._table.tables[slots, span] == wanted, axis=1)

    def _num_nameable(self, slots: np.ndarray) -> np.ndarray:
        table = self._table
        num_tokens = np.minimum(table.num_computed[slots], table.num_received[slots] - 1)
        return num_tokens // self._pool.block_size

    def check(self) -> None:
        """Assert the invariants."""
        table, used = self._table, self._table.used()
        assert (table.num_named[used] <= self._num_nameable(used)).all()  # 1
        held: set[int] = set()
        for slot in used.tolist():
            blocks = table.table(slot)
            held.update(blocks)
            owners = self._pool.count_owners(blocks)
            assert table.num_shared[slot] == sum(count > 1 for count in owners)  # 2
        num_twice = table.num_shared.sum() - self._pool.num_shared
        assert len(held) == table.num_blocks.sum() - num_twice  # exactly, of all that run
