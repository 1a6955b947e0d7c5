"""The Celery application: imported without an environment, closed to anything but JSON, bounded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from headrace.contract import keys
from headrace.contract.errors import ConfigurationError
from headrace.contract.settings import TasksSettings
from headrace.gateway import tasks

ENVIRON = {
    "HEADRACE_REDIS_URL": "redis://:pw@127.0.0.1:1/0",
    "HEADRACE_DATABASE_URL": "postgresql+psycopg://u:pw@127.0.0.1:1/none",
    "HEADRACE_RELAY_EVERY_S": "0.5",
}
NAMES = {
    *("headrace.relay", "headrace.expire", "headrace.sweep", "headrace.retain"),
    *("headrace.sample", "headrace.replay"),
}


def settings() -> TasksSettings:
    return TasksSettings.from_env(ENVIRON)


def test_the_schedule_runs_each_task_and_drops_ticks_that_pile_up():
    app = tasks.create_celery(settings)
    schedule = app.conf.beat_schedule
    assert {entry["task"] for entry in schedule.values()} == NAMES <= app.tasks.keys()
    assert schedule["headrace.relay"]["schedule"] == 0.5
    for entry in schedule.values():
        assert entry["options"]["expires"] == entry["schedule"]


def test_the_configuration_is_read_once_and_late():
    reads = []

    def read() -> TasksSettings:
        reads.append(1)
        return settings()

    app = tasks.create_celery(read)
    assert reads == []
    assert app.conf.broker_url == ENVIRON["HEADRACE_REDIS_URL"]
    assert app.conf.beat_schedule
    assert reads == [1]


def test_only_json_travels_under_our_prefix_and_no_results_are_kept():
    conf = tasks.create_celery(settings).conf
    assert conf.accept_content == ["json"]
    assert conf.task_serializer == "json"
    assert conf.result_backend is None
    assert conf.broker_transport_options["global_keyprefix"] == keys.CELERY_PREFIX
    assert conf.broker_transport_options["visibility_timeout"] > tasks.RETAIN_EVERY_S / 10


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_task_whose_stores_are_away_ends_quietly(name, capsys):
    tasks.log.configure("WARNING", "tasks")
    app = tasks.create_celery(settings)
    assert app.tasks[name]() is None
    assert f"task.delayed task={name.removeprefix('headrace.')} code=" in capsys.readouterr().err


def test_the_module_is_imported_without_an_environment():
    code = "import headrace.gateway.tasks as t; assert t.app.main == 'headrace'"
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_a_start_without_settings_says_which_are_missing():
    with pytest.raises(ConfigurationError, match="HEADRACE_REDIS_URL"):
        tasks.create_celery(lambda: TasksSettings.from_env({})).conf.broker_url  # noqa: B018


def test_a_sweep_takes_at_most_a_tenth_of_the_time(monkeypatch):
    """Its ticks come every second, and each walk of the backlog takes one."""
    now, runs = [100.0], []

    def sweep() -> None:
        runs.append(now[0])
        now[0] += 1

    monkeypatch.setattr(tasks.time, "monotonic", lambda: now[0])
    tick = tasks._guarded("sweep", sweep)
    while now[0] < 130:
        tick()
        now[0] += 1
    assert runs == [100.0, 110.0, 120.0]
