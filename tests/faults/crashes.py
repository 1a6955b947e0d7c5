"""Let a worker die at the worst moment: SIGKILL to itself, at a chosen point of a job's way.

A kill from outside rarely meets the microsecond between two steps; this one always does. A planted
bug shows only there, and the product without the bug must survive the same deaths.

Options: at, a point of POINTS; every, at which call of it the process dies (default 10). One death
a process: whoever started it starts it again. Programs other than the worker are left as they are.

Called by: wrapped.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from itertools import count
from types import ModuleType
from typing import Any

from headrace.tests.faults.on_import import when_imported


def _die_before(call: Callable[..., Any], every: int) -> Callable[..., Any]:
    numbers = count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) == every:
            sys.stderr.write("fault.crash\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return wrapped


def _before_commit(module: ModuleType, every: int) -> None:
    """A result is about to be committed: its tokens are all logged and seen."""
    module.Ledger.finish = _die_before(module.Ledger.finish, every)


def _before_log(module: ModuleType, every: int) -> None:
    """New tokens are about to be logged."""
    begin = module.TokenLog.__init__

    def begin_mortal(self: Any, client: Any) -> None:
        begin(self, client)
        self._append = _die_before(self._append, every)

    module.TokenLog.__init__ = begin_mortal


#: Point -> the module it is in, and what makes it deadly.
POINTS: dict[str, tuple[str, Callable[[ModuleType, int], None]]] = {
    "commit": ("headrace.contract.ledger", _before_commit),
    "log": ("headrace.contract.tokens", _before_log),
}


def install(program: str, options: Mapping[str, str]) -> None:
    """Let the worker die at a point."""
    if options.get("at") not in POINTS or options.keys() - {"at", "every"}:
        raise ValueError(f"name at=, one of {', '.join(POINTS)}, and every=N at most")
    every = int(options.get("every", "10"))
    module, act = POINTS[options["at"]]
    if program == "worker":
        when_imported(module, lambda found: act(found, every))
