"""Where a job's time went, on real workers with the real model: the spans are the job's wall time.

Wall time is from the job's row; what a client measures with its own clock, from sending the job to
seeing its end, is that and its way there and back.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest

from headrace.contract.accounts import Accounts
from headrace.contract.database import connect
from headrace.contract.roles import Role
from headrace.tests.fleet.fleet_parts import Event, Fleet

#: Part of the wall time that the spans may miss or have too much.
TOLERANCE = 0.05
NUM_TOKENS = 100
#: Milliseconds that the way to the client and back may take on a busy machine.
WAY_MS = 500.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, smollm2_folder) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("timeline"), smollm2_folder)
    made.start_servers()
    try:
        engine = connect(made.postgres.url)
        made.other_key = Accounts(engine).create_key(
            tenant="ops", name="k", role=Role.VIEWER
        ).secret  # fmt: skip
        engine.dispose()
        made.start("tasks", "tasks")
        made.start_gateway()
        made.start_worker("first")
        yield made
    finally:
        made.stop()


@dataclass
class Watched:
    """A job that was followed to its end, with what the client's clock said."""

    shown: dict[str, Any]
    wall_ms: float
    token_at_ms: list[float]  # arrival of each token event, after the sending

    @property
    def spans(self) -> list[tuple[str, int | None, float]]:
        return [(s["span"], s["attempt"], s["duration_ms"]) for s in self.shown["timeline"]]

    def length_of(self, *names: str) -> float:
        return sum(length for name, _, length in self.spans if name in names)


def watch(fleet: Fleet, on_token: Callable[[int], None] = lambda _: None) -> Watched:
    """Submit a job and follow it; `on_token` is called at each token event, with its number."""
    begun, arrivals, events = time.monotonic(), [], list[Event]()
    job = fleet.submit(
        messages=[{"role": "user", "content": "Count from one to fifty in words."}],
        sampling={"temperature": 0, "max_tokens": NUM_TOKENS},
    )["id"]
    for event in fleet.events(job):
        events.append(event)
        if event.name == "token":
            arrivals.append((time.monotonic() - begun) * 1000)
            on_token(len(arrivals))
    wall_ms = (time.monotonic() - begun) * 1000
    assert events[-1].name == "succeeded"
    key = {"Authorization": f"Bearer {fleet.other_key}"}
    shown = fleet.call("GET", f"/v1/admin/jobs/{job}", headers=key).json()
    return Watched(shown, wall_ms, arrivals)


def check_adds_up(watched: Watched) -> None:
    total_ms = sum(length for _, _, length in watched.spans)
    created, finished = (
        datetime.fromisoformat(watched.shown[name]) for name in ("created_at", "finished_at")
    )
    wall_ms = (finished - created).total_seconds() * 1000
    assert total_ms == pytest.approx(wall_ms, rel=TOLERANCE)
    assert total_ms == pytest.approx(watched.wall_ms, abs=TOLERANCE * wall_ms + WAY_MS)
    ends = itertools.accumulate(length for _, _, length in watched.spans)
    starts = [span["start_ms"] for span in watched.shown["timeline"]]
    assert starts == pytest.approx([0.0, *ends][:-1], abs=0.01)


def test_the_spans_of_a_job_are_its_wall_time(fleet):
    watch(fleet)  # the first job of an engine also pays for what is made once
    watched = watch(fleet)
    check_adds_up(watched)
    names = [name for name, _, _ in watched.spans]
    assert names == ["queue", "prepare", "prefill", "decode", "publish"]
    (attempt,) = watched.shown["attempts"]
    assert (attempt["resumed_at"], attempt["num_tokens"]) == (
        0, watched.shown["usage"]["completion_tokens"],
    )  # fmt: skip
    # Each part is where the client saw it, not only their sum.
    slack_ms = TOLERANCE * watched.wall_ms + WAY_MS
    before_first = watched.length_of("queue", "prepare", "prefill")
    assert before_first == pytest.approx(watched.token_at_ms[0], abs=slack_ms)
    seen_decode = watched.token_at_ms[-1] - watched.token_at_ms[0]
    assert watched.length_of("decode") == pytest.approx(seen_decode, abs=slack_ms)


def test_the_time_of_an_attempt_that_died_is_lost_and_counted(fleet):
    def kill_at_the_third(number: int) -> None:
        if number == 3:
            fleet.kill_group("first")
            fleet.start_worker("second", HEADRACE_DRAIN_S="0")  # hands back at once

    watched = watch(fleet, kill_at_the_third)
    check_adds_up(watched)
    first, second = watched.shown["attempts"]
    assert (first["worker"], first["outcome"], first["resumed_at"]) == ("first", None, None)
    assert (second["worker"], second["outcome"]) == ("second", "succeeded")
    assert second["resumed_at"] >= 3
    completion = watched.shown["usage"]["completion_tokens"]
    assert second["resumed_at"] + second["num_tokens"] == completion
    spans = [(name, number) for name, number, _ in watched.spans]
    assert spans == [
        ("queue", None), ("lost", 1), ("prepare", 2), ("prefill", 2), ("decode", 2), ("publish", 2),
    ]  # fmt: skip


def test_a_job_that_was_handed_back_waits_again(fleet):
    def drain_at_the_third(number: int) -> None:
        if number == 3:
            assert fleet.end("second") == 0
            fleet.start_worker("third")

    watched = watch(fleet, drain_at_the_third)
    check_adds_up(watched)
    spans = [(name, number) for name, number, _ in watched.spans]
    assert spans == [
        ("queue", None), ("prepare", 1), ("prefill", 1), ("decode", 1), ("publish", 1),
        ("queue", None), ("prepare", 2), ("prefill", 2), ("decode", 2), ("publish", 2),
    ]  # fmt: skip
    assert [a["outcome"] for a in watched.shown["attempts"]] == ["handed_back", "succeeded"]
