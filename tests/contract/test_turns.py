"""Turns: never too many, in the order of coming, and none is lost by who gives up."""

import threading
import time
from collections.abc import Callable

import pytest

from headrace.contract.turns import Turns

#: Seconds until a test fails that waits for another thread.
PATIENCE_S = 20.0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stand_in_line(turns: Turns, name: int, served: list[int]) -> threading.Thread:
    """Come with a thread of its own; return when it is in line."""

    def come() -> None:
        assert turns.take(PATIENCE_S)
        served.append(name)

    length = len(turns._line)
    thread = threading.Thread(target=come)
    thread.start()
    wait_for(lambda: len(turns._line) == length + 1)
    return thread


def test_invariant_1_no_more_than_so_many_are_out():
    turns = Turns(2)
    assert turns.take(0)
    assert turns.take(0)
    assert not turns.take(0.01)
    turns.give_back()
    assert turns.take(0)


def test_invariant_2_nobody_overtakes_who_waits():
    turns, served = Turns(1), list[int]()
    assert turns.take(0)
    threads = [stand_in_line(turns, name, served) for name in range(5)]
    for number, thread in enumerate(threads):
        turns.give_back()
        assert not turns.take(0), "what was given back is the first's in line already"
        thread.join(PATIENCE_S)
        assert served == list(range(number + 1))
    turns.give_back()
    assert turns.take(0)


def test_invariant_3_who_runs_out_of_time_takes_no_turn_along():
    turns = Turns(1)
    assert turns.take(0)
    assert not turns.take(0.01)
    turns.give_back()
    assert turns.take(0)


@pytest.mark.parametrize("has_come", [False, True])
def test_invariant_3_who_is_interrupted_takes_no_turn_along(monkeypatch, has_come):
    """A request that is ended while it waits, also in the moment in which its turn has come."""
    turns = Turns(1)
    assert turns.take(0)

    class Interrupted:
        """A lock whose second wait is ended from outside."""

        def __init__(self) -> None:
            self.num_waits = 0

        def acquire(self, timeout: float = -1) -> bool:
            self.num_waits += 1
            if self.num_waits == 1:
                return True
            if has_come:
                turns.give_back()
            raise KeyboardInterrupt

        def release(self) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr("headrace.contract.turns.threading.Lock", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            turns.take(PATIENCE_S)
    if not has_come:
        assert not turns.take(0)
        turns.give_back()
    assert turns.take(0)
