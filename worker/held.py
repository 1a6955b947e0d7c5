"""Which jobs this worker holds a lease on, shared by its threads.

Owned by: intake (add), endings and the loop (remove), keeper (reads, to renew).
"""

from __future__ import annotations

import threading


class Held:
    """A map job -> attempt under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._attempts: dict[str, int] = {}

    def add(self, job: str, attempt: int) -> None:
        with self._lock:
            self._attempts[job] = attempt

    def remove(self, job: str, attempt: int) -> None:
        """Forget the job, unless a newer attempt of it is held here meanwhile."""
        with self._lock:
            if self._attempts.get(job) == attempt:
                del self._attempts[job]

    def pairs(self) -> list[tuple[str, int]]:
        with self._lock:
            return list(self._attempts.items())

    def __len__(self) -> int:
        return len(self._attempts)
