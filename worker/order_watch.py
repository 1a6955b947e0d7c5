"""Read this worker's order once a second, apart from everything that must not wait.

Invariants:
1. Postgres being away, or a row this version cannot read, keeps the last order: what runs goes on
   as it was told. Before the first order was read there is none, and the worker claims nothing: one
   in quarantine must not serve because nobody could be asked.
2. Only this thread waits for the row; the loop is woken when it changed.

Called by: lifecycle (as a thread of its own; reads `newest`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError

from headrace.contract import log
from headrace.contract.errors import Unavailable
from headrace.contract.orders import Order, WorkerOrders

#: Seconds between two looks: an order is obeyed within it.
POLL_S = 1.0


class OrderWatch:
    """The thread that knows what the worker is wanted to be."""

    def __init__(self, worker: str, orders: WorkerOrders, wake: Callable[[], None]) -> None:
        self._worker = worker
        self._orders = orders
        self._wake = wake
        self._stopped = threading.Event()
        self._is_failing = False
        self.newest: Order | None = None  # None: not read yet

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopped.is_set():
            self.look()
            self._stopped.wait(POLL_S)

    def look(self) -> None:
        """Read the order; wake the loop if it is another than before."""
        try:
            order = self._orders.of(self._worker)
        except (Unavailable, SQLAlchemyError, ValueError) as error:
            if not self._is_failing:
                why = type(error).__name__  # the text of an error of SQL may hold anything
                log.event(
                    "order.unread", level=logging.WARNING, worker=self._worker, why=why,
                    wanted=self.newest and self.newest.wanted,
                )  # fmt: skip
            self._is_failing = True
            return
        self._is_failing = False
        if order == self.newest:
            return
        self.newest = order
        if order.by:
            log.event(
                "order.read", worker=self._worker, wanted=order.wanted,
                restarts=order.num_restarts, by=order.by,
            )  # fmt: skip
        self._wake()
