"""A scheduler without a model: its tokens are known beforehand, and so is what the pool must hold.

Each sequence gets the token 1 + its index whenever one is due. With a depth, tokens come that many
steps after they were made, as from a device; one that has made its stop token goes on making what
nobody should read, and its rows are left out.

The pool's content is played too: a place holds the token whose keys and values are there. All rows
of a step are written before any of them looks, as runners do, and each must find the tokens of its
whole sequence in the blocks of its table. So a block that is shared before it is computed, or
after another has overwritten it, is seen.

Called by: conftest.py, test_scheduler.py.
"""

from collections import deque

import numpy as np

from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.outcome import take_results
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence import Sequence

#: what a place holds that was never written, or cleared.
NOTHING = -9


class Played:
    """Scheduler, pool and played model, stepped by the test with every invariant checked."""

    def __init__(
        self, make_admit, num_blocks=16, block_size=4, max_num_seqs=8, max_step_tokens=16, depth=0
    ):
        self.make_admit = make_admit
        self.scheduler = Scheduler(KVPool(num_blocks, block_size), max_num_seqs, max_step_tokens)
        self.depth = depth
        self.in_flight = deque()
        self.num_added = 0
        self.ended = []
        self.told = {}  # seq_id -> tokens, as frames would tell them
        self.content = np.full((num_blocks, block_size), NOTHING)
        self.dead = set()  # (slot, epoch): has made its stop token

    def add(self, num_prompt, max_tokens, first_token=100, num_own=0, num_logged=0, **asked):
        """Add a prompt that counts up from `first_token`, and then has tokens of its own."""
        self.num_added += 1
        prompt = [*range(first_token, first_token + num_prompt)]
        prompt += [1000 * self.num_added + i for i in range(num_own)]
        output = range(1, num_logged + 1)
        admit = self.make_admit(self.num_added, prompt, max_tokens, output, **asked)
        seq = Sequence.from_admit(admit, self.num_added)
        self.scheduler.add(seq)
        self.told[self.num_added] = list(output)
        return seq

    def step(self, stop=lambda num_output: False):
        table = self.scheduler.table
        if (plan := self.scheduler.plan()) is None:
            assert self.in_flight, "there is nothing to wait for"
            while self.in_flight:
                self.collect()
            plan = self.scheduler.plan()
        assert plan is not None
        self.scheduler.check(plan)
        planned = [(table.sequence(slot), 1) for slot in plan.decodes]
        planned += [(chunk.seq, chunk.num_tokens) for chunk in plan.chunks]
        if planned:
            batch = self.scheduler.submit(plan)
            self.compute(batch)
            num_output = (table.num_known - table.num_prompt)[batch.due_slots]
            is_stop = np.array([stop(int(n)) for n in num_output], bool)
            stays = zip(batch.due_slots.tolist(), batch.due_epochs.tolist(), strict=True)
            self.dead |= {stay for stay, stops in zip(stays, is_stop, strict=True) if stops}
            is_finite = np.ones(len(is_stop), bool)
            self.in_flight.append((batch, Sampled(num_output.copy(), is_finite, is_stop)))
        while len(self.in_flight) > self.depth or (self.in_flight and not planned):
            self.collect()
        self.scheduler.check()
        return planned

    def compute(self, batch):
        """Write all rows of a step, then let each look at what it attends to."""
        table, size = batch.table, self.scheduler.pool.block_size
        starts = zip(batch.decode_slots.tolist(), batch.decode_positions.tolist(), strict=True)
        rows = [(slot, start, start + 1) for slot, start in starts]
        rows += [
            (chunk.slot, chunk.start, chunk.start + chunk.num_tokens) for chunk in batch.chunks
        ]
        rows = [row for row in rows if (row[0], int(table.epoch[row[0]])) not in self.dead]
        for slot, start, end in rows:
            at = np.arange(start, end)
            self.content[table.tables[slot, at // size], at % size] = self.tokens_of(slot)[
                start:end
            ]
        for slot, _, end in rows:
            seen = self.content[table.table(slot)].ravel()[:end]
            assert seen.tolist() == self.tokens_of(slot)[:end].tolist()

    def tokens_of(self, slot):
        """Return a slot's known tokens, those included that have not come."""
        seq, positions = self.scheduler.table.sequence(slot), np.arange(self.known_of(slot))
        is_there = positions < seq.num_received
        return np.where(is_there, seq.tokens[: len(positions)], positions - seq.num_prompt + 1)

    def known_of(self, slot):
        return int(self.scheduler.table.num_known[slot])

    def clear(self, blocks):
        """Overwrite spoiled blocks, as a runner does."""
        self.content[blocks] = NOTHING

    def collect(self):
        outcome = take_results(*self.in_flight.popleft())
        for entry in outcome.entries:
            tokens = self.told[int(entry["seq_id"])]
            assert entry["index"] == len(tokens)
            tokens.append(int(entry["token"]))
        self.scheduler.settle(outcome.sound)
        for slot, _ in outcome.ended:
            seq = self.scheduler.table.sequence(slot)
            self.scheduler.retire(seq, is_finished=True)
            self.ended.append(seq)
        self.scheduler.check()

    def finish(self):
        """Step until nothing is left; return what the steps held."""
        steps = []
        while self.scheduler.has_work:
            assert len(steps) < 5000, "the scheduler makes no progress"
            steps.append(self.step())
        return steps
