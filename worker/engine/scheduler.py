"""What the next step computes: which sequences, how many tokens of each.

There is no prefill and no decode here, only computed tokens that catch up with known ones. A step
has a budget of tokens. Sequences with one pending token (decodes) are served first, so that a long
prompt never holds a stream up for more than one step; what is left of the budget goes to pending
prompts in chunks, and then to sequences that wait. While interactive sequences decode, the chunks
of a step are no longer than what keeps it under the target time (cost.py). A waiting sequence is
run when the predicted peak (forecast.py) of all that run, with it, fits the pool. Where blocks run
out all the same, one sequence gives up its blocks and waits again: batch class first, then the
youngest. Its tokens are kept and recomputed, mostly from the prefix cache.

Order: interactive before batch, within a class by arrival. A waiting interactive sequence that does
not fit makes running batch ones wait again; a class is never overtaken from behind.

Counters move when a step is submitted (`submit`), values come later (outcome.py, then `settle`).
So steps are planned ahead of their results: a decode's next token exists though nobody has seen it.
Two things wait for values. Before anything is preempted `plan` says None, and all in flight is
collected: one of the values may be an end that makes room, and others would be made twice. And a
block gets its name when its values have come.

What is planned in a step costs no Python loop over the running sequences: only over those that
start, end, need a block or are in prefill.

Invariants, asserted by `check()`:
 1. Every sequence is in exactly one of: running with a slot, waiting interactive, waiting batch.
 2. A waiting queue is in order of arrival, and holds sequences of its class without blocks.
 3. A plan has each slot once, at most `max_step_tokens` tokens, and blocks for all it computes.
 4. While there is any sequence and no value in flight, a plan is not empty: the oldest one can
    always go on, since each fits the pool alone (`add` refuses what does not) and may take the
    blocks of the others.
 5. Blocks of running sequences are all those that the pool has owners for.

Called by: loop.py.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from headrace.worker.engine.admission import LengthHistory
from headrace.worker.engine.batch import Batch, Plan, build_batch
from headrace.worker.engine.cost import StepCost
from headrace.worker.engine.forecast import Forecast
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.sequence import Sequence, SequenceError
from headrace.worker.engine.sharing import Sharing
from headrace.worker.engine.slots import SlotTable


class ValuesInFlight(Exception):
    """A sequence must be preempted, if the steps in flight bring no end that makes room."""


class Scheduler:
    """All sequences of the engine, and the pool they share."""

    def __init__(
        self,
        pool: KVPool,
        max_num_seqs: int,
        max_step_tokens: int,
        max_seq_tokens: int | None = None,  # None = the whole pool
        target_step_s: float = 0.0,  # 0 = chunks as long as the budget allows
    ) -> None:
        if not 1 <= max_num_seqs <= max_step_tokens or target_step_s < 0:
            raise ValueError(
                f"max_num_seqs is {max_num_seqs}, max_step_tokens {max_step_tokens}, the target of "
                f"a step {target_step_s} s: a step must have room for one token of each sequence "
                "and a target of 0 or more; raise max_step_tokens or target_step_ms"
            )
        self.pool = pool
        self.lengths = LengthHistory()
        self.cost = StepCost()
        self.table = SlotTable(max_num_seqs, max_seq_tokens or pool.num_tokens, pool.block_size)
        self.num_preempted_total = 0
        self.prefix_hit_tokens_total = 0
        self._max_step_tokens = max_step_tokens
        self._target_step_s = target_step_s
        self._sequences: dict[int, Sequence] = {}  # all that have not ended, by seq_id
        self._waiting: tuple[deque[Sequence], deque[Sequence]] = (deque(), deque())  # [is_batch]
        self._started: dict[int, Sequence] = {}  # by slot, since the last batch
        self._sharing = Sharing(pool, self.table)
        self._forecast = Forecast(pool, self.table, self._sharing, self.lengths)

    @property
    def num_running(self) -> int:
        return self.table.num_used

    @property
    def num_waiting(self) -> int:
        return len(self._waiting[0]) + len(self._waiting[1])

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence, or raise SequenceError if the whole pool could not hold it."""
        seq_tokens = seq.num_prompt + seq.asked.max_tokens
        if self.pool.blocks_for(seq_tokens) > self.pool.num_blocks:
            raise SequenceError(
                "never_fits",
                f"prompt has {seq.num_prompt} tokens and max_tokens is {seq.asked.max_tokens}; "
                f"this worker's whole KV pool holds {self.pool.num_tokens}: shorten one of them "
                "or give the worker more memory for KV",
            )
        self._sequences[seq.asked.seq_id] = seq
        self._waiting[seq.asked.is_batch].append(seq)
        self._forecast.note_added()

    def find(self, seq_id: int) -> Sequence | None:
        """Return a sequence that has not ended."""
        return self._sequences.get(seq_id)

    def plan(self) -> Plan | None:
        """Choose the step's tokens and give them blocks, preempting and admitting as needed.

        None: a sequence must be preempted, and values are in flight. Collect them and plan again;
        what was given out until then is kept.
        """
        self._forecast.next_plan()
        decodes = self.table.decodes()
        plan = Plan(decodes, self._max_step_tokens)
        preempted_before = self.num_preempted_total
        try:
            self._plan_decodes(plan)
            prefills = self.table.prefills()
            if len(prefills) or self.num_waiting:
                plan.max_prefill_tokens = self._max_prefill_tokens(plan.decodes)
            self._plan_prefills(plan, prefills)
            if self.num_preempted_total == preempted_before:
                self._plan_waiting(plan)
        except ValuesInFlight:
            return None
        return plan

    def submit(self, plan: Plan) -> Batch:
        """Lay the plan out for the runner, and count its tokens as computed and made."""
        started, self._started = list(self._started.values()), {}
        batch, table = build_batch(self.table, plan.decodes, plan.chunks, started), self.table
        table.num_computed[plan.decodes] += 1
        for chunk in plan.chunks:
            table.num_computed[chunk.slot] += chunk.num_tokens
        table.num_known[batch.due_slots] += 1
        if plan.chunks:
            self._sharing.offer_full_blocks(np.array([chunk.slot for chunk in plan.chunks]))
            self._forecast.note_change()
        return batch

    def settle(self, slots: np.ndarray) -> None:
        """Note that values of these slots came, from numbers; their sequences may have ended."""
        self._sharing.offer_full_blocks(slots)

    def learn(self, batch: Batch, step_s: float) -> None:
        """Note what a step took; nobody asks while chunks have no target."""
        if self._target_step_s:
            prefill_tokens = batch.num_prefill_tokens
            self.cost.learn(batch.num_decodes, prefill_tokens, batch.context_tokens, step_s)

    def retire(self, seq: Sequence, *, is_finished: bool) -> None:
        """Forget an ended sequence and release its blocks.

        `is_finished`: it ran to its own end, so its length says something about others'.
        """
        self.pool.release(self._drop(seq))
        if is_finished:
            self.lengths.add(seq.num_output)

    def retire_spoiled(self, seq: Sequence) -> list[int]:
        """Retire a sequence whose computed values are no numbers; return the blocks to clear."""
        return self.pool.discard(self._drop(seq))

    def room_tokens(self) -> int:
        """Return the pool's tokens less the predicted peak of all that is here; may be negative."""
        return self._forecast.room_tokens(self._waiting)

    def _max_prefill_tokens(self, decodes: np.ndarray) -> int:
        """Return how long the step's chunks may be in all so that streams keep their pace."""
        if not self._target_step_s or self.table.is_batch[decodes].all():
            return self._max_step_tokens
        context_tokens = int(self.table.num_known[decodes].sum())
        return self.cost.chunk_tokens(len(decodes), context_tokens, self._target_step_s)

    def _left_tokens(self, plan: Plan) -> int:
        prefill_tokens = plan.max_prefill_tokens - plan.num_prefill_tokens
        return min(self._max_step_tokens - plan.num_tokens, prefill_tokens)

    def _plan_decodes(self, plan: Plan) -> None:
        """Give a block to those whose next token begins one."""
        table, slots = self.table, plan.decodes
        held_tokens = table.num_blocks[slots] * table.block_size
        needy = slots[table.num_computed[slots] >= held_tokens]
        if len(needy) and (blocks := self.pool.allocate(len(needy))) is not None:
            table.add_block_each(needy, blocks)
            return
        for slot in table.by_seniority(needy):
            self._give_or_preempt(plan, slot, 1)

    def _plan_prefills(self, plan: Plan, slots: np.ndarray) -> None:
        """Plan the next chunks of running sequences, as far as the budget goes."""
        for slot in self.table.by_seniority(slots):
            if (left := self._left_tokens(plan)) <= 0:
                return
            seq = self.table.sequences[slot]
            if seq is not None:  # not preempted for a senior
                num_tokens = min(seq.num_pending, left)
                if self._give_or_preempt(plan, slot, num_tokens):
                    plan.add(seq, num_tokens)

    def _give_or_preempt(self, plan: Plan, slot: int, num_tokens: int) -> bool:
        """Give a slot blocks for its next tokens; False if it was preempted itself."""
        while self.table.sequences[slot] is not None:
            if self._give_blocks(slot, num_tokens):
                return True
            self._preempt(self.table.by_seniority(self.table.used())[-1], plan)
        return False

    def _plan_waiting(self, plan: Plan) -> None:
        """Admit waiting sequences in order while tokens, places and the predicted peak allow."""
        while self.num_waiting and (left := self._left_tokens(plan)) > 0:
            seq = (self._waiting[0] or self._waiting[1])[0]
            if not self._make_room(seq, plan):
                return
            slot = self._start(seq, plan)
            num_tokens = min(seq.num_pending, left)
            # The predicted peak holds all known tokens in whole blocks, so these are there.
            given = self._give_blocks(slot, num_tokens)
            assert given, "the predicted peak admitted a sequence that the pool has no block for"
            plan.add(seq, num_tokens)

    def _make_room(self, seq: Sequence, plan: Plan) -> bool:
        """Say whether a waiting sequence may run, once batch ones have made way if it may ask."""
        forecast = self._forecast
        if forecast.was_refused(seq):
            return False
        used, is_batch = self.table.used(), self.table.is_batch
        if forecast.fits(used, seq, plan):
            return True
        is_junior = is_batch[used] > seq.asked.is_batch
        others, juniors = used[~is_junior], used[is_junior]
        if not len(juniors) or not forecast.fits(others, seq, plan):
            forecast.refuse(seq)
            return False
        if plan.is_firm:
            return False  # in the next step: what is in this one may rely on any chunk of it
        left = self.table.by_seniority(juniors)
        while not forecast.fits(np.array([*others, *left], np.int64), seq, plan):
            self._preempt(left.pop(), plan)
        return True

    def _start(self, seq: Sequence, plan: Plan) -> int:
        """Give the head of its queue a slot, with what there is of its prefix."""
        self._waiting[seq.asked.is_batch].popleft()
        table = self.table
        slot = table.give(seq)
        self._sharing.join(slot, seq, plan)
        self.prefix_hit_tokens_total += seq.num_computed
        if not seq.was_run:
            seq.cached_tokens = min(seq.num_computed, seq.num_prompt)
            seq.was_run = True
        table.cached_tokens[slot] = seq.cached_tokens
        self._started[slot] = seq
        self._forecast.note_change()
        return slot

    def _give_blocks(self, slot: int, num_tokens: int) -> bool:
        """Extend the table to hold that many more tokens; False if the pool cannot."""
        table = self.table
        needed = self.pool.blocks_for(int(table.num_computed[slot]) + num_tokens)
        blocks = self.pool.allocate(max(needed - int(table.num_blocks[slot]), 0))
        if blocks is None:
            return False
        table.add_blocks(slot, blocks)
        return True

    def _preempt(self, slot: int, plan: Plan) -> None:
        """Take a running sequence's blocks; it waits at the head of its class."""
        if self.table.has_values_in_flight:
            raise ValuesInFlight
        seq = self.table.sequence(slot)
        plan.drop(slot)
        self.pool.release(self._leave(slot))
        queue = self._waiting[seq.asked.is_batch]
        at = next((i for i, other in enumerate(queue) if other.arrival > seq.arrival), len(queue))
        queue.insert(at, seq)
        self.num_preempted_total += 1

    def _drop(self, seq: Sequence) -> list[int]:
        """Forget a sequence; return the blocks that it held."""
        del self._sequences[seq.asked.seq_id]
        if seq.is_running:
            return self._leave(seq.slot)
        self._waiting[seq.asked.is_batch].remove(seq)
        self._forecast.note_change()
        return []

    def _leave(self, slot: int) -> list[int]:
        self._started.pop(slot, None)
        self._forecast.note_change()
        self._sharing.leave(slot)
        return self.table.take_back(slot)

    def check(self, plan: Plan | None = None) -> None:
        """Assert the invariants; with a plan, between `plan` and `submit`."""
        table = self.table
        table.check()
        running = [table.sequence(slot) for slot in table.used().tolist()]
        everything = [*running, *self._waiting[0], *self._waiting[1]]
        assert {id(seq) for seq in everything} == {id(seq) for seq in self._sequences.values()}  # 1
        assert len(everything) == len(self._sequences)  # 1
        for is_batch, queue in enumerate(self._waiting):  # 2
            arrivals = [seq.arrival for seq in queue]
            assert arrivals == sorted(arrivals)
            assert not any(s.is_running or s.asked.is_batch != bool(is_batch) for s in queue)
        self.pool.check(seq.table for seq in running)  # 5
        self._sharing.check()
        if plan is None:
            return
        slots = [*plan.decodes.tolist(), *(chunk.slot for chunk in plan.chunks)]
        counts = [1] * len(plan.decodes) + [chunk.num_tokens for chunk in plan.chunks]
        assert len(set(slots)) == len(slots)  # 3
        assert plan.num_tokens == sum(counts) <= self._max_step_tokens  # 3
        for slot, num_tokens in zip(slots, counts, strict=True):  # 3
            assert 1 <= num_tokens <= table.sequence(slot).num_pending
            end = int(table.num_computed[slot]) + num_tokens
            assert self.pool.blocks_for(end) <= table.num_blocks[slot]
        assert slots or not everything or table.has_values_in_flight  # 4
