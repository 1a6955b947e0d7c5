"""Workers as operators see them, and their orders, on real stores; the workers are beats."""

from __future__ import annotations

import time
from typing import Any

import pytest

from headrace.contract import keys
from headrace.contract.ids import new_id
from headrace.contract.orders import Wanted, WorkerOrders
from headrace.contract.roles import Role
from headrace.contract.wire import GpuFigures, WorkerBeat
from headrace.gateway.dashboard.worker_answers import Worker, WorkerList
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL
from headrace.tests.gateway.operators import Browser, browser_of, make_operator
from headrace.tests.gateway.test_bad_input import check_problem

ACTIONS = ("drain", "resume", "restart", "quarantine")
GPU = GpuFigures(
    name="NVIDIA H200",
    utilization=0.75,
    memory_used_bytes=3 << 30,
    memory_total_bytes=140 << 30,
    power_w=512.5,
    temperature_c=61.0,
)


@pytest.fixture(scope="module")
def sessions(app):
    return {role: make_operator(app, f"workers-{role}", role) for role in Role}


@pytest.fixture
def operator(app, sessions) -> Browser:
    return browser_of(app, sessions[Role.OPERATOR])


@pytest.fixture
def orders(services) -> WorkerOrders:
    return WorkerOrders(services.engine)


@pytest.fixture(autouse=True)
def _empty(services):
    services.redis.flushall()


@pytest.fixture
def name() -> str:
    return new_id("w")


def beat_of(worker: str, **changes: Any) -> WorkerBeat:
    fields: dict[str, Any] = {
        "worker": worker,
        "model": MODEL,
        "host": "host",
        "pid": 7,
        "state": "ready",
        "started_ms": 1_720_000_000_000,
        "step": 9,
        "step_age_ms": 0,
        "num_running": 3,
        "num_waiting": 1,
        "free_blocks": 40,
        "total_blocks": 100,
        "version": "0.1.0",
        "engine_pid": 8,
        "gpus": (GPU,),
        "cached_blocks": 35,
        "max_num_seqs": 64,
        "num_held": 5,
        "num_preempted": 2,
        "prompt_tokens_total": 4_000,
        "prefix_hit_tokens_total": 1_000,
        "tokens_total": 70_000,
        "tokens_per_s": 812.5,
        "step_us": 3_500,
        "batch": 2.75,
    }
    return WorkerBeat(**(fields | changes))


def beat(services, worker: str, **changes: Any) -> None:
    services.workers.beat(beat_of(worker, **changes), lifetime_ms=60_000)


def die(services, worker: str, age_ms: int = 5_000) -> None:
    """Let the beat's lifetime run out, so long ago."""
    services.redis.delete(keys.worker_beat(worker))
    services.redis.pexpire(keys.worker_last(worker), keys.WORKER_LAST_S * 1000 - age_ms)


def shown(browser: Browser, worker: str) -> dict[str, Any]:
    answer = browser.get("/v1/admin/workers")
    assert answer.status_code == 200, answer.text
    WorkerList.model_validate_json(answer.data)
    (found,) = [one for one in answer.get_json()["workers"] if one["worker"] == worker]
    return found


# -- what is shown ---------------------------------------------------------------------------


def test_a_worker_is_shown_with_all_its_figures(operator, services, name):
    beat(services, name)
    found = shown(operator, name)
    assert found.pop("beat_age_s") < 60
    gpu = {
        "name": "NVIDIA H200",
        "utilization": 0.75,
        "memory_used_bytes": 3 << 30,
        "memory_total_bytes": 140 << 30,
        "power_w": 512.5,
        "temperature_c": 61.0,
    }
    assert found == {
        "worker": name,
        "model": MODEL,
        "state": "ready",
        "why": "",
        "version": "0.1.0",
        "host": "host",
        "pid": 7,
        "engine_pid": 8,
        "started_at": "2024-07-03T09:46:40Z",
        "gpus": [gpu],
        "gpu": gpu,
        "total_blocks": 100,
        "free_blocks": 40,
        "cached_blocks": 35,
        "kv_used": 0.25,
        "num_held": 5,
        "num_running": 3,
        "num_waiting": 1,
        "num_preempted": 2,
        "max_num_seqs": 64,
        "batch": 2.75,
        "prefix_hit_rate": 0.25,
        "tokens_per_s": 812.5,
        "step_ms": 3.5,
        "step_age_s": 0.0,
        "engine_restarts": 0,
        "order": None,
    }


def test_an_older_workers_beat_shows_what_it_has(operator, services, name):
    beat(services, name, version="", gpus=(), total_blocks=0, free_blocks=0, cached_blocks=0,
         prompt_tokens_total=0, prefix_hit_tokens_total=0, step_us=0)  # fmt: skip
    found = shown(operator, name)
    assert (found["version"], found["gpus"], found["gpu"]) == (None, [], None)
    assert (found["kv_used"], found["prefix_hit_rate"], found["step_ms"]) == (0.0, None, None)


@pytest.mark.parametrize("state", ["starting", "ready", "draining"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"step_age_ms": 10_001, "step_timeout_ms": 20_000}, "no step for over half its limit"),
        ({"engine_died_ms": -59_000}, "its engine died within the last minute"),
    ],
)
def test_a_worker_that_gives_a_reason_is_suspect(operator, services, name, state, changes, why):
    if "engine_died_ms" in changes:
        changes = {"engine_died_ms": int(time.time() * 1000) + changes["engine_died_ms"]}
    beat(services, name, state=state, **changes)
    found = shown(operator, name)
    if state == "starting" and "step_age_ms" in changes:
        assert found["state"] == state, "an engine that loads makes no steps"
    else:
        assert found["state"] == "suspect"
        assert why in found["why"]


def test_a_late_heartbeat_is_suspect_before_it_is_dead(operator, services, name):
    beat(services, name)
    services.redis.pexpire(keys.worker_last(name), keys.WORKER_LAST_S * 1000 - 2_100)
    found = shown(operator, name)
    assert (found["state"], found["why"]) == ("suspect", "its heartbeat is late")
    assert 2.1 <= found["beat_age_s"] < 60


@pytest.mark.parametrize(
    "changes",
    [
        {"step_age_ms": 10_000, "step_timeout_ms": 20_000},
        {"engine_died_ms": -61_000},
        {"state": "drained", "engine_died_ms": -1_000},
        {"state": "quarantined", "engine_died_ms": -1_000},
    ],
)
def test_a_worker_that_gives_no_reason_is_what_it_says(operator, services, name, changes):
    changes = dict(changes)
    if "engine_died_ms" in changes:
        changes["engine_died_ms"] += int(time.time() * 1000)
    beat(services, name, **changes)
    assert shown(operator, name)["state"] == changes.get("state", "ready")


def test_a_dead_worker_is_shown_with_what_is_still_its_own(operator, services, name, courier, key):
    ids = [services.ledger.accept_job(_row(key), idempotency_key=None, request_sha256=b"").job["id"]
           for _ in range(3)]  # fmt: skip
    services.ledger.pick_up(ids, name)
    services.ledger.pick_up(ids[:1], "another")  # taken over meanwhile
    beat(services, name)
    die(services, name)
    found = shown(operator, name)
    assert (found["state"], found["num_held"]) == ("dead", 2)
    assert "no heartbeat" in found["why"]
    assert (found["tokens_per_s"], found["num_running"], found["gpus"]) == (0.0, 0, [])
    assert (found["model"], found["host"], found["version"]) == (MODEL, "host", "0.1.0")
    assert found["beat_age_s"] >= 5


def _row(key) -> dict[str, Any]:
    return {
        "id": new_id("job"),
        "tenant_id": key.tenant_id,
        "key_id": key.id,
        "model": MODEL,
        "job_class": "interactive",
        "priority": "normal",
        "input": {"prompt": "p"},
        "sampling": {"max_tokens": 8},
        "meta": {},
        "cost_tokens": 12,
    }


def test_invariant_4_without_postgres_workers_are_shown_without_orders(
    services, name, orders, monkeypatch
):
    from headrace.contract.errors import DatabaseUnavailable
    from headrace.gateway.dashboard.workers import WorkerArea

    class Away(WorkerOrders):
        def all(self):
            raise DatabaseUnavailable("list orders: Postgres did not answer")

    orders.want(name, Wanted.DRAINED, by="ada")
    beat(services, name)
    found = WorkerArea(services.workers, Away(services.engine)).figures()[name]
    assert (found["state"], found["order"]) == ("ready", None)


# -- orders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "wanted"),
    [("drain", "drained"), ("resume", "serving"), ("quarantine", "quarantined")],
)
def test_an_action_writes_what_is_wanted_and_says_who(
    operator, services, orders, name, action, wanted
):
    beat(services, name)
    answer = operator.post(f"/v1/admin/workers/{name}/{action}", json={})
    assert answer.status_code == 202, answer.text
    found = Worker.model_validate_json(answer.data)
    assert found.order is not None
    assert (found.state, found.order.wanted, found.order.by) == (
        "ready",
        wanted,
        "workers-operator",
    )
    assert orders.of(name).wanted == wanted
    (row,) = services.audit.page(limit=1, action=f"worker.{action}")
    assert (row["actor"], row["target"], row["outcome"]) == ("workers-operator", name, "done")
    assert row["details"] == {"state": "ready"}


def test_a_restart_is_counted_and_leaves_what_is_wanted(operator, services, orders, name):
    beat(services, name)
    orders.want(name, Wanted.DRAINED, by="ada")
    for _ in range(2):
        assert operator.post(f"/v1/admin/workers/{name}/restart").status_code == 202
    assert (orders.of(name).wanted, orders.of(name).num_restarts) == (Wanted.DRAINED, 2)


def test_a_viewer_may_look_and_not_act(app, sessions, services, orders, name):
    beat(services, name)
    viewer = browser_of(app, sessions[Role.VIEWER])
    assert shown(viewer, name)["state"] == "ready"
    for action in ACTIONS:
        answer = viewer.post(f"/v1/admin/workers/{name}/{action}", json={})
        check_problem(answer, 403, "forbidden")
    assert orders.of(name).by == ""


def test_a_key_with_the_role_acts_under_its_id(app, services, orders, name):
    beat(services, name)
    key = services.accounts.create_key(tenant="ops", name="cli", role=Role.OPERATOR)
    answer = client_of(app, key).post(f"/v1/admin/workers/{name}/drain")
    assert answer.status_code == 202, answer.text
    assert orders.of(name).by == key.id


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "bad", ["nobody", "a b", "%C3%A9", "..%2F..%2Fjobs", "x" * 3000, "a%2Fb", "%00"]
)
def test_invariant_2_a_name_nobody_had_is_not_found_and_leaves_no_order(
    operator, orders, action, bad
):
    before = orders.all()
    check_problem(operator.post(f"/v1/admin/workers/{bad}/{action}", json={}), 404, "not_found")
    assert orders.all() == before


@pytest.mark.parametrize("action", ["drain", "resume", "quarantine"])
def test_invariant_2_a_dead_worker_finds_the_order_when_it_is_back(
    operator, services, orders, name, action
):
    beat(services, name)
    die(services, name)
    answer = operator.post(f"/v1/admin/workers/{name}/{action}", json={})
    assert (answer.status_code, answer.get_json()["state"]) == (202, "dead")
    assert orders.of(name).by == "workers-operator"


def test_invariant_2_a_worker_long_gone_that_has_an_order_can_be_resumed(operator, orders, name):
    orders.want(name, Wanted.QUARANTINED, by="ada")
    answer = operator.post(f"/v1/admin/workers/{name}/resume", json={})
    assert answer.status_code == 202, answer.text
    found = Worker.model_validate_json(answer.data)
    assert (found.state, found.model, found.beat_age_s) == ("dead", None, None)
    assert orders.of(name).wanted is Wanted.SERVING


def test_invariant_3_a_dead_worker_cannot_be_restarted(operator, services, orders, name):
    beat(services, name)
    die(services, name)
    check_problem(operator.post(f"/v1/admin/workers/{name}/restart"), 409, "conflict")
    assert orders.of(name).num_restarts == 0


def test_a_name_with_a_slash_is_one_name(operator, services, orders):
    beat(services, "rack/7 é")
    assert operator.post("/v1/admin/workers/rack%2F7%20%C3%A9/drain").status_code == 202
    assert orders.of("rack/7 é").wanted is Wanted.DRAINED


# -- the page --------------------------------------------------------------------------------


def test_the_page_shows_workers_and_their_buttons_to_those_who_may(app, sessions, services, name):
    beat(services, name)
    evil = "<script>alert(1)</script>"
    beat(services, evil, model="<img src=x>", host="{{ 7 * 7 }}", state="draining")
    for role in (Role.VIEWER, Role.OPERATOR):
        page = browser_of(app, sessions[role]).get("/dashboard/workers")
        assert page.status_code == 200, page.text
        assert f'data-live-row="{name}"' in page.text
        assert "<script>alert" not in page.text
        assert "<img src=x>" not in page.text
        assert "&lt;img src=x&gt;" in page.text
        assert "{{ 7 * 7 }}" in page.text
        has_buttons = f'data-post="/v1/admin/workers/{name}/drain"' in page.text
        assert has_buttons is (role is Role.OPERATOR)
        assert ("<template>" in page.text, "data-post" in page.text) == (True, has_buttons)
    quoted = "%3Cscript%3Ealert%281%29%3C/script%3E"
    assert f'data-post="/v1/admin/workers/{quoted}/drain"' in page.text


def test_the_page_says_what_to_do_where_there_is_no_worker(operator):
    page = operator.get("/dashboard/workers")
    assert page.status_code == 200
    assert "No worker was seen within the hour" in page.text
