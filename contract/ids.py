"""Identifiers: UUIDv7 with a prefix, so that ids sort by time and say what they name.

`job_` + 32 hex digits. RFC 9562 section 5.7: 48 bits of milliseconds, then (section 6.2, method 3)
12 bits that say where in the millisecond, to a quarter of a microsecond, then 62 random bits. So
ids made one after another in a process sort in that order: lists are newest first.

Called by: gateway (jobs), ledger (keys, tenants), worker (its own name, ages of jobs).
"""

from __future__ import annotations

import os
import re
import time

_JOB_ID = re.compile(r"job_[0-9a-f]{32}")


def uuid7_hex() -> str:
    """Return a fresh UUIDv7 as 32 hex digits."""
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    random = int.from_bytes(os.urandom(8), "big")
    value = (milliseconds & (1 << 48) - 1) << 80
    value |= 0x7 << 76 | (nanoseconds * 4096 // 1_000_000) << 64
    value |= 0b10 << 62 | random & (1 << 62) - 1
    return f"{value:032x}"


def new_id(prefix: str) -> str:
    """Return `<prefix>_<uuid7>`."""
    return f"{prefix}_{uuid7_hex()}"


def is_job_id(text: str) -> bool:
    """True when the text has the form of a job id (it may still name no job)."""
    return _JOB_ID.fullmatch(text) is not None


def made_ms(identifier: str) -> int:
    """Return when an id of `new_id` was made, Unix ms by the clock of who made it."""
    return int(identifier.rpartition("_")[2][:12], 16)
