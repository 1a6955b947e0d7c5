"""The time of a device function without the host in it: replays of a CUDA graph.

Invariants:
1. What is timed was warmed up: compiled, its tensors made, its libraries loaded.
2. A graph holds enough calls that launching it is a small part of its time, and that a function
   that rotates its buffers goes through all of them.
3. The figure is the median of repeats, each between two events of the device's own clock.

Called by: kernels.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: ms of device time that one replay should last: launching a graph takes some 10 us.
REPLAY_MS = 1.0
#: calls in a graph: at least enough to rotate through the buffers, at most what captures quickly.
MIN_CALLS, MAX_CALLS = 4, 64
#: replays before the clock counts, and those that count.
NUM_WARM_UPS, NUM_REPEATS = 2, 15


@dataclass(frozen=True, slots=True)
class Timing:
    us: float  # a call, median
    is_graph: bool  # whether replays were timed, not launches


def time_calls(run: Callable[[], object]) -> Timing:
    """Time one call of `run` on the current GPU."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    num_calls = max(MIN_CALLS, min(MAX_CALLS, round(REPLAY_MS / max(_elapsed_ms(run), 1e-3))))
    replay, is_graph = _capture(run, num_calls)
    for _ in range(NUM_WARM_UPS):
        replay()
    times_ms = [_elapsed_ms(replay) for _ in range(NUM_REPEATS)]
    return Timing(statistics.median(times_ms) * 1e3 / num_calls, is_graph)


def _capture(run: Callable[[], object], num_calls: int) -> tuple[Callable[[], object], bool]:
    """Return a function that does all calls, and whether it replays a graph."""

    def call_all() -> None:
        for _ in range(num_calls):
            run()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call_all()
    except RuntimeError:
        # Some peers of ours synchronize or allocate in a way that no graph takes.
        torch.cuda.synchronize()
        return call_all, False
    return graph.replay, True


def _elapsed_ms(act: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    act()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
