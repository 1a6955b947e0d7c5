"""Logging: one line an event, `name key=value ...`, all under the logger `headrace`.

Event names are past participles (`job.claimed`); `job` and `worker` stand on each line they apply
to. Prompts, outputs and secrets are never values.

Called by: each process's entry point (`configure`), everything else (`event`).
"""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("headrace")


def configure(level: str, process: str) -> None:
    """Send all of headrace's lines to stderr; the process's name stands on each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s process={process} %(message)s")
    )
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False


def event(name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one event; what is not plain is quoted, so a line stays one line of key=value."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", " ".join([name, *(f"{k}={_value(v)}" for k, v in fields.items())]))


def _value(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    is_plain = text.isprintable() and not any(c in ' "' for c in text)
    return text if text and is_plain else ascii(text)
