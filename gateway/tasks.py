"""The Celery application: when the upkeep runs. Started by `headrace tasks`, on the fleet's Redis.

`celery -A headrace.gateway.tasks` wants an application at import, so `app` is made there; but its
settings are read only when Celery first asks for its configuration, at start. Importing this module
needs no environment and opens nothing.

Redis and Postgres may be away: a task then ends with a log line, and the next tick tries again.
A tick that was not run before the next one is due is dropped (`expires`), so nothing piles up.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from celery import Celery
from celery.signals import setup_logging

from headrace.contract import database, keys, log, redis_client
from headrace.contract.errors import Unavailable
from headrace.contract.ledger import Ledger
from headrace.contract.settings import TasksSettings
from headrace.contract.streams import JobStreams, Workers
from headrace.contract.tokens import TokenLog
from headrace.gateway.upkeep import Upkeep

#: Seconds between runs of the retention task.
RETAIN_EVERY_S = 3600.0
#: Part of the time a task may take; the sweep walks all open jobs, so with a large backlog it comes
#: less often instead of keeping the relay waiting.
SHARE = {"sweep": 0.1}
#: Seconds after which an unacknowledged tick is delivered again: longer than any run takes.
VISIBILITY_S = 600


def create_celery(read_settings: Callable[[], TasksSettings]) -> Celery:
    """Build the application: four tasks and their schedule."""
    settings_once, app = cache(read_settings), Celery("headrace", set_as_current=False)
    upkeep = cache(lambda: make_upkeep(settings_once()))
    for name in ("relay", "expire", "sweep", "retain"):
        app.task(_guarded(name, upkeep), name=f"headrace.{name}", shared=False)
    app.add_defaults(lambda: configuration(settings_once()))
    return app


def configuration(settings: TasksSettings) -> dict[str, Any]:
    """Return Celery's configuration."""
    every_s = {
        "relay": settings.relay_every_s,
        "expire": settings.sweep_every_s,
        "sweep": settings.sweep_every_s,
        "retain": RETAIN_EVERY_S,
    }
    return {
        "broker_url": settings.redis_url.get_secret_value(),
        "broker_transport_options": {
            "global_keyprefix": keys.CELERY_PREFIX,
            "visibility_timeout": VISIBILITY_S,
        },
        "broker_connection_retry_on_startup": True,
        "accept_content": ["json"],
        "task_serializer": "json",
        "task_ignore_result": True,
        "task_default_queue": "upkeep",
        "worker_hijack_root_logger": False,
        "worker_enable_remote_control": False,  # nobody asks it anything; saves its own channels
        "worker_send_task_events": False,
        "enable_utc": True,
        "timezone": "UTC",
        "beat_schedule": {
            f"headrace.{name}": {
                "task": f"headrace.{name}",
                "schedule": seconds,
                "options": {"expires": seconds},
            }
            for name, seconds in every_s.items()
        },
    }


def make_upkeep(settings: TasksSettings) -> Upkeep:
    """Connect the upkeep to the stores (lazily: nothing is opened yet)."""
    client = redis_client.connect(settings.redis_url.get_secret_value())
    return Upkeep(
        ledger=Ledger(database.connect(settings.database_url.get_secret_value(), pool_size=2)),
        streams=JobStreams(client),
        tokens=TokenLog(client),
        workers=Workers(client),
        lease_s=settings.lease_s,
        retention_days=settings.retention_days,
    )


def _guarded(name: str, upkeep: Callable[[], Upkeep]) -> Callable[[], None]:
    rest_until = 0.0  # monotonic s

    def task() -> None:
        nonlocal rest_until
        started = time.monotonic()
        if started < rest_until:
            return
        try:
            getattr(upkeep(), name)()
        except Unavailable as error:
            log.event("task.delayed", level=logging.WARNING, task=name, code=error.code)
        rest_until = started + (time.monotonic() - started) / SHARE.get(name, 1.0)

    return task


def _read_settings() -> TasksSettings:
    return TasksSettings.from_env(os.environ)


def _configure_logging(**_: object) -> None:
    """Set up our own lines; that this is connected keeps Celery from replacing their handler."""
    log.configure(_read_settings().log_level, "tasks")


setup_logging.connect(_configure_logging, weak=False)
app = create_celery(_read_settings)
