"""The clock's arithmetic, on a device that is a counter of milliseconds."""

from contextlib import contextmanager

import pytest
import torch

from headrace.bench import kernel_timing


class Device:
    """Every call takes `call_ms`; launching a graph takes 0.01 ms more."""

    def __init__(self, call_ms: float) -> None:
        self.call_ms, self.now_ms = call_ms, 0.0
        self.num_runs, self.num_captured, self.num_replays = 0, 0, 0
        self.is_capturing, self.can_capture = False, True

    def run(self) -> None:
        self.num_captured += self.is_capturing
        self.num_runs += not self.is_capturing
        self.now_ms += 0 if self.is_capturing else self.call_ms

    def replay(self) -> None:
        self.num_replays += 1
        self.now_ms += self.num_captured * self.call_ms + 0.01

    @contextmanager
    def capture(self, graph):
        if not self.can_capture:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.is_capturing = True
        yield
        self.is_capturing = False


@pytest.fixture
def device(monkeypatch):
    device = Device(call_ms=0.05)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at_ms = device.now_ms

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at_ms - self.at_ms

    class Graph:
        def replay(self):
            device.replay()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", device.capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return device


def test_a_call_s_time_is_a_replay_s_by_its_calls(device):
    timing = kernel_timing.time_calls(device.run)
    assert device.num_captured == 20  # of 0.05 ms, in a replay of 1 ms
    assert device.num_replays == kernel_timing.NUM_WARM_UPS + kernel_timing.NUM_REPEATS
    assert timing.is_graph
    assert timing.us == pytest.approx(50 + 10 / 20)


@pytest.mark.parametrize(("call_ms", "num_calls"), [(5.0, 4), (0.001, 64)])
def test_a_graph_has_calls_enough_to_rotate_and_not_too_many(device, call_ms, num_calls):
    device.call_ms = call_ms
    kernel_timing.time_calls(device.run)
    assert device.num_captured == num_calls


def test_what_no_graph_takes_is_timed_as_it_is_launched(device):
    device.can_capture = False
    timing = kernel_timing.time_calls(device.run)
    assert not timing.is_graph
    assert timing.us == pytest.approx(50)
    assert device.num_runs > 20 * kernel_timing.NUM_REPEATS
