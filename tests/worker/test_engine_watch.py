"""The engine's life as the courier sees it, its process and its loop replaced by what they tell."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.contract.errors import ConfigurationError
from headrace.worker.engine_watch import LOAD_TIMEOUT_S, EngineWatch
from headrace.worker.frames import Fatal, Ready, Stop
from headrace.worker.metrics import Metrics
from headrace.worker.room import Room

STEP_TIMEOUT_S = 30.0


class Link:
    """What EngineLink is to the watch: starts count as pids."""

    def __init__(self) -> None:
        self.pid = 0
        self.is_started = False
        self.ready: Ready | None = None
        self.ready_at = self.last_frame_at = 0.0
        self.sent: list[Any] = []

    def start(self) -> None:
        self.pid, self.is_started, self.ready = self.pid + 1, True, None
        self.last_frame_at = time.monotonic()

    def send(self, command: Any) -> bool:
        self.sent.append(command)
        return True

    def end(self) -> int:
        self.is_started, self.ready = False, None
        return 1


class Case:
    """A watch with one engine started."""

    def __init__(self) -> None:
        self.link, self.handed_back = Link(), []
        self.courier: Any = SimpleNamespace(num_jobs=0, fatal=None)
        self.room = Room()
        self.watch = EngineWatch(
            worker="w1",
            step_timeout_s=STEP_TIMEOUT_S,
            link=self.link,  # type: ignore[arg-type]
            courier=self.courier,
            room=self.room,
            metrics=Metrics(),
            hand_back=self.hand_back,
        )
        self.watch.start()

    def hand_back(self, why: str) -> None:
        self.handed_back.append(why)
        self.courier.num_jobs = 0

    def open(self, gpu: str = "") -> None:
        self.link.ready = Ready(8, 64, 512, 100, "float32", 0.5, "cpu", 32, [], gpu)
        self.link.ready_at = self.link.last_frame_at = time.monotonic()
        self.room.opened(512, 512, 32)
        self.turn()

    def turn(self, *, is_alive: bool = True, may_start: bool = True) -> None:
        self.watch.turn(is_alive, may_start=may_start)


@pytest.fixture
def case() -> Case:
    return Case()


def test_invariant_1_an_engine_that_cannot_start_the_first_time_is_a_configuration_error(case):
    case.courier.fatal = Fatal("bad_config", "no such dtype")
    with pytest.raises(ConfigurationError, match="the engine cannot start: no such dtype"):
        case.turn(is_alive=False)


def test_invariant_1_once_one_has_served_a_start_that_fails_is_a_death(case):
    case.open()
    case.watch.replace()
    case.turn(is_alive=False)
    assert case.watch.num_deaths == 1
    assert case.watch.broken is None


def test_a_dead_engine_hands_its_jobs_back_leaves_no_room_and_is_started_again(case, monkeypatch):
    case.open(gpu="GPU-1")
    case.courier.num_jobs = 3
    case.turn(is_alive=False)
    assert case.handed_back == ["engine died"]
    assert case.room.left()[0] == 0
    assert case.watch.num_deaths == 1
    assert abs(case.watch.died_ms / 1000 - time.time()) < 60
    assert case.watch.gpu == "GPU-1", "the next one runs there or not at all"
    case.turn()
    assert not case.link.is_started, "after a pause"
    case.watch._restarts.next_at = 0.0
    case.turn(may_start=False)
    assert not case.link.is_started, "the worker is stopping"
    case.turn()
    assert (case.link.is_started, case.link.pid) == (True, 2)


def test_invariant_2_a_replacement_is_no_death_and_needs_no_pause(case):
    case.open()
    case.watch.replace()
    assert isinstance(case.link.sent[-1], Stop)
    assert (case.link.pid, case.link.is_started) == (2, True)
    assert (case.watch.num_deaths, case.watch.died_ms) == (0, 0)
    assert case.room.left()[0] == 0
    assert case.handed_back == []


def test_invariant_2_in_the_pause_after_a_death_a_replacement_starts_at_once(case):
    case.open()
    case.turn(is_alive=False)
    case.watch.replace()
    assert (case.link.pid, case.link.is_started, case.watch.num_deaths) == (2, True, 1)


def test_invariant_3_a_job_delivered_after_the_death_is_handed_back(case):
    case.open()
    case.turn(is_alive=False)
    case.courier.num_jobs = 1
    case.turn()
    assert case.handed_back == ["engine died", "no engine"]


def test_an_engine_stands_still_only_with_work_and_may_load_for_longer(case):
    case.link.last_frame_at -= STEP_TIMEOUT_S + 1
    case.turn()
    assert case.watch.num_deaths == 0, "it loads"
    case.open()
    case.link.last_frame_at -= STEP_TIMEOUT_S + 1
    case.turn()
    assert case.watch.num_deaths == 0, "it is idle"
    case.courier.num_jobs = 1
    case.link.last_frame_at -= STEP_TIMEOUT_S + 1
    case.turn()
    assert case.watch.num_deaths == 1
    assert LOAD_TIMEOUT_S > STEP_TIMEOUT_S


def test_the_second_hopeless_death_breaks_the_watch(case):
    for _ in range(2):
        case.open()
        case.courier.fatal = Fatal("device_lost", "the GPU fell off")
        case.turn(is_alive=False)
        case.watch._restarts.next_at = 0.0
        if case.watch.broken is None:
            case.turn()
    assert case.watch.broken == (
        "the engine died twice of what a restart does not cure: the GPU fell off"
    )
