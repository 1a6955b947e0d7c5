"""/readyz of a gateway: its own readiness, and how the workers are."""

import pytest

from headrace.contract import wire
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.test_bad_input import check_problem


@pytest.fixture
def beat(services, courier):
    """Workers of an emptied Redis that beat as they are told."""

    def beat(name: str, *, lifetime_ms: int = 60_000, **changes: object) -> None:
        fields = {
            "worker": name,
            "model": MODEL,
            "host": "h",
            "pid": 1,
            "state": "ready",
            "started_ms": 1,
            "step": 9,
            "step_age_ms": 0,
            "num_running": 0,
            "num_waiting": 0,
            "free_blocks": 1,
            "total_blocks": 1,
            "step_timeout_ms": 30_000,
        }
        services.workers.beat(wire.WorkerBeat(**(fields | changes)), lifetime_ms=lifetime_ms)

    return beat


def workers(client) -> dict:
    response = client.get("/readyz")
    assert response.status_code == 200
    return response.get_json()["workers"]


def test_without_workers_the_gateway_is_ready(client, courier):
    assert workers(client) == {
        "num_ready": 0,
        "num_stuck": 0,
        "num_other": 0,
        "num_silent": 0,
        "oldest_step_s": 0.0,
    }


def test_a_sick_worker_is_shown_and_the_gateway_stays_ready(client, beat):
    beat("well", step_age_ms=40)
    beat("stuck", step_age_ms=16_000)
    beat("stuck-and-draining", step_age_ms=21_500, state="draining")
    beat("drained", state="drained")
    assert workers(client) == {
        "num_ready": 1,
        "num_stuck": 2,
        "num_other": 1,
        "num_silent": 0,
        "oldest_step_s": 21.5,
    }


def test_a_worker_that_went_silent_is_counted_and_named_to_nobody(client, beat, services):
    beat("silent-one")
    services.redis.delete("hr:worker:silent-one")
    response = client.get("/readyz")
    assert response.get_json()["workers"]["num_silent"] == 1
    assert "silent-one" not in response.get_data(as_text=True)


def test_a_gateway_that_stops_is_not_ready_but_alive(settings, key):
    from headrace.gateway.app import create_app, services_of

    app = create_app(settings)
    client = app.test_client()
    assert client.get("/readyz").status_code == 200
    services_of(app).end_streams()
    check_problem(client.get("/readyz"), 503, "unavailable")
    assert client.get("/healthz").status_code == 200
    services_of(app).close()
