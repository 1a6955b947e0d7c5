"""The engine's life as the courier sees it, its process and its loop replaced by what they tell."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.contract.errors import ConfigurationError
from headrace.worker.engine_watch import LOAD_TIMEOUT_S, EngineWatch
from headrace.worker.evidence import Evidence
from headrace.worker.frames import Fatal, Ready, Stop
from headrace.worker.metrics import Metrics
from headrace.worker.restarts import PAUSES_S
from headrace.worker.room import Room
from headrace.worker.stacks import ThreadStack

STEP_TIMEOUT_S = 30.0


class Link:
    """What EngineLink is to the watch: starts count as pids."""

    def __init__(self) -> None:
        self.pid = 0
        self.is_started = False
        self.ready: Ready | None = None
        self.ready_at = self.last_frame_at = 0.0
        self.sent: list[Any] = []
        self.status = 1
        self.remains: int | None = None
        self.stacks: list[ThreadStack] = []
        self.ends: list[bool] = []

    def start(self) -> None:
        self.pid, self.is_started, self.ready = self.pid + 1, True, None
        self.last_frame_at = time.monotonic()

    def send(self, command: Any) -> bool:
        self.sent.append(command)
        return True

    def ask_stacks(self) -> list[ThreadStack]:
        return self.stacks

    def last_stacks(self) -> list[ThreadStack]:
        return self.stacks

    def end(self, *, at_once: bool = False) -> int:
        self.ends.append(at_once)
        self.is_started, self.ready = False, None
        return self.status


class Case:
    """A watch with one engine started."""

    def __init__(self) -> None:
        self.link, self.handed_back = Link(), []
        self.sane: list[bool] = []  # what was said of engines, in order
        self.had: frozenset[str] = frozenset()  # what the engine has
        self.evidence: list[tuple[Evidence, frozenset[str]]] = []
        self.courier: Any = SimpleNamespace(num_jobs=0, fatal=None, lose_engine=lambda: self.had)
        self.room = Room()
        self.watch = EngineWatch(
            worker="w1",
            step_timeout_s=STEP_TIMEOUT_S,
            link=self.link,  # type: ignore[arg-type]
            courier=self.courier,
            room=self.room,
            metrics=Metrics(),
            hand_back=self.hand_back,
            hand_back_dead=self.hand_back_dead,
            next_engine=self.sane.append,
        )
        self.watch.start()

    def hand_back(self, why: str) -> None:
        self.handed_back.append(why)
        self.courier.num_jobs = 0

    def hand_back_dead(self, evidence: Evidence, in_engine: frozenset[str]) -> None:
        self.evidence.append((evidence, in_engine))
        self.hand_back("engine died")

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


def test_invariant_4_a_death_with_jobs_in_the_engine_says_of_what_and_whose(case):
    case.open()
    case.had = frozenset({"job_1"})
    case.courier.fatal = Fatal("bad_config", "no 7", "ValueError", "slots.py:take")
    case.turn(is_alive=False)
    ((evidence, had),) = case.evidence
    assert (evidence.signature, evidence.is_certain) == ("ValueError at slots.py:take: no N", True)
    assert had == {"job_1"}


def test_invariant_4_deaths_of_jobs_neither_break_the_watch_nor_make_it_wait_for_longer(case):
    case.had = frozenset({"job_1"})
    for _ in range(4):
        case.open()
        case.courier.fatal = Fatal("bad_config", "x", "ValueError", "slots.py:take")
        case.turn(is_alive=False)
        assert case.watch.broken is None
        assert case.watch._restarts.next_at - time.monotonic() <= PAUSES_S[0]
        case.watch._restarts.next_at = 0.0
        case.turn()


def test_invariant_4_what_stalls_is_certain_and_what_is_killed_is_not(case):
    case.open()
    case.had, case.courier.num_jobs = frozenset({"job_1"}), 1
    case.link.last_frame_at -= STEP_TIMEOUT_S + 1
    case.turn()
    case.watch._restarts.next_at = 0.0
    case.turn()
    case.open()
    case.link.status = -9
    case.turn(is_alive=False)
    assert [(each.signature, each.is_certain) for each, _ in case.evidence] == [
        ("stalled", True),
        ("SIGKILL", False),
    ]


def test_invariant_5_time_in_which_the_courier_stood_still_is_not_the_engines(case):
    case.open()
    case.courier.num_jobs = 1
    case.watch._turned_at -= STEP_TIMEOUT_S + 5  # this process was stopped
    case.link.last_frame_at -= STEP_TIMEOUT_S + 5
    case.turn()
    assert case.watch.num_deaths == 0
    case.link.last_frame_at -= STEP_TIMEOUT_S + 1
    case.turn()
    assert case.watch.num_deaths == 1, "it was watched all that time"


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


def stand_still(case: Case) -> None:
    case.open()
    case.courier.num_jobs = 2
    case.link.last_frame_at -= STEP_TIMEOUT_S + 1
    case.turn()


def test_invariant_6_an_engine_that_stands_still_is_dumped_and_killed_at_once(case, caplog):
    case.link.stacks = [ThreadStack("0x1 (current)", ("runner.py:240 collect", "loop.py:150 step"))]
    with caplog.at_level("INFO", "headrace"):
        stand_still(case)
    assert case.link.ends == [True]
    assert case.handed_back == ["engine died"]
    (stuck,) = [r.message for r in caplog.records if r.message.startswith("engine.stuck")]
    assert "num_jobs=2" in stuck
    (stands,) = [r.message for r in caplog.records if r.message.startswith("engine.stands")]
    assert "runner.py:240 collect < loop.py:150 step" in stands


def test_an_engine_that_died_of_a_signal_is_told_where(case, caplog):
    case.open()
    case.link.stacks = [ThreadStack("0x1 (current)", ("gpu_model.py:9 submit",))]
    with caplog.at_level("INFO", "headrace"):
        case.turn(is_alive=False)
    assert "engine.fell" in caplog.text
    assert "gpu_model.py:9 submit" in caplog.text


def test_invariant_6_an_engine_that_cannot_be_killed_ends_the_worker(case):
    case.link.remains = 77
    stand_still(case)
    assert case.handed_back == ["engine died"], "its jobs go on elsewhere"
    assert case.watch.broken == "the engine (pid 77) cannot be killed: its device hangs"


def test_the_last_steps_age_is_none_without_work_or_engine(case):
    case.open()
    case.link.last_frame_at -= 5
    assert case.watch.step_age_s == 0.0
    case.courier.num_jobs = 1
    assert 5 <= case.watch.step_age_s < 60
    case.turn(is_alive=False)
    assert case.watch.step_age_s == 0.0


def test_invariant_7_an_engine_that_dies_before_it_serves_makes_its_worker_unsound(case):
    case.open()
    assert (case.sane, case.watch.is_unsound) == ([True], False)
    case.had, case.courier.num_jobs = frozenset({"job_1"}), 1
    case.turn(is_alive=False)
    assert (case.sane, case.watch.is_unsound) == ([True], False), "it served: the next one decides"
    case.had = frozenset()
    for num_deaths in (1, 2):
        case.watch.start()
        case.turn(is_alive=False)
        assert case.sane == [True] + [False] * num_deaths
        assert case.watch.is_unsound
    assert case.watch._restarts.next_at > time.monotonic() + PAUSES_S[0], "its pauses grow"
    case.watch.start()
    case.open()
    assert (case.sane[-1], case.watch.is_unsound) == (True, False)
    case.turn()
    assert case.sane.count(True) == 2, "it is told once"


def test_a_worker_that_stops_tells_that_no_engine_comes(case):
    case.open()
    case.turn(is_alive=False, may_start=False)
    case.turn(is_alive=False, may_start=False)
    assert case.sane == [True, False]
