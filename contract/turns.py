"""Turns: so many at a time, the others in the order in which they came.

The queues of the standard library (and so SQLAlchemy's pool) wake the longest waiting and let
whoever comes by meanwhile be faster: under a burst the first to come are the last to be served, and
run out of time. Here a turn that is given back is handed to the first in line.

Invariants:
1. Never more than `num_turns` are out.
2. First come, first served: nobody overtakes who waits.
3. Who gives up waiting, by time or by an exception, takes no turn with it.

Locks are the standard library's: gunicorn's gevent worker makes them wait for one greenlet.

Called by: database (its pool).
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    def __init__(self, num_turns: int) -> None:
        self._num_free = num_turns
        self._line: deque[threading.Lock] = deque()  # each held; released = it is your turn
        self._lock = threading.Lock()

    def take(self, timeout_s: float) -> bool:
        """Wait for a turn; False when there was none in time."""
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                return True
            mine = threading.Lock()
            mine.acquire()
            self._line.append(mine)
        try:
            return mine.acquire(timeout=timeout_s) or not self._has_left(mine)
        except BaseException:  # a request may be ended while it waits
            if not self._has_left(mine):
                self.give_back()
            raise

    def give_back(self) -> None:
        with self._lock:
            if self._line:
                self._line.popleft().release()
            else:
                self._num_free += 1

    def _has_left(self, mine: threading.Lock) -> bool:
        """Leave the line; False when the turn came in the last moment."""
        with self._lock:
            if mine not in self._line:
                return False
            self._line.remove(mine)
        return True
