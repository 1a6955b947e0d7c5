"""How much more the engine can take: what its last step said, less what was sent since.

The engine reports, a step, the tokens its pool has left above the predicted peak of everything
admitted, and how many admissions it had read. Jobs it had not read yet are subtracted here at their
full cost, so two claims in one step cannot count the same room twice.

A sequence whose job has left (canceled, ended by a stop string, handed back) is in the engine for a
step or two more. Until the engine has said its end the worker is not idle: a suspect that is tried
must be alone in the engine, not only in the courier's books.

Owned by: intake (reserve, left, is_on_trial), the loop (all others).
"""

from __future__ import annotations

import threading


class Room:
    """Tokens and sequences left, under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._max_num_seqs = 0
        self._room_tokens = 0
        self._reserved: dict[str, int] = {}  # job -> cost the engine has not accounted for yet
        self._unread: list[str] = []  # of those, jobs sent to the engine, in order
        self._num_sent = 0
        self._jobs: set[str] = set()
        self._leaving: set[int] = set()  # sequence ids
        self._is_trial = False
        self.max_seq_tokens = 0

    def opened(self, room_tokens: int, max_seq_tokens: int, max_num_seqs: int) -> None:
        """A new engine is ready, with an empty pool."""
        with self._lock:
            self._max_num_seqs = max_num_seqs
            self._room_tokens = room_tokens
            self.max_seq_tokens = max_seq_tokens
            self._num_sent = 0
            self._unread.clear()

    def closed(self) -> None:
        """There is no engine: nothing fits."""
        with self._lock:
            self._room_tokens = 0
            self._reserved.clear()
            self._unread.clear()
            self._jobs.clear()
            self._leaving.clear()

    def reserve(self, job: str, cost_tokens: int, *, is_trial: bool = False) -> None:
        """Count a claimed job until the engine does; a suspect on trial keeps others out."""
        with self._lock:
            self._reserved[job] = cost_tokens
            self._jobs.add(job)
            self._is_trial = self._is_trial or is_trial

    def admitted(self, job: str) -> None:
        """The job was sent to the engine."""
        with self._lock:
            self._unread.append(job)
            self._num_sent += 1

    def reported(self, room_tokens: int, num_admits: int) -> bool:
        """A step ended with that much room after reading that many admissions in all.

        True when admissions were read that had not been: the room left may have grown.
        """
        has_read = False
        with self._lock:
            self._room_tokens = room_tokens
            while self._unread and self._num_sent - len(self._unread) < num_admits:
                self._reserved.pop(self._unread.pop(0), None)
                has_read = True
        return has_read

    def release(self, job: str) -> None:
        """The job has left this worker."""
        with self._lock:
            self._jobs.discard(job)
            self._reserved.pop(job, None)

    def leaves(self, seq_id: int) -> None:
        """The engine still has a sequence whose job has left."""
        with self._lock:
            self._leaving.add(seq_id)

    def gone(self, seq_id: int) -> bool:
        """The engine has told a sequence's end; True when it was waited for."""
        with self._lock:
            was_leaving = seq_id in self._leaving
            self._leaving.discard(seq_id)
        return was_leaving

    def left(self) -> tuple[int, int]:
        """Return (tokens, sequences) that may still be claimed."""
        with self._lock:
            tokens = self._room_tokens - sum(self._reserved.values())
            return tokens, self._max_num_seqs - len(self._jobs)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in hand, nor in the engine."""
        with self._lock:
            return not self._jobs and not self._leaving

    @property
    def is_on_trial(self) -> bool:
        """Whether suspects are in hand: nothing may be claimed beside them."""
        with self._lock:
            self._is_trial = self._is_trial and bool(self._jobs or self._leaving)
            return self._is_trial
