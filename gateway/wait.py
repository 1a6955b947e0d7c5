"""`Prefer: wait=N`: hold the answer until the job has ended, or N seconds are over.

The end is followed like any subscriber follows it (gateway/follower); nothing polls but the check
after each silence, which finds an end whose frame was lost.

Called by: gateway/jobs.
"""

from __future__ import annotations

import re
import time

from headrace.contract import wire
from headrace.contract.errors import DatabaseUnavailable, InvalidHeader, QueueUnavailable
from headrace.contract.ledger import Ledger
from headrace.contract.tokens import TokenLog
from headrace.gateway.follower import Mailbox

#: Seconds of silence after which Redis is asked whether the end was missed.
CHECK_S = 1.0

_WAIT = re.compile(r"wait\s*=\s*\"?([^\",;\s]*)\"?", re.IGNORECASE)


def wanted_wait_s(prefer: str | None, max_wait_s: int) -> int | None:
    """Return the seconds a Prefer header asks to wait, capped; None when it does not ask."""
    for preference in (prefer or "").split(","):
        name = preference.partition(";")[0].strip()
        if name.partition("=")[0].strip().lower() != "wait":
            continue  # RFC 7240: preferences one does not know are ignored
        match = _WAIT.fullmatch(name)
        if match is None or not re.fullmatch(r"[0-9]{1,9}", match[1]):
            raise InvalidHeader(
                f"Prefer: {name[:60]!r} was sent; wait takes whole seconds: send `wait=10`"
            )
        return min(int(match[1]), max_wait_s)
    return None


def wait_for_end(box: Mailbox, ledger: Ledger, token_log: TokenLog, wait_s: float) -> bool:
    """Return True as soon as the job has ended, False when the time is up."""
    deadline = time.monotonic() + wait_s
    while not box.is_closed and (left := deadline - time.monotonic()) > 0:
        messages = box.take(min(left, CHECK_S))
        if any(isinstance(message, wire.JobEnd) for message in messages):
            return True
        if box.is_behind or not messages:
            box.catch_up()
            if _has_ended(box, ledger, token_log):
                return True
    return False


def _has_ended(box: Mailbox, ledger: Ledger, token_log: TokenLog) -> bool:
    try:
        position = token_log.position(box.model, box.job)
        if position is not None:
            return position.is_ended
    except QueueUnavailable:
        pass  # Postgres knows too
    try:
        row = ledger.job(box.job)
    except DatabaseUnavailable:
        return False
    return row is None or wire.JobStatus(row["status"]).is_terminal
