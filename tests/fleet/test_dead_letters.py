"""From a job that kills its engine to its dead letter, and from there to a job that succeeds.

The stub's poison plays the fault, and a worker without it the repair; all else is as in production.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from headrace.contract.accounts import Accounts
from headrace.contract.database import connect
from headrace.contract.roles import Role
from headrace.tests.fleet.fleet_parts import Fleet, wait_for
from headrace.worker.engine.stub import stub_token

VOCAB = 49152
#: A prompt that holds it is poison; after it: how the engine dies, and at which output token.
POISON_ID = 1000
RAISE = 6
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_folder) -> Iterator[Fleet]:
    settings = {"HEADRACE_RUNNER": "stub", "HEADRACE_LEASE_S": "2"}
    made = Fleet(tmp_path_factory.mktemp("dead-letters"), smollm2_folder, settings)
    made.start_servers()
    try:
        engine = connect(made.postgres.url)
        key = Accounts(engine).create_key(tenant="ops", name="o", role=Role.OPERATOR)
        made.operator_key = key.secret
        engine.dispose()
        made.start("tasks", "tasks")
        made.start_gateway()
        made.start_worker(HEADRACE_STUB_POISON=str(POISON_ID))
        yield made
    finally:
        made.stop()


def submit(fleet: Fleet, ids: list[int], seed: int) -> str:
    sampling = {"max_tokens": NUM_TOKENS, "temperature": 1.0, "seed": seed}
    return fleet.submit(prompt_token_ids=ids, sampling=sampling)["id"]


def ask(fleet: Fleet, method: str, path: str, **options: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {fleet.operator_key}"}
    answer = fleet.call(method, f"/v1/admin/{path}", headers=headers, **options)
    assert answer.status_code < 300, answer.text
    return answer.json()


def test_poison_becomes_a_letter_and_its_replay_on_a_repaired_engine_succeeds(fleet):
    dead = submit(fleet, [POISON_ID, RAISE, 2], seed=4)
    # Alone in its engine each time, it needs two; each must first start on a busy machine.
    wait_for(lambda: fleet.job(dead)["attempt"] == 2, "it runs a second time", fleet)
    ended = fleet.wait_status(dead, "failed", "succeeded")
    assert (ended["status"], ended["error"]["code"]) == ("failed", "poison")
    assert "ask the operator" in ended["error"]["detail"]

    (letter,) = ask(fleet, "GET", "dead-letters")["dead_letters"]
    assert letter["job_id"] == dead
    assert letter["num_runs"] in (2, 3)
    assert "RuntimeError" in letter["signature"]
    assert letter["signature"] not in fleet.call("GET", f"/v1/jobs/{dead}").text
    assert "stub.py" not in fleet.call("GET", f"/v1/jobs/{dead}/events").text
    (group,) = ask(fleet, "GET", "dead-letters/groups")["groups"]
    assert (group["signature"], group["num_letters"]) == (letter["signature"], 1)

    fleet.end("worker")
    fleet.start_worker("repaired")
    body = {"filter": {"signature": letter["signature"]}, "rate_per_min": 60}
    replay = ask(fleet, "POST", "replays", json=body | {"expect": 1})["replay"]["id"]
    wait_for(lambda: ask(fleet, "GET", f"replays/{replay}")["state"] == "done", "done", fleet)
    made = ask(fleet, "GET", f"dead-letters/{dead}")["replayed_as"]
    done = fleet.wait_status(made, "succeeded")
    assert done["output"]["token_ids"] == [stub_token(4, n, VOCAB) for n in range(NUM_TOKENS)]
    assert done["input"] == {"prompt_token_ids": [POISON_ID, RAISE, 2]}
    assert ask(fleet, "GET", f"dead-letters/{dead}")["replayed_status"] == "succeeded"
    assert fleet.job(dead)["status"] == "failed", "a job ends once"
