"""Works off the replays of dead letters, each at its own rate; a second process takes turns.

Whoever ordered a replay sees its progress in its row (gateway/dashboard/dead_letters); here is only
the hand that does it. The new jobs are enqueued by the relay, from their outbox rows.

Called by: gateway/tasks (the task `replay`, every second); never inference.
"""

from __future__ import annotations

from headrace.contract import log
from headrace.contract.replays import Replays


class ReplayRunner:
    """One step of every replay that has not ended."""

    def __init__(self, replays: Replays) -> None:
        self._replays = replays

    def run(self) -> int:
        """Make the jobs that are due; returns how many."""
        num_made = 0
        for replay_id in self._replays.open_ids():
            step = self._replays.step(replay_id)
            num_made += step.num_made
            if step.num_made:
                log.event("replay.stepped", replay=replay_id, jobs=step.num_made)
            if step.is_ended:
                log.event("replay.ended", replay=replay_id)
        return num_made
