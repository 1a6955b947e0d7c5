"""How tests get a dead letter: the job dies alone and for certain, twice, as with real workers."""

from __future__ import annotations

from sqlalchemy import Engine

from headrace.contract.crashes import Crashes, InHand, Verdict
from headrace.contract.ledger import Ending, Ledger
from headrace.contract.wire import FinishReason, JobStatus

SIGNATURE = "ValueError step.py:run cannot"
_ENDING = Ending(JobStatus.FAILED, FinishReason.ERROR)


def bury(engine: Engine, job: str, signature: str = SIGNATURE, detail: str = "a trace") -> str:
    """Let a queued job end as poison; return its id."""
    ledger, crashes = Ledger(engine), Crashes(engine)
    for _ in range(3):
        picked = ledger.pick_up([job], "w1")[job]
        assert picked is not None
        assert picked.attempt is not None
        judged = crashes.record(
            [InHand(job, picked.attempt, 0, _ENDING)],
            "w1",
            signature,
            detail,
            is_certain=True,
            was_alone=True,
        )[job]
        if judged.verdict is Verdict.DEAD:
            return job
    raise AssertionError(f"{job} is not dead after three runs: {judged}")
