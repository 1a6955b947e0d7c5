"""Blocking CPU work beside the event loop.

Argon2 keeps a core busy for 60 ms. In a gevent process that would stop every stream for as long;
in the hub's pool of real threads it does not, because the library lets go of the interpreter's lock
while it computes. Elsewhere (tests, the CLI) the caller is a thread of its own already.

Called by: gateway/services (for contract.passwords).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def run_in_thread(work: Callable[[], T], /) -> T:
    """Run the work and return what it returns, while other greenlets go on."""
    from gevent import get_hub, monkey  # not at import: tests and the CLI run without gevent

    if not monkey.is_module_patched("threading"):
        return work()
    return get_hub().threadpool.apply(work)
