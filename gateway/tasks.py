"""The Celery application: when the upkeep runs. Started by `headrace tasks`, on the fleet's Redis.

This module is an entry point: importing it reads the settings of the environment, because
`celery -A headrace.gateway.tasks` wants an application. The work is in gateway/upkeep.

Redis and Postgres may be away: a task then ends with a log line, and the next tick tries again.
A tick that was not run before the next one is due is dropped (`expires`), so nothing piles up.
"""

from __future__ import annotations

import logging
import os

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


def create_celery(settings: TasksSettings) -> Celery:
    """Build the application: four tasks and their schedule."""
    redis_url = settings.redis_url.get_secret_value()
    client = redis_client.connect(redis_url)
    upkeep = Upkeep(
        ledger=Ledger(database.connect(settings.database_url.get_secret_value(), pool_size=2)),
        streams=JobStreams(client),
        tokens=TokenLog(client),
        workers=Workers(client),
        lease_s=settings.lease_s,
        retention_days=settings.retention_days,
    )
    app = Celery("headrace", broker=redis_url)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_default_queue="upkeep",
        broker_transport_options={"global_keyprefix": keys.CELERY_PREFIX},
        broker_connection_retry_on_startup=True,
        worker_enable_remote_control=False,  # nobody asks it anything; saves its own channels
        worker_send_task_events=False,
        enable_utc=True,
        timezone="UTC",
    )
    schedule: dict[str, dict[str, object]] = {}
    for run, every_s in (
        (upkeep.relay, settings.relay_every_s),
        (upkeep.expire, settings.sweep_every_s),
        (upkeep.sweep, settings.sweep_every_s),
        (upkeep.retain, RETAIN_EVERY_S),
    ):
        name = f"headrace.{run.__name__}"
        app.task(_guarded(run, name), name=name)
        schedule[name] = {"task": name, "schedule": every_s, "options": {"expires": every_s}}
    app.conf.beat_schedule = schedule
    return app


def _guarded(run, name: str):  # noqa: ANN001, ANN202
    def task() -> None:
        try:
            run()
        except Unavailable as error:
            log.event("task.delayed", level=logging.WARNING, task=name, code=error.code)

    return task


def _keep_logging(**_: object) -> None:
    """Keep Celery from replacing the process's log handlers."""


_settings = TasksSettings.from_env(os.environ)
log.configure(_settings.log_level, "tasks")
setup_logging.connect(_keep_logging, weak=False)
app = create_celery(_settings)
