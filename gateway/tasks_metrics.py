"""What the tasks process tells Prometheus: its own runs, and the fleet as the stores show it.

Runs are counted in whichever process runs them, and shown by the one that serves: under Celery's
prefork pool the counts are in files of one folder (gateway/tasks names it before this module is
imported), under its solo pool they are in the same process. What the stores show (queues, workers,
whether they answer) is asked when Prometheus asks, at most every CACHE_S seconds.

Invariants:
1. Being asked costs the stores a few commands a model, however often it happens.
2. A store that is away is said so (`headrace_store_up` 0); what only it knows is left out, because
   an old number looks like a new one.

Called by: gateway/tasks (one a process).
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from headrace.contract import database, exposition, redis_client
from headrace.contract.accounts import Accounts
from headrace.contract.errors import Unavailable
from headrace.contract.ledger import Ledger
from headrace.contract.live import Live, Sampled
from headrace.contract.settings import TasksSettings
from headrace.contract.streams import JobStreams, LaneDepth, Workers

#: Seconds a store may take to answer a scrape: less than a scrape may.
STORE_TIMEOUT_S = 2.0
#: Seconds for which what the stores said is shown again.
CACHE_S = 3.0


class TaskMetrics:
    """The runs of one tasks process, and the whole exposition for the one that serves."""

    def __init__(self) -> None:
        self._own = registry = CollectorRegistry()
        self.runs = Counter(
            "headrace_task_runs_total",
            "Runs of an upkeep task: done, delayed (a store was away), failed.",
            ["task", "outcome"],
            registry=registry,
        )
        self.seconds = Histogram(
            "headrace_task_seconds",
            "A run of an upkeep task.",
            ["task"],
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=registry,
        )
        self.rows = Counter(
            "headrace_task_rows_total",
            "Rows a task did something about: relayed, expired, put back, deleted.",
            ["task"],
            registry=registry,
        )
        self.last_run_s = Gauge(
            "headrace_task_last_run_timestamp_seconds",
            "When a task last ended, Unix time.",
            ["task"],
            registry=registry,
            multiprocess_mode="mostrecent",
        )

    def ran(self, task: str, outcome: str, seconds: float, num_rows: int) -> None:
        """Count one run."""
        self.runs.labels(task, outcome).inc()
        self.seconds.labels(task).observe(seconds)
        self.last_run_s.labels(task).set(time.time())
        self.rows.labels(task).inc(num_rows)  # 0 too: a series that is there can be watched

    def exposition(self, view: StoresView) -> CollectorRegistry:
        """Return what is served: all processes' runs, what the stores show, this process."""
        shown = CollectorRegistry()
        try:
            MultiProcessCollector(shown)
        except ValueError:  # no folder is named: this process is the only one
            shown.register(exposition.Labelled(self._own, {}))
        shown.register(view)
        shown.register(exposition.BuildInfo("tasks"))
        shown.register(exposition.own_process("tasks"))
        return shown


@dataclass(eq=False)
class StoresView(Collector):
    """Queues, workers and health of the stores, remembered for CACHE_S."""

    ledger: Ledger
    accounts: Accounts
    streams: JobStreams
    workers: Workers
    live: Live
    cache_s: float = CACHE_S
    _models: list[str] = field(default_factory=list[str])
    _read_at: float | None = None  # monotonic s
    _families: list[Metric] = field(default_factory=list[Metric])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            now = time.monotonic()
            if self._read_at is None or now - self._read_at >= self.cache_s:
                self._families = self._read()
                self._read_at = now
            yield from self._families

    def _read(self) -> list[Metric]:
        up = GaugeMetricFamily("headrace_store_up", "1 if it answers.", labels=["store"])
        ping = GaugeMetricFamily(
            "headrace_store_ping_seconds", "How long it took to answer.", labels=["store"]
        )
        families: list[Metric] = [up, ping]
        for store, ask, show in (
            ("postgres", self.ledger.ping, self._postgres),
            ("redis", self.workers.ping, self._redis),
        ):
            try:
                took_s = _timed(ask)
                found = show()
            except Unavailable:
                up.add_metric([store], 0)
                continue
            up.add_metric([store], 1)
            ping.add_metric([store], took_s)
            families += found
        return families

    def _postgres(self) -> list[Metric]:
        self._models = [card.name for card in self.accounts.list_models()]
        num_rows, oldest_s = self.ledger.outbox_size()
        return [
            GaugeMetricFamily(
                "headrace_outbox_jobs", "Accepted jobs not yet known to be in Redis.", num_rows
            ),
            GaugeMetricFamily(
                "headrace_outbox_oldest_seconds", "Age of the oldest of them; 0: none.", oldest_s
            ),
        ]

    def _redis(self) -> list[Metric]:
        alive = self.workers.alive().values()
        depths = {model: self.streams.depths(model) for model in self._models}
        states = Tally((beat.model, str(beat.state)) for beat in alive)
        workers = GaugeMetricFamily(
            "headrace_workers", "Workers whose heartbeat is there.", labels=["model", "state"]
        )
        for model in {*self._models, *(model for model, _ in states)}:
            for state in {"ready", *(s for m, s in states if m == model)}:
                workers.add_metric([model, state], states[model, state])
        step_age = GaugeMetricFamily(
            "headrace_worker_step_age_seconds",
            "Since the last step of an engine with work; 0 without.",
            labels=["model", "worker"],
        )
        for beat in alive:
            step_age.add_metric([beat.model, beat.worker], beat.step_age_ms / 1000)
        return [workers, step_age, *_queues(depths), *_sampled(self.live.sampled())]


def _queues(depths: dict[str, list[LaneDepth]]) -> list[Metric]:
    """Sum lanes by model and class; a class that holds nothing is shown as 0."""
    labels = ["model", "job_class"]
    queued = GaugeMetricFamily("headrace_queue_jobs", "Jobs nobody was given yet.", labels=labels)
    held = GaugeMetricFamily("headrace_queue_held_jobs", "Jobs given to a worker.", labels=labels)
    oldest = GaugeMetricFamily(
        "headrace_queue_oldest_seconds", "Age of the oldest queued job; 0: none.", labels=labels
    )
    lanes = GaugeMetricFamily("headrace_queue_lanes", "Lanes that hold a job.", labels=labels)
    suspects = GaugeMetricFamily(
        "headrace_suspects",
        "Queued jobs that wait to run apart: an engine died with them in hand.",
        labels=["model"],
    )
    now_ms = time.time() * 1000
    for model, found in depths.items():
        num_suspects = sum(lane.num_queued for lane in found if lane.is_of_suspects)
        suspects.add_metric([model], num_suspects)
        for job_class in sorted({"interactive", "batch", *(_class_of(lane) for lane in found)}):
            mine = [lane for lane in found if _class_of(lane) == job_class]
            first_ms = min((lane.oldest_ms for lane in mine if lane.oldest_ms), default=now_ms)
            key = [model, job_class]
            queued.add_metric(key, sum(lane.num_queued for lane in mine))
            held.add_metric(key, sum(lane.num_held for lane in mine))
            oldest.add_metric(key, max(0.0, now_ms - first_ms) / 1000)
            lanes.add_metric(key, len(mine))
    return [queued, held, oldest, lanes, suspects]


def _sampled(found: tuple[Sampled, float] | None) -> list[Metric]:
    """Show the alarms of the last sample, and how old it is; without one there are none."""
    alarms = GaugeMetricFamily(
        "headrace_alarm",
        "1 for each alarm that stands (gateway/dashboard/alarms).",
        labels=["code", "severity", "model", "subject"],
    )
    age = GaugeMetricFamily("headrace_sample_age_seconds", "Age of the fleet's last sample.")
    if found is not None:
        sampled, age_s = found
        for alarm in sampled.alarms:
            alarms.add_metric([alarm.code, alarm.severity, alarm.model or "", alarm.subject], 1)
        age.add_metric([], age_s)
    return [alarms, age]


def view_of(settings: TasksSettings) -> StoresView:
    """Connect a view of its own (lazily): a scrape must not wait for a task's connection."""
    client = redis_client.connect(settings.redis_url.get_secret_value(), timeout_s=STORE_TIMEOUT_S)
    engine = database.connect(settings.database_url.get_secret_value(), pool_size=1)
    return StoresView(
        Ledger(engine), Accounts(engine), JobStreams(client), Workers(client), Live(client)
    )


def _class_of(lane: LaneDepth) -> str:
    return lane.lane.partition(":")[0]


def _timed(act: Callable[[], None]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started
