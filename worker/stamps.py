"""When an attempt passed which point on its way through this worker: one set a running job.

All times are of the monotonic clock, seconds; None = not reached. They are the one source of where
a job's time went: the attempts table, the spans of a trace and the latency metrics all cut the same
line, so the parts add up to the whole:

    accepted -- queue --> picked up -- prepare --> admitted -- prefill --> first token
             -- decode --> last token -- publish --> committed

Invariants:
1. Times that are set do not fall from one point to the next.
2. What was before the pickup (`age_s`, `waited_s`) is a difference of two of Postgres' times: no
   clock of another host comes into it.

Written by: intake (up to the pickup), the loop (up to the last token), endings and hand_back
(committed).
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.contract.timings import Timings


@dataclass(slots=True)
class Stamps:
    claimed_at: float = 0.0  # its entry was given to this worker
    picked_up_at: float = 0.0  # the pickup's transaction began: the attempt's started_at
    admitted_at: float | None = None  # tokenised and sent to the engine
    first_token_at: float | None = None  # the first that this attempt made itself
    last_token_at: float | None = None
    committed_at: float | None = None  # the result row, or the hand-back
    age_s: float = 0.0  # of the job at the pickup: ledger.PickUp
    waited_s: float = 0.0  # of that, since it was last in nobody's hands
    was_lost: bool = False  # that time went to an attempt that died, not to the queue

    def made(self, moment: float) -> None:
        """Note that tokens were made by then: once a flush, because a stamp a token costs more.

        While Redis answers, first tokens and ends are flushed in the turn that brings them: both
        are exact. Of a job ended between two flushes the last token may seem one flush older.
        """
        if self.first_token_at is None:
            self.first_token_at = moment
        self.last_token_at = moment

    def since_accepted_s(self, moment: float) -> float:
        """Return the job's age at a moment after the pickup."""
        return self.age_s + moment - self.picked_up_at

    def points(self) -> list[tuple[str, float, float]]:
        """Return (part, begin, end) of the parts that were gone through, without gaps.

        An attempt that ended early has its last part end where it was committed: one that failed
        at its prompt has `queue` and `publish`, one canceled in its prefill no `decode`.
        """
        ends = [
            ("lost" if self.was_lost else "queue", self.picked_up_at),
            ("prepare", self.admitted_at),
            ("prefill", self.first_token_at),
            ("decode", self.last_token_at),
            ("publish", self.committed_at),
        ]
        parts: list[tuple[str, float, float]] = []
        begin = self.picked_up_at - self.waited_s
        for name, end in ends:
            if end is not None:
                parts.append((name, begin, end))
                begin = end
        return parts

    def timings(self, *, resumed_at: int, num_tokens: int) -> Timings:
        """Return them as the attempts table keeps them, after the pickup."""

        def ms(at: float | None) -> int | None:
            return None if at is None else max(0, round((at - self.picked_up_at) * 1000))

        return Timings(
            admitted_ms=ms(self.admitted_at),
            first_token_ms=ms(self.first_token_at),
            last_token_ms=ms(self.last_token_at),
            resumed_at=resumed_at,
            num_tokens=num_tokens,
        )
