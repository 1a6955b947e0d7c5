"""What the tasks process shows Prometheus, on real stores and under real Celery pools."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from headrace.contract import database, redis_client, wire
from headrace.contract.accounts import Accounts
from headrace.contract.ids import new_id
from headrace.contract.ledger import Ledger
from headrace.contract.live import Alarm, Live, Sampled, Severity, Snapshot
from headrace.contract.settings import TasksSettings
from headrace.contract.specs import spec_of
from headrace.contract.streams import JobStreams, Workers
from headrace.fleet.child import start_child
from headrace.fleet.server import free_port
from headrace.gateway import tasks
from headrace.gateway.tasks_metrics import StoresView, TaskMetrics, view_of
from headrace.tests.gateway.conftest import card
from headrace.tests.gateway.courier import MODEL

PATIENCE_S = 60.0


@pytest.fixture
def engine(database_url: str):
    engine = database.connect(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def view(redis_url: str, engine: Engine) -> StoresView:
    client = redis_client.connect(redis_url)
    client.flushall()
    Accounts(engine).register_model(card())
    ledger, accounts = Ledger(engine), Accounts(engine)
    return StoresView(
        ledger, accounts, JobStreams(client), Workers(client), Live(client), cache_s=0
    )


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def shown(view: StoresView) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return samples(generate_latest(TaskMetrics().exposition(view)).decode())


def at(found: dict, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def accept(view: StoresView, key: tuple[str, str], job_class: str, *, enqueue: bool = True) -> str:
    job_id = new_id("job")
    row = {
        "id": job_id,
        "tenant_id": key[0],
        "key_id": key[1],
        "model": MODEL,
        "job_class": job_class,
        "priority": "normal",
        "input": {"prompt": "abc"},
        "sampling": {},
        "meta": {},
        "cost_tokens": 10,
    }
    accepted = view.ledger.accept_job(row, idempotency_key=None, request_sha256=b"")
    if enqueue:
        view.streams.enqueue(spec_of(accepted.job), 10)
        view.ledger.outbox_done([job_id])
    return job_id


def test_queues_are_shown_by_model_and_class_and_an_empty_one_is_zero(view):
    new = view.accounts.create_key(tenant="t", name="n")
    key = new.tenant_id, new.id
    for _ in range(3):
        accept(view, key, "batch")
    view.streams.claim(MODEL, "w", lease_ms=60_000, room_tokens=10, max_jobs=1, is_idle=True)
    accept(view, key, "batch", enqueue=False)
    found = shown(view)
    batch, interactive = ({"model": MODEL, "job_class": name} for name in ("batch", "interactive"))
    assert at(found, "headrace_queue_jobs", **batch) == 2
    assert at(found, "headrace_queue_held_jobs", **batch) == 1
    assert 0 < at(found, "headrace_queue_oldest_seconds", **batch) < PATIENCE_S
    assert at(found, "headrace_queue_jobs", **interactive) == 0
    assert at(found, "headrace_queue_oldest_seconds", **interactive) == 0
    assert at(found, "headrace_outbox_jobs") == 1
    assert 0 < at(found, "headrace_outbox_oldest_seconds") < PATIENCE_S


def test_suspects_that_wait_are_shown_by_model(view):
    new = view.accounts.create_key(tenant="t", name="n")
    accept(view, (new.tenant_id, new.id), "batch")
    assert at(shown(view), "headrace_suspects", model=MODEL) == 0
    (given,) = view.streams.claim(
        MODEL, "w", lease_ms=60_000, room_tokens=10, max_jobs=1, is_idle=True
    ).claims
    view.streams.hand_back(MODEL, given.job, 1, suspect=1)
    found = shown(view)
    assert at(found, "headrace_suspects", model=MODEL) == 1
    assert at(found, "headrace_queue_jobs", model=MODEL, job_class="batch") == 1
    view.streams.claim(MODEL, "w", lease_ms=60_000, room_tokens=10, max_jobs=1, is_idle=True)
    assert at(shown(view), "headrace_suspects", model=MODEL) == 0, "it runs"


def test_a_model_without_a_worker_is_shown_with_none_ready(view):
    found = shown(view)
    assert at(found, "headrace_workers", model=MODEL, state="ready") == 0
    view.workers.beat(beat(state="ready", step_age_ms=1500), lifetime_ms=60_000)
    found = shown(view)
    assert at(found, "headrace_workers", model=MODEL, state="ready") == 1
    assert at(found, "headrace_worker_step_age_seconds", model=MODEL, worker="w1") == 1.5


def test_standing_alarms_are_shown_with_code_and_model(view):
    alarm = Alarm(
        code="no_worker", severity=Severity.PAGE, text="t", since="s", model=MODEL, subject=MODEL
    )
    at_ms = int(time.time() * 1000)
    snapshot = Snapshot(at_ms=at_ms, counts={}, workers={})
    view.live.save(Sampled(at_ms=at_ms, sample={}, alarms=[alarm]), snapshot, {"at": 1}, None)
    found = shown(view)
    labels = {"code": "no_worker", "severity": "page", "model": MODEL, "subject": MODEL}
    assert at(found, "headrace_alarm", **labels) == 1
    assert 0 <= at(found, "headrace_sample_age_seconds") < PATIENCE_S


def test_invariant_1_the_stores_are_asked_once_in_the_caches_time(view, monkeypatch):
    asked = []
    view.cache_s = 3600
    monkeypatch.setattr(StoresView, "_read", lambda _: asked.append(1) or [])
    metrics = TaskMetrics()
    for _ in range(3):
        generate_latest(metrics.exposition(view))
    assert asked == [1]


def test_invariant_2_a_store_that_is_away_is_said_and_the_other_still_shown(redis_url, engine):
    nowhere = redis_client.connect("redis://127.0.0.1:1/0", timeout_s=1)
    view = StoresView(
        Ledger(engine),
        Accounts(engine),
        JobStreams(nowhere),
        Workers(nowhere),
        Live(nowhere),
        cache_s=0,
    )
    found = shown(view)
    assert at(found, "headrace_store_up", store="redis") == 0
    assert at(found, "headrace_store_up", store="postgres") == 1
    assert at(found, "headrace_outbox_jobs") is not None
    assert "headrace_queue_jobs" not in {name for name, _ in found}


def test_a_run_is_counted_with_its_outcome_and_rows():
    metrics = TaskMetrics()

    def run_twice(run) -> None:
        task = tasks._guarded("relay", run, lambda: metrics)
        task()

    def away() -> int:
        raise tasks.Unavailable("away")

    def broken() -> int:
        raise ValueError("broken")

    run_twice(lambda: 7)
    run_twice(lambda: True)  # the sampler says whether, not how many
    run_twice(away)
    with pytest.raises(ValueError, match="broken"):
        run_twice(broken)
    found = samples(generate_latest(metrics._own).decode())
    runs = {
        outcome: at(found, "headrace_task_runs_total", task="relay", outcome=outcome)
        for outcome in ("done", "delayed", "failed")
    }
    assert runs == {"done": 2, "delayed": 1, "failed": 1}
    assert at(found, "headrace_task_rows_total", task="relay") == 7
    assert at(found, "headrace_task_seconds_count", task="relay") == 4


@contextlib.contextmanager
def celery(pool, redis_url, database_url, tmp_path):
    """Run the tasks; yields their process and their metrics once some have run."""
    bind = f"127.0.0.1:{free_port()}"
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "HEADRACE_REDIS_URL": redis_url,
        "HEADRACE_DATABASE_URL": database_url,
        "HEADRACE_METRICS_BIND": bind,
        "HEADRACE_RELAY_EVERY_S": "0.1",
    }
    argv = [sys.executable, "-m", "celery", "-A", "headrace.gateway.tasks", "worker", *pool]
    argv += ["--concurrency", "2", "-s", str(tmp_path / "beat")]
    log = tmp_path / "tasks.log"
    child = start_child(argv, log=log, env=env, death_signal=signal.SIGKILL, cwd=tmp_path)
    try:
        yield child, wait_for_runs(f"http://{bind}/metrics", child, log)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(PATIENCE_S)


@pytest.mark.parametrize("pool", [["--pool", "solo", "-B"], ["--pool", "prefork", "-B"]])
def test_celery_shows_the_runs_of_all_its_processes(pool, redis_url, database_url, tmp_path):
    """With a pool the runs are counted in its processes, and shown by their parent."""
    with celery(pool, redis_url, database_url, tmp_path) as (_, text):
        found = samples(text)
    assert at(found, "headrace_store_up", store="redis") == 1
    assert any(name == "headrace_build_info" for name, _ in found)
    assert at(found, "headrace_task_last_run_timestamp_seconds", task="relay") > time.time() - 60
    assert " ERROR " not in (tmp_path / "tasks.log").read_text()
    assert not list(tmp_path.glob("headrace-tasks-metrics-*")), "the counts' folder is left"


def test_beat_ends_with_a_process_that_is_killed(redis_url, database_url, tmp_path):
    pool = ["--pool", "solo", "-B"]
    with celery(pool, redis_url, database_url, tmp_path) as (child, _):
        (beat,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        child.kill()
        child.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{beat}").exists():
            assert time.monotonic() < deadline, "beat goes on without anybody to run its ticks"
            time.sleep(0.05)


def wait_for_runs(url: str, child: subprocess.Popen[bytes], log) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
            runs = at(samples(text), "headrace_task_runs_total", task="relay", outcome="done")
            if runs is not None and runs >= 3:
                return text
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"no runs were shown\n{log.read_text()}")


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield f"127.0.0.1:{holder.getsockname()[1]}"


def test_an_address_that_is_taken_is_told_and_stops_nothing(taken, redis_url, database_url, capsys):
    settings = TasksSettings.model_validate(
        {"redis_url": redis_url, "database_url": database_url, "metrics_bind": taken}
    )
    counts = TaskMetrics()
    handlers: dict[str, object] = {}

    class Kept:
        def __init__(self, name: str) -> None:
            self.name = name

        def connect(self, handler: object, **_: object) -> None:
            handlers[self.name] = handler

    with pytest.MonkeyPatch.context() as patch:
        for name in ("celeryd_init", "worker_ready", "worker_shutdown"):
            patch.setattr(tasks, name, Kept(name))
        tasks._serve_metrics(lambda: settings, lambda: counts)
    tasks.log.configure("INFO", "tasks")
    assert isinstance(view_of(settings), StoresView)
    handlers["worker_ready"]()
    line = capsys.readouterr().err
    assert "metrics.unserved" in line
    assert taken in line


def beat(**changes: object) -> wire.WorkerBeat:
    fields = {
        "worker": "w1",
        "model": MODEL,
        "host": "h",
        "pid": 1,
        "state": "ready",
        "started_ms": 1,
        "step": 1,
        "step_age_ms": 0,
        "num_running": 1,
        "num_waiting": 0,
        "free_blocks": 1,
        "total_blocks": 2,
    }
    return wire.WorkerBeat(**(fields | changes))
