"""Whether one more sequence fits, and how many tokens are left: predicted peaks of who is here.

A predicted peak (admission.py) costs more than all the rest of a step's plan, so its results are
kept as long as they are good: until somebody comes, starts or leaves, and for some plans after
that. Contexts grow by what the expected rest shrinks, so it hardly moves in between.

Invariants:
 1. An engine in which nothing runs takes any sequence, as each fits the pool alone, however
    pessimistic the prediction.
 2. A sequence is refused again without a look only while nobody came, started or left.
 3. The room left accounts for every sequence added so far.
 4. Blocks that running sequences share count once; so do those that a sequence asked about would
    share with them. In the room left waiting ones count whole: what they will share is not known.

Called by: scheduler.py.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from headrace.worker.engine.admission import LengthHistory, predict_peak_tokens
from headrace.worker.engine.batch import Plan
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.sharing import Sharing
from headrace.worker.engine.slots import SlotTable

#: plans for which a predicted peak is believed while nobody comes or goes.
PEAK_PLANS = 16
#: waiting sequences above which the room left is not worked out at every start and end.
MANY_WAITING = 64


class Forecast:
    """Predicted peaks of running and waiting sequences."""

    def __init__(
        self, pool: KVPool, table: SlotTable, sharing: Sharing, lengths: LengthHistory
    ) -> None:
        self._pool = pool
        self._table = table
        self._sharing = sharing
        self._lengths = lengths
        self._num_plans = 0
        self._num_added = 0
        self._num_changes = 0  # of who is here, and who of them runs
        self._refusal: tuple[int, ...] = ()  # who did not fit, and when that was found
        self._room: tuple[tuple[int, ...], int] = ((), 0)  # when it was found, and tokens

    def next_plan(self) -> None:
        self._num_plans += 1

    def note_added(self) -> None:
        """A sequence came."""
        self._num_added += 1
        self._num_changes += 1

    def note_change(self) -> None:
        """A sequence started, was preempted or ended, or blocks that it may share were computed."""
        self._num_changes += 1

    def was_refused(self, seq: Sequence) -> bool:
        """Say whether a sequence is known not to fit, without looking again."""
        return self._refusal == self._refusal_of(seq)

    def refuse(self, seq: Sequence) -> None:
        """Remember that a sequence does not fit as things are."""
        self._refusal = self._refusal_of(seq)

    def _refusal_of(self, seq: Sequence) -> tuple[int, ...]:
        return seq.asked.seq_id, self._num_changes, self._num_plans // PEAK_PLANS

    def fits(self, slots: np.ndarray, seq: Sequence, plan: Plan) -> bool:
        """Say whether a waiting sequence may run beside those slots, and a slot is left."""
        if not len(slots):
            return True
        if len(slots) == self._table.max_num_seqs:
            return False
        block_size, num_tokens = self._pool.block_size, self._pool.num_tokens
        most_tokens = int(self._table.num_max[slots].sum()) + seq.num_prompt + seq.asked.max_tokens
        most_tokens += (len(slots) + 1) * (block_size - 1)
        if most_tokens <= num_tokens:
            return True  # whatever the prediction, at a fraction of its cost
        shared, num_shared = self._sharing.beside(slots, seq, plan)
        num_twice = max(int(shared.sum()) - num_shared, 0)
        if most_tokens - num_twice * block_size <= num_tokens:
            return True
        return self._peak_tokens(slots, [seq], shared, num_shared) <= num_tokens

    def room_tokens(self, queues: Collection[Collection[Sequence]]) -> int:
        """Return the pool's tokens less the predicted peak of all that is here; may be negative."""
        when, tokens = self._room
        # Each admission is accounted for at once. Starts and ends with many waiting are not: nobody
        # asks for more work then, and the waiting ones must be gone through one by one.
        changes = self._num_changes if sum(map(len, queues)) <= MANY_WAITING else -1
        now = (self._num_added, changes, self._num_plans // PEAK_PLANS)
        if when != now:
            waiting = [seq for queue in queues for seq in queue]
            used = self._table.used()
            shared = self._table.num_shared[used]
            peak_tokens = self._peak_tokens(used, waiting, shared, self._pool.num_shared)
            tokens = self._pool.num_tokens - peak_tokens
            self._room = (now, tokens)
        return tokens

    def _peak_tokens(
        self,
        slots: np.ndarray,
        waiting: list[Sequence],
        shared: np.ndarray,  # [num_slots or more] num_shared of the slots, then of waiting ones
        num_shared: int,
    ) -> int:
        rows = [(seq.num_received, seq.num_output, seq.max_tokens_left) for seq in waiting]
        table, others = self._table, np.array(rows, np.int64).reshape(-1, 3).T
        known = table.num_known[slots]
        output, max_left = known - table.num_prompt[slots], table.num_max[slots] - known
        known, output, max_left = np.concatenate(((known, output, max_left), others), axis=1)
        remaining = self._lengths.predict_remaining(output, max_left)
        block_size = self._pool.block_size
        if not num_shared:
            return predict_peak_tokens(known, remaining, block_size)
        shared = np.pad(shared, (0, len(known) - len(shared)))
        return predict_peak_tokens(known, remaining, block_size, shared, num_shared)
