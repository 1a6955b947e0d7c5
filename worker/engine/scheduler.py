"""What the next step computes: which sequences, how many tokens of each.

There is no prefill and no decode here, only computed tokens that catch up with known ones. A step
has a budget of tokens. Sequences with one pending token (decodes) are served first, so that a long
prompt never holds a stream up for more than one step; what is left of the budget goes to pending
prompts in chunks, and then to sequences that wait. A waiting sequence is run when the predicted
peak (admission.py) of all that run, with it, fits the pool. Where blocks run out all the same, one
sequence gives up its blocks and waits again: batch class first, then the youngest. Its tokens are
kept and recomputed, mostly from the prefix cache.

Order: interactive before batch, within a class by arrival. A waiting interactive sequence that does
not fit makes running batch ones wait again; a class is never overtaken from behind.

Invariants, asserted by `check()`:
 1. Every sequence is in exactly one of: running, waiting interactive, waiting batch.
 2. A waiting queue is in order of arrival, and holds sequences of its class without blocks.
 3. A plan has each sequence once, at most `max_step_tokens` tokens, decodes before chunks, and
    blocks for all it computes.
 4. While there is any sequence, a plan is not empty: the oldest one can always go on, since each
    fits the pool alone (`add` refuses what does not) and may take the blocks of the others.
 5. Blocks of running sequences are all those that the pool has owners for.

Called by: loop.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from headrace.worker.engine.admission import LengthHistory, predict_peak_tokens
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.sequence import Sequence, SequenceError


@dataclass(slots=True)
class Plan:
    """Tokens to compute in this step, decodes first; each sequence once."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Sequence, int]]:
        yield from ((seq, 1) for seq in self.decodes)
        yield from self.chunks

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + self.num_prefill_tokens

    @property
    def num_prefill_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.chunks)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        if seq.num_pending == 1:
            self.decodes.append(seq)
        else:
            self.chunks.append((seq, num_tokens))

    def drop(self, seq: Sequence) -> None:
        """Take a sequence out that has just been preempted."""
        self.decodes = [kept for kept in self.decodes if kept is not seq]
        self.chunks = [(kept, count) for kept, count in self.chunks if kept is not seq]


class Scheduler:
    """All sequences of the engine, and the pool they share."""

    def __init__(self, pool: KVPool, max_num_seqs: int, max_step_tokens: int) -> None:
        if not 1 <= max_num_seqs <= max_step_tokens:
            raise ValueError(
                f"max_num_seqs is {max_num_seqs}, max_step_tokens {max_step_tokens}: a step must "
                "have room for one token of each sequence; raise max_step_tokens"
            )
        self.pool = pool
        self.lengths = LengthHistory()
        self.num_preempted_total = 0
        self.prefix_hit_tokens_total = 0
        self._max_num_seqs = max_num_seqs
        self._max_step_tokens = max_step_tokens
        self._running: dict[int, Sequence] = {}  # by seq_id
        self._waiting: tuple[deque[Sequence], deque[Sequence]] = (deque(), deque())  # [is_batch]

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting[0]) + len(self._waiting[1])

    @property
    def has_work(self) -> bool:
        return bool(self._running) or self.num_waiting > 0

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
        self._waiting[seq.asked.is_batch].append(seq)

    def find(self, seq_id: int) -> Sequence | None:
        """Return a sequence that has not ended."""
        if seq_id in self._running:
            return self._running[seq_id]
        return next((s for queue in self._waiting for s in queue if s.asked.seq_id == seq_id), None)

    def plan(self) -> Plan:
        """Choose the step's tokens and give them blocks, preempting and admitting as needed."""
        plan = Plan()
        preempted_before = self.num_preempted_total
        ordered = sorted(self._running.values(), key=_seniority)
        for seq in sorted(ordered, key=lambda seq: seq.num_pending > 1):
            self._plan_running(plan, seq)
        if self.num_preempted_total == preempted_before:
            self._plan_waiting(plan)
        return plan

    def advance(self, plan: Plan) -> None:
        """Count the plan's tokens as computed, and offer the blocks they filled to others."""
        for seq, num_tokens in plan:
            seq.num_computed += num_tokens
            self._offer_full_blocks(seq)

    def retire(self, seq: Sequence, *, is_finished: bool) -> None:
        """Forget an ended sequence and release its blocks.

        `is_finished`: it ran to its own end, so its length says something about others'.
        """
        self._drop(seq)
        self.pool.release(seq.table)
        seq.table = []
        if is_finished:
            self.lengths.add(seq.num_output)

    def retire_spoiled(self, seq: Sequence) -> list[int]:
        """Retire a sequence whose computed values are no numbers; return the blocks to clear."""
        self._drop(seq)
        blocks, seq.table = self.pool.discard(seq.table), []
        return blocks

    def room_tokens(self) -> int:
        """Return the pool's tokens less the predicted peak of all that is here; may be negative."""
        here = [*self._running.values(), *self._waiting[0], *self._waiting[1]]
        return self.pool.num_tokens - self._peak_tokens(here)

    def _peak_tokens(self, seqs: Iterable[Sequence]) -> int:
        rows = [(seq.num_known, seq.num_output, seq.max_tokens_left) for seq in seqs]
        known, output, max_left = np.array(rows, np.int64).reshape(-1, 3).T
        remaining = self.lengths.predict_remaining(output, max_left)
        return predict_peak_tokens(known, remaining, self.pool.block_size)

    def _plan_running(self, plan: Plan, seq: Sequence) -> None:
        """Plan a running sequence's next tokens, unless it is preempted or the budget is spent."""
        num_tokens = min(seq.num_pending, self._max_step_tokens - plan.num_tokens)
        while seq.asked.seq_id in self._running and num_tokens > 0:
            if self._give_blocks(seq, num_tokens):
                plan.add(seq, num_tokens)
                return
            self._preempt(max(self._running.values(), key=_seniority), plan)

    def _plan_waiting(self, plan: Plan) -> None:
        """Admit waiting sequences in order while tokens, places and the predicted peak allow."""
        while (left := self._max_step_tokens - plan.num_tokens) > 0 and self.num_waiting:
            seq = (self._waiting[0] or self._waiting[1])[0]
            if not self._make_room(seq, plan):
                return
            self._start(seq)
            num_tokens = min(seq.num_pending, left)
            # The predicted peak holds all known tokens in whole blocks, so these are there.
            given = self._give_blocks(seq, num_tokens)
            assert given, "the predicted peak admitted a sequence that the pool has no block for"
            plan.add(seq, num_tokens)

    def _make_room(self, seq: Sequence, plan: Plan) -> bool:
        """Say whether a waiting sequence may run, once batch ones have made way if it may ask."""
        running = list(self._running.values())
        if self._fits([*running, seq]):
            return True
        juniors = [s for s in running if s.asked.is_batch > seq.asked.is_batch]
        others = [s for s in running if s.asked.is_batch <= seq.asked.is_batch]
        if not juniors or not self._fits([*others, seq]):
            return False
        juniors.sort(key=_seniority)
        while not self._fits([*others, *juniors, seq]):
            self._preempt(juniors.pop(), plan)
        return True

    def _fits(self, seqs: list[Sequence]) -> bool:
        if len(seqs) == 1:
            return True  # each fits alone, however pessimistic the prediction
        return len(seqs) <= self._max_num_seqs and self._peak_tokens(seqs) <= self.pool.num_tokens

    def _start(self, seq: Sequence) -> None:
        """Move the head of its queue to the running ones, with what the prefix cache has of it."""
        self._waiting[seq.asked.is_batch].popleft()
        self._running[seq.asked.seq_id] = seq
        block_size = self.pool.block_size
        seq.extend_names(block_size)
        # At least one token is computed, or there would be no logits.
        usable = seq.names[: (seq.num_known - 1) // block_size]
        seq.table = self.pool.acquire(usable[: self.pool.match(usable)])
        seq.num_named = len(seq.table)
        seq.num_computed = seq.num_named * block_size
        self.prefix_hit_tokens_total += seq.num_computed
        if not seq.was_run:
            seq.cached_tokens = min(seq.num_computed, seq.num_prompt)
            seq.was_run = True

    def _give_blocks(self, seq: Sequence, num_tokens: int) -> bool:
        """Extend the table to hold that many more tokens; False if the pool cannot."""
        needed = self.pool.blocks_for(seq.num_computed + num_tokens) - len(seq.table)
        blocks = self.pool.allocate(max(needed, 0))
        if blocks is None:
            return False
        seq.table += blocks
        return True

    def _preempt(self, seq: Sequence, plan: Plan) -> None:
        """Take a running sequence's blocks; it waits at the head of its class."""
        plan.drop(seq)
        del self._running[seq.asked.seq_id]
        self.pool.release(seq.table)
        seq.table, seq.num_computed, seq.num_named = [], 0, 0
        queue = self._waiting[seq.asked.is_batch]
        at = next((i for i, other in enumerate(queue) if other.arrival > seq.arrival), len(queue))
        queue.insert(at, seq)
        self.num_preempted_total += 1

    def _offer_full_blocks(self, seq: Sequence) -> None:
        num_full = seq.num_computed // self.pool.block_size
        if num_full > seq.num_named:
            seq.extend_names(self.pool.block_size)
            for i in range(seq.num_named, num_full):
                self.pool.name(seq.table[i], seq.names[i])
            seq.num_named = num_full

    def _drop(self, seq: Sequence) -> None:
        if self._running.pop(seq.asked.seq_id, None) is None:
            self._waiting[seq.asked.is_batch].remove(seq)

    def check(self, plan: Plan | None = None) -> None:
        """Assert the invariants; with a plan, between `plan` and `advance`."""
        everything = [*self._running.values(), *self._waiting[0], *self._waiting[1]]
        assert len({id(seq) for seq in everything}) == len(everything)  # 1
        for is_batch, queue in enumerate(self._waiting):  # 2
            arrivals = [seq.arrival for seq in queue]
            assert arrivals == sorted(arrivals)
            assert all(not s.table and s.asked.is_batch == bool(is_batch) for s in queue)
        self.pool.check(seq.table for seq in self._running.values())  # 5
        if plan is None:
            return
        planned = [seq for seq, _ in plan]
        assert len({id(seq) for seq in planned}) == len(planned)  # 3
        assert plan.num_tokens <= self._max_step_tokens  # 3
        for seq, num_tokens in plan:  # 3
            assert 1 <= num_tokens <= seq.num_pending
            assert self.pool.blocks_for(seq.num_computed + num_tokens) <= len(seq.table)
        assert planned or not everything  # 4


def _seniority(seq: Sequence) -> tuple[bool, int]:
    """Order in which sequences are served; the largest is preempted first."""
    return seq.asked.is_batch, seq.arrival
