"""Readiness of a worker: what an orchestrator is told in each state."""

import json
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest

from headrace.contract.wire import WorkerState
from headrace.fleet.server import free_port
from headrace.worker.health import WorkerHealth
from headrace.worker.metrics import Metrics


@pytest.fixture
def now() -> SimpleNamespace:
    return SimpleNamespace(state=WorkerState.READY, has_engine=True, age_s=0.0)


@pytest.fixture
def health(now) -> WorkerHealth:
    return WorkerHealth(
        worker="w1",
        model="m",
        step_timeout_s=30.0,
        state=lambda: now.state,
        has_engine=lambda: now.has_engine,
        step_age_s=lambda: now.age_s,
        num_held=lambda: 3,
    )


def test_ready_tells_the_last_steps_age(health, now):
    now.age_s = 0.25
    assert health.answer("/readyz", "") == (
        200,
        {
            "status": "ready",
            "worker": "w1",
            "model": "m",
            "state": "ready",
            "has_engine": True,
            "step_age_s": 0.25,
            "num_held": 3,
        },
    )


def test_an_engine_that_steps_no_more_is_not_ready_before_it_is_ended(health, now):
    now.age_s = 15.1
    status, body = health.answer("/readyz", "draining=ok")
    assert (status, body["status"], body["step_age_s"]) == (503, "stuck", 15.1)


def test_without_an_engine_it_is_not_ready(health, now):
    now.state, now.has_engine = WorkerState.STARTING, False
    assert health.answer("/readyz", "draining=ok")[0] == 503
    now.state = WorkerState.READY  # duty has not noticed yet
    assert health.answer("/readyz", "")[0] == 503


@pytest.mark.parametrize(
    "state", [WorkerState.DRAINING, WorkerState.DRAINED, WorkerState.QUARANTINED]
)
def test_at_rest_it_is_not_ready_but_whoever_restarts_the_sick_lets_it_be(health, now, state):
    now.state = state
    assert health.answer("/readyz", "") == (503, health.answer("/readyz", "draining=ok")[1])
    assert health.answer("/readyz", "draining=ok")[0] == 200


def test_a_draining_worker_whose_engine_stands_still_is_sick_all_the_same(health, now):
    now.state, now.age_s = WorkerState.DRAINING, 20.0
    assert health.answer("/readyz", "draining=ok")[0] == 503


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_checks_are_served_beside_the_metrics(health, now):
    bind = f"127.0.0.1:{free_port()}"
    Metrics("m", "w1").serve(bind, health.answer)
    assert get(f"http://{bind}/healthz") == (200, '{"status": "alive"}')
    assert "headrace_worker_jobs_ended" in get(f"http://{bind}/metrics")[1]
    now.state = WorkerState.DRAINING
    status, body = get(f"http://{bind}/readyz")
    assert (status, json.loads(body)["state"]) == (503, "draining")
    assert get(f"http://{bind}/readyz?draining=ok")[0] == 200
    assert get(f"http://{bind}/etc/passwd")[0] == 404
