"""What a worker is to be now, from what two sides want of it: a signal, and an operator's order.

The state is not stored but follows from five facts, each of which one function changes: whether it
must stop (`stop`), the newest order (`obey`, `restarted`), whether an engine serves (`has_engine`,
set by lifecycle), whether engines die before they serve (`is_unsound`) and whether anything is in
hand (`is_empty`, both likewise). A signal comes first, then
quarantine, then a drain.

    starting    -> ready        has_engine: READY has come, the model's card is written, the order
                                is read
    ready       -> starting     has_engine: the engine died
    starting    -> broken       is_unsound: the next one died too, before it had served
    broken      -> ready        has_engine
    any         -> draining     obey: wanted is drained, or a restart was ordered; stop
    draining    -> drained      is_empty: its jobs have ended, or were handed back after drain_s
    draining    -> starting     restarted: all is out of hand, a new engine is started
    any         -> quarantined  obey: what runs is handed back at once
    draining, drained, quarantined -> ready, starting      obey: wanted is serving
    quarantined -> drained      obey: wanted is drained; draining while something is still in hand

Invariants:
1. `may_claim` is false before an order was read, and in every state but starting and ready.
   (Starting gives nothing away: there is no room before an engine serves.)
2. A deadline only comes nearer, until the order that set it is taken back; `stop` is never.
3. An ordered restart is carried out once: those that were ordered before this process read its
   first order are done, because the process itself was started after them.

Called by: lifecycle, in the main thread. Times are monotonic seconds, told by the caller.
"""

from __future__ import annotations

import math

from headrace.contract.orders import Order, Wanted
from headrace.contract.wire import WorkerState


class Duty:
    """The state of one worker."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._order: Order | None = None
        self._num_restarts = 0  # of those ordered, how many are done
        self._is_stopping = False
        self._hand_back_at = math.inf
        self.has_engine = False
        self.is_unsound = False
        self.is_empty = False

    def stop(self, now_s: float) -> None:
        """End the worker: running jobs get `drain_s`; a second call: hand back at once."""
        allowed_s = 0.0 if self._is_stopping else self._drain_s
        self._is_stopping = True
        self._hand_back_at = min(self._hand_back_at, now_s + allowed_s)

    def obey(self, order: Order, now_s: float) -> None:
        """Take the newest order."""
        if self._order is None:
            self._num_restarts = order.num_restarts
        elif order == self._order:
            return
        self._order = order
        if self._is_stopping:
            return
        if order.wanted is Wanted.QUARANTINED:
            self._hand_back_at = now_s
        elif self._must_empty:
            self._hand_back_at = min(self._hand_back_at, now_s + self._drain_s)
        else:
            self._hand_back_at = math.inf

    def restarted(self) -> None:
        """The engine that was to be replaced has ended, with nothing in hand."""
        if self._order is not None:
            self._num_restarts = self._order.num_restarts
        if not self._is_stopping and not self._must_empty:
            self._hand_back_at = math.inf

    @property
    def state(self) -> WorkerState:
        if self._is_stopping:
            return WorkerState.DRAINING
        if self._order is not None and self._order.wanted is Wanted.QUARANTINED:
            return WorkerState.QUARANTINED
        if self._must_empty:
            is_done = self.is_empty and not self.wants_restart
            return WorkerState.DRAINED if is_done else WorkerState.DRAINING
        if self.has_engine and self._order is not None:
            return WorkerState.READY
        return WorkerState.BROKEN if self.is_unsound else WorkerState.STARTING

    @property
    def may_claim(self) -> bool:
        is_barred = self._is_stopping or self._must_empty or self.is_unsound
        return self._order is not None and not is_barred

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def wants_restart(self) -> bool:
        """True while an ordered restart is not done; it waits until nothing is in hand."""
        return self._order is not None and self._order.num_restarts > self._num_restarts

    def is_overdue(self, now_s: float) -> bool:
        """True when what is still in hand must be handed back now."""
        return now_s >= self._hand_back_at

    @property
    def _must_empty(self) -> bool:
        if self._order is None:
            return False
        return self._order.wanted is not Wanted.SERVING or self.wants_restart
