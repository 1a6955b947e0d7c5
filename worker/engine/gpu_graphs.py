"""CUDA graphs of steps, captured when first needed and kept.

A step is a fixed sequence of a few hundred launches on fixed memory. Launched one by one they cost
the host 5 to 10 us each, as a graph 10 us all together. What is captured is named by a key (kind
and bucket); all graphs share one memory pool, since they run one after another.

Invariants:
 1. A captured launch is not run by the capture; `run` replays it, so a step has its effect once.
 2. A bucket is at least the rows asked for, and the largest is what the engine can ask for.

On a device without graphs (the CPU, where Triton interprets) `run` just launches. On the meta
device, where launches have no effect, `prepare` launches: gpu_compile.py notes the kernels.

Owned by gpu_runner.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Captured launches by key."""

    def __init__(self, device: torch.device) -> None:
        self._is_captured, self._is_meta = device.type == "cuda", device.type == "meta"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._is_captured else None

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Replay the launches of this key; capture them first if they never ran."""
        if not self._is_captured:
            launch()
            return
        self.prepare(key, launch)
        self._graphs[key].replay()

    def prepare(self, key: Hashable, launch: Callable[[], None]) -> None:
        """Capture the launches of this key without running them."""
        if self._is_meta:
            launch()
        elif self._is_captured and key not in self._graphs:
            self._graphs[key] = self.capture(launch)

    def capture(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record launches on the current stream."""
        graph = torch.cuda.CUDAGraph()
        # relaxed: a kernel met for the first time may be compiled and loaded on the way.
        graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
        try:
            launch()
        finally:
            graph.capture_end()
        return graph


def decode_buckets(most: int) -> list[int]:
    """Return the numbers of rows that steps of decodes are rounded up to, `most` the last.

    Fine where a row is a large part of the step, then in tiles of the products.
    """
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32)]
    steps += range(512, 4096 + 1, 64)
    # What cuBLAS 13.1 takes for llama-8b's gate_up at 448 rows is slower than at 512: 270 us, 157.
    steps.remove(448)
    return [step for step in steps if step < most] + [most]


def row_buckets(most: int) -> list[int]:
    """Return the numbers of rows that steps with chunks are rounded up to, `most` the last."""
    steps = [16, 32, 64, 128, 192, *range(256, 1024, 128), *range(1024, 2048, 256)]
    steps += [*range(2048, 4096, 512), *range(4096, 16384 + 1, 1024)]
    return [step for step in steps if step < most] + [most]


def bucket_of(buckets: list[int], num_rows: int) -> int:
    """Return the smallest bucket that holds so many rows."""
    return buckets[bisect.bisect_left(buckets, num_rows)]
