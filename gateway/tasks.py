"""The Celery application: when the upkeep runs. Started by `headrace tasks`, on the fleet's Redis.

`celery -A headrace.gateway.tasks` wants an application at import, so `app` is made there; but its
settings are read only when Celery first asks for its configuration, at start. Importing this module
needs no environment and opens nothing.

Redis and Postgres may be away: a task then ends with a log line, and the next tick tries again.
A tick that was not run before the next one is due is dropped (`expires`), so nothing piles up.
There is one process without a pool: a walk of a long backlog gives the sampler its turn between
pages. With a pool (`--pool prefork`) runs are counted in its processes and shown by their parent.
Beat (`-B`) is a child of that process, and ends with it however it ends: alone it would go on
sending ticks that nobody runs. (On Linux; elsewhere an orderly stop ends it.)
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import Celery
from celery.signals import (
    beat_embedded_init,
    celeryd_init,
    setup_logging,
    worker_ready,
    worker_shutdown,
)

from headrace.contract import database, keys, log, redis_client
from headrace.contract.accounts import Accounts
from headrace.contract.dead_letters import DeadLetters
from headrace.contract.errors import ConfigurationError, Unavailable
from headrace.contract.ledger import Ledger
from headrace.contract.live import Live
from headrace.contract.operators import Operators
from headrace.contract.orders import WorkerOrders
from headrace.contract.pauses import Pauses
from headrace.contract.replays import Replays
from headrace.contract.settings import TasksSettings
from headrace.contract.streams import JobStreams, Workers
from headrace.contract.tokens import TokenLog
from headrace.gateway.dashboard.sampler import Sampler
from headrace.gateway.replays import ReplayRunner
from headrace.gateway.upkeep import Upkeep

if TYPE_CHECKING:  # imported once its folder is named: see _serve_metrics
    from headrace.gateway.tasks_metrics import TaskMetrics

#: prctl option: the signal a process gets when the thread that forked it ends.
PR_SET_PDEATHSIG = 1
#: Seconds between samples of the fleet.
SAMPLE_EVERY_S = 5.0
#: Seconds between steps of the replays of dead letters.
REPLAY_EVERY_S = 1.0
#: Seconds between runs of the retention task.
RETAIN_EVERY_S = 3600.0
#: Part of the time a task may take; the sweep walks all open jobs, so with a large backlog it comes
#: less often instead of keeping the relay waiting.
SHARE = {"sweep": 0.1}
#: Seconds after which an unacknowledged tick is delivered again: longer than any run takes.
VISIBILITY_S = 600


def create_celery(read_settings: Callable[[], TasksSettings]) -> Celery:
    """Build the application: six tasks and their schedule."""
    settings_once, app = cache(read_settings), Celery("headrace", set_as_current=False)
    parts = cache(lambda: make_parts(settings_once()))
    metrics = cache(lambda: _make_metrics(settings_once()))
    runs: dict[str, Callable[[Parts], object]] = {
        "relay": lambda of: of.upkeep.relay(meanwhile=of.sampler.sample),
        "expire": lambda of: of.upkeep.expire(),
        "sweep": lambda of: of.upkeep.sweep(meanwhile=of.sampler.sample),
        "retain": lambda of: of.upkeep.retain(),
        "sample": lambda of: of.sampler.sample(),
        "replay": lambda of: of.replays.run(),
    }
    for name, run in runs.items():
        task = _guarded(name, lambda run=run: run(parts()), metrics)
        app.task(task, name=f"headrace.{name}", shared=False)
    app.add_defaults(lambda: configuration(settings_once()))
    _serve_metrics(settings_once, metrics)
    return app


def configuration(settings: TasksSettings) -> dict[str, Any]:
    """Return Celery's configuration."""
    every_s = {
        "relay": settings.relay_every_s,
        "expire": settings.sweep_every_s,
        "sweep": settings.sweep_every_s,
        "retain": RETAIN_EVERY_S,
        "sample": SAMPLE_EVERY_S,
        "replay": REPLAY_EVERY_S,
    }
    return {
        "broker_url": settings.redis_url.get_secret_value(),
        "broker_transport_options": {
            "global_keyprefix": keys.CELERY_PREFIX,
            "visibility_timeout": VISIBILITY_S,
        },
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,  # for ever: there is nothing else to do
        "broker_channel_error_retry": True,  # a Redis that is full or read-only is away, no more
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


class Parts(NamedTuple):
    """What the tasks are done by."""

    upkeep: Upkeep
    sampler: Sampler
    replays: ReplayRunner


def make_parts(settings: TasksSettings) -> Parts:
    """Connect the parts to the stores (lazily: nothing is opened yet)."""
    client = redis_client.connect(settings.redis_url.get_secret_value())
    engine = database.connect(settings.database_url.get_secret_value(), pool_size=2)
    live, streams, workers = Live(client), JobStreams(client), Workers(client)
    pauses = Pauses(engine, live)
    upkeep = Upkeep(
        ledger=Ledger(engine),
        operators=Operators(engine),
        streams=streams,
        tokens=TokenLog(client),
        workers=workers,
        pauses=pauses,
        lease_s=settings.lease_s,
        retention_days=settings.retention_days,
    )
    sampler = Sampler(
        accounts=Accounts(engine),
        streams=streams,
        workers=workers,
        live=live,
        pauses=pauses,
        orders=WorkerOrders(engine),
        letters=DeadLetters(engine),
        every_s=SAMPLE_EVERY_S,
        oldest_target_s=settings.oldest_job_target_s,
    )
    return Parts(upkeep, sampler, ReplayRunner(Replays(engine)))


def _guarded(
    name: str, run: Callable[[], object], metrics: Callable[[], TaskMetrics | None] = lambda: None
) -> Callable[[], None]:
    rest_until = 0.0  # monotonic s

    def task() -> None:
        nonlocal rest_until
        started = time.monotonic()
        if started < rest_until:
            return
        outcome, found = "failed", None
        try:
            found, outcome = run(), "done"
        except Unavailable as error:
            outcome = "delayed"
            log.event("task.delayed", level=logging.WARNING, task=name, code=error.code)
        finally:
            took_s = time.monotonic() - started
            if (counts := metrics()) is not None:
                num_rows = found if isinstance(found, int) and not isinstance(found, bool) else 0
                counts.ran(name, outcome, took_s, num_rows)
        rest_until = started + took_s / SHARE.get(name, 1.0)

    return task


def _make_metrics(settings: TasksSettings) -> TaskMetrics | None:
    if not settings.metrics_bind:
        return None
    from headrace.gateway.tasks_metrics import TaskMetrics

    return TaskMetrics()


def _serve_metrics(
    read_settings: Callable[[], TasksSettings], metrics: Callable[[], TaskMetrics | None]
) -> None:
    """Let Celery's main process share counts with those it forks, and serve them all."""
    folders: list[str] = []

    def share_counts(**_: object) -> None:
        # prometheus_client decides at its import whether values are shared, by this variable.
        if read_settings().metrics_bind:
            folders.append(tempfile.mkdtemp(prefix="headrace-tasks-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folders[-1]

    def serve(**_: object) -> None:
        settings, counts = read_settings(), metrics()
        log.event("tasks.ready", pid=os.getpid(), metrics=settings.metrics_bind or "none")
        if counts is None:
            return
        from headrace.contract import exposition
        from headrace.gateway.tasks_metrics import view_of

        try:
            exposition.serve(settings.metrics_bind, counts.exposition(view_of(settings)))
        except ConfigurationError as error:  # the upkeep matters more
            log.event("metrics.unserved", level=logging.ERROR, why=error.detail)

    def forget(**_: object) -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    celeryd_init.connect(share_counts, weak=False)
    worker_ready.connect(serve, weak=False)
    worker_shutdown.connect(forget, weak=False)


def _read_settings() -> TasksSettings:
    return TasksSettings.from_env(os.environ)


def _configure_logging(**_: object) -> None:
    """Set up our own lines; that this is connected keeps Celery from replacing their handler."""
    settings = _read_settings()
    log.configure(settings.log_level, "tasks", settings.log_format)


setup_logging.connect(_configure_logging, weak=False)
app = create_celery(_read_settings)


def _end_with_parent(**_: object) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


beat_embedded_init.connect(_end_with_parent, weak=False)
