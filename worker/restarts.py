"""When a dead engine is started again, and when its worker gives up.

An engine may die of what the next one will not meet: then it is started again, after a pause that
doubles. A GPU that is lost again, or has no room for the model any more, would kill every engine
and take each claimed job down with it: the second such death in a row ends the worker, which hands
its jobs back first, so that others run them and an operator sees a process that has ended.

    died -> waits     any other death, or the first of a hopeless kind     [died: True]
    died -> gives up  the second hopeless one                              [died: False]

A death that is blamed on what ran is of the first kind, whatever its code, and its pause stays the
shortest: what brought it about is put under suspicion and does not come again and again.

Invariants:
1. Pauses and hopeless deaths are counted anew once an engine has served for HEALTHY_S. Loading does
   not count: a model that takes minutes to load must not hide a GPU that fails at its first step.
2. Deaths of other kinds neither count as hopeless nor make the count begin anew.

Called by: lifecycle, in the main thread.
"""

from __future__ import annotations

#: Seconds before a dead engine is started again: doubled each time, from the first to the second.
PAUSES_S = (0.5, 15.0)
#: Seconds of service after which an engine counts as healthy.
HEALTHY_S = 60.0
#: codes of Fatal (worker/engine/loop.py) that another start is unlikely to cure.
HOPELESS = frozenset({"device_lost", "out_of_memory", "unsupported_model", "bad_config"})
#: hopeless deaths in a row that end the worker; the first may be a passing fault of the device.
MAX_HOPELESS = 2


class Restarts:
    """Counts an engine's deaths; the caller tells the time (monotonic seconds)."""

    def __init__(self) -> None:
        self.num_deaths = 0
        self.next_at = 0.0  # before this no engine is started
        self._num_hopeless = 0
        self._pause_s = PAUSES_S[0]

    def died(
        self, code: str | None, served_s: float, now_s: float, *, is_of_jobs: bool = False
    ) -> bool:
        """Count a death; False when the worker must give up.

        Args:
            code: of the engine's last words; None when it left none.
            served_s: since it was ready; 0 if it never was.
            is_of_jobs: what ran is to blame, not the engine.
        """
        if served_s >= HEALTHY_S:
            self._num_hopeless, self._pause_s = 0, PAUSES_S[0]
        self.num_deaths += 1
        if is_of_jobs:
            self.next_at = now_s + PAUSES_S[0]
            return True
        self._num_hopeless += code in HOPELESS
        self.next_at = now_s + self._pause_s
        self._pause_s = min(self._pause_s * 2, PAUSES_S[1])
        return self._num_hopeless < MAX_HOPELESS
