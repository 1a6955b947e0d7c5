"""`python -m headrace.worker`: one worker, until SIGTERM or SIGINT has drained it.

Exit status: 0 drained, 1 unexpected, 2 it cannot start like this, 3 its engine cannot live on this
device (both said in one line on stderr; with 3 all jobs were handed back before).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from headrace.contract import log
from headrace.contract.errors import ConfigurationError
from headrace.contract.settings import WorkerSettings
from headrace.worker.lifecycle import EngineBroken, build


def main() -> int:
    """Run one worker from the environment's settings."""
    try:
        settings = WorkerSettings.from_env(os.environ)
        log.configure(settings.log_level, "worker", settings.log_format)
        worker = build(settings, dict(os.environ))
    except ConfigurationError as error:
        print(f"headrace worker: {error.detail}", file=sys.stderr)
        return 2

    def on_signal(_signal: int, _frame: FrameType | None) -> None:
        worker.on_signal()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    try:
        worker.run()
    except ConfigurationError as error:
        print(f"headrace worker: {error.detail}", file=sys.stderr)
        return 2
    except EngineBroken as error:
        print(f"headrace worker: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
