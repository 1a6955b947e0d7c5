"""Whether a worker takes jobs and gets on with them, for orchestrators: /readyz and /healthz.

    /healthz             200 while the process answers
    /readyz              200 in state ready with an engine that steps, else 503
    /readyz?draining=ok  the same, and 200 while it drains or is set aside in good order: for
                         whoever restarts what is not healthy, which must not cut a drain short

An engine with work that made no step for STUCK_SHARE of step_timeout_s counts as standing still:
before it is ended, so that the outside can see it. The last step's age is told whatever it is.

Called by: exposition.serve, in its threads; parts makes it. Each fact is one read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.contract.wire import WorkerState

#: Share of step_timeout_s after which an engine with work counts as standing still.
STUCK_SHARE = 0.5
#: States in which a worker takes nothing because it was told so.
AT_REST = (WorkerState.DRAINING, WorkerState.DRAINED, WorkerState.QUARANTINED)


class WorkerHealth:
    """The checks of one worker."""

    def __init__(
        self,
        *,
        worker: str,
        model: str,
        step_timeout_s: float,
        state: Callable[[], WorkerState],
        has_engine: Callable[[], bool],
        step_age_s: Callable[[], float],  # 0 while there is no work
        num_held: Callable[[], int],
    ) -> None:
        self._about = {"worker": worker, "model": model}
        self._stuck_s = step_timeout_s * STUCK_SHARE
        self._state = state
        self._has_engine = has_engine
        self._step_age_s = step_age_s
        self._num_held = num_held

    def answer(self, path: str, query: str) -> tuple[int, dict[str, Any]] | None:
        """Return status and body of a check; None for a path that is none."""
        if path == "/healthz":
            return 200, {"status": "alive"}
        if path != "/readyz":
            return None
        state, age_s = self._state(), self._step_age_s()
        is_stuck, has_engine = age_s > self._stuck_s, self._has_engine()
        is_ready = state is WorkerState.READY and has_engine and not is_stuck
        is_resting = state in AT_REST and not is_stuck and query == "draining=ok"
        body = {
            "status": "ready" if is_ready else "stuck" if is_stuck else str(state),
            **self._about,
            "state": str(state),
            "has_engine": has_engine,
            "step_age_s": round(age_s, 3),
            "num_held": self._num_held(),
        }
        return (200 if is_ready or is_resting else 503), body
