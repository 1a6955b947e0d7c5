"""Measure, on this GPU, how each narrow linear layer is best run, and write its tuning table.

    python -m bench.tune --out kernels/tuning/nvidia-h200.json [--models M ...] [--ms 1 2 ...]
                         [--pdl] [--max-seconds 150] [--jobs N]

For every (op, n, k) of three models and each row count: all candidate configs and cuBLAS, the
latter with the norm, silu-multiply and addition launches that ours has within. In this order:

1. Compiled: all candidates, in `--jobs` processes that share Triton's cache, without running.
2. Timed: one CUDA graph of calls on rotating weights (from HBM, not L2), the median of replays.
3. Checked: the fastest config against the reference, on poisoned outputs; a wrong one is named,
   left out, and the next fastest checked.

Invariants:
1. No config is written that was not checked, and none that cuBLAS beats.
2. `--max-seconds` bounds the whole: what was not reached is said, and the table written without it.
3. Of configs within CLOSE of the best one, that which other row counts of the shape have already
   is taken: each one more is compiled when an engine first starts.
4. With `--pdl` the winner is timed with programmatic dependent launch too, after itself; that gain
   exists only where the launch before also lets its successor begin early.

Run from the repository root, with PYTHONPATH=.imports unless headrace is installed. Exit status: 0,
or 1 if a config gave a wrong result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction, MockTensor

from headrace.bench.kernel_cases.skinny import (
    LAYERS,
    MAX_ERROR,
    Buffers,
    Layer,
    candidates,
)
from headrace.kernels.tuning import Choice, SkinnyConfig, as_json

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
#: a config this much slower than the best is as good, and saves a compile if it is in use already.
CLOSE = 0.015
#: device time of one graph, and replays of it that are timed.
GRAPH_US, NUM_REPLAYS = 400.0, 7
#: share of the time that compiling may take.
COMPILE_SHARE = 0.6
HBM_BYTES_PER_S = 4.3e12


# -- compiling -------------------------------------------------------------------------------


def compile_only(layer: Layer, m: int, config: SkinnyConfig) -> str | None:
    """Compile one candidate into Triton's cache, as its launch would; return what went wrong."""
    original = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        mocks = [MockTensor(arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return original(kernel, *mocks, grid=grid, warmup=True, **options)

    try:
        with mock.patch.object(JITFunction, "run", run):
            # On tensors that have shapes and no memory.
            Buffers(layer, m, "meta").run(config)
    except (triton.TritonError, ValueError) as error:
        return f"{layer.model} {layer.name} m{m} {config.text()}: {str(error).splitlines()[0]}"
    return None


Job = tuple[Layer, int, SkinnyConfig]


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """Drop what compiles to the same: rows count by their tile, by being 1 and by 16 dividing."""
    kept: dict[object, Job] = {}
    for layer, m, config in jobs:
        rows = None if config.method == "rows" else (m == 1, m % 16 == 0, max(16, m))
        kept.setdefault((layer.op, layer.n, layer.k, config, rows), (layer, m, config))
    return list(kept.values())


def compile_all(pool: ProcessPoolExecutor, jobs: Sequence[Job], until: float) -> None:
    """Compile until all is done or the time is up; what fails is named."""
    start, num_done = time.monotonic(), 0
    futures = [pool.submit(compile_only, *job) for job in distinct(jobs)]
    try:
        for future in as_completed(futures, timeout=max(1.0, until - start)):
            num_done += 1
            if failure := future.result():
                print(f"does not compile: {failure}", flush=True)
    except TimeoutError:
        left = sum(future.cancel() for future in futures)
        print(f"out of time for compiling: {left} launches are left to be compiled when timed")
    print(f"compiled {num_done} launches in {time.monotonic() - start:.0f} s", flush=True)


# -- measuring -------------------------------------------------------------------------------


def time_us(buffers: Buffers, choice: Choice) -> float | None:
    """Return the median time of a call in a graph; None where the device has not what it needs."""
    try:
        buffers.run(choice)
    except (triton.TritonError, ValueError, RuntimeError) as error:
        print(f"  cannot run {choice}: {error}")
        return None
    expected_us = 2.0 + buffers.layer.weight_bytes / HBM_BYTES_PER_S * 1e6
    # At least each copy once: fewer calls than copies could stay in the L2 from replay to replay.
    num_calls = max(4, len(buffers.weights), min(48, round(GRAPH_US / expected_us)))
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph: it collects garbage at each capture, which takes longer than all else.
    torch.cuda.synchronize()
    graph.capture_begin()
    for _ in range(num_calls):
        buffers.run(choice)
    graph.capture_end()
    graph.replay()
    return statistics.median(elapsed_us(graph.replay) for _ in range(NUM_REPLAYS)) / num_calls


def elapsed_us(act: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    act()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


@dataclass
class Found:
    """What was measured of one layer at one row count, us."""

    layer: Layer
    m: int
    cublas_us: float
    ours: SkinnyConfig | None = None  # None = no config of ours ran and was right
    ours_us: float = float("inf")

    @property
    def choice(self) -> Choice:
        return self.ours if self.ours and self.ours_us < self.cublas_us else "cublas"

    @property
    def best_us(self) -> float:
        return min(self.ours_us, self.cublas_us)

    @property
    def least_us(self) -> float:
        return self.layer.min_bytes(self.m) / HBM_BYTES_PER_S * 1e6

    def entry(self) -> dict[str, Any]:
        layer = self.layer
        key = {"op": layer.op, "n": layer.n, "k": layer.k, "m": self.m}
        times = {"us": round(self.best_us, 2), "cublas_us": round(self.cublas_us, 2)}
        return key | {"config": as_json(self.choice)} | times

    def line(self) -> str:
        ratio = self.cublas_us / self.ours_us
        return (
            f"{self.layer.model:13} {self.layer.name:8} {self.m:3} "
            f"{self.ours.text() if self.ours else '-':28} {self.ours_us:8.2f} us "
            f"{self.least_us / self.ours_us:5.0%} of 4.3 TB/s  cublas {self.cublas_us:8.2f} us "
            f"x{ratio:.2f}{'' if ratio > 1 else '  cublas'}"
        )


@dataclass
class Tuning:
    """What was found so far, and the configs that an engine compiles for it."""

    found: list[Found] = field(default_factory=list)
    in_use: dict[tuple[str, int, int], set[SkinnyConfig]] = field(default_factory=dict)
    num_wrong: int = 0

    def tune(self, layer: Layer, m: int) -> None:
        """Time all candidates for one layer and row count, and keep the checked winner."""
        buffers = Buffers(layer, m)
        found = Found(layer, m, time_us(buffers, "cublas") or float("inf"))
        times = {config: time_us(buffers, config) for config in candidates(layer, m)}
        timed = {config: us for config, us in times.items() if us is not None}
        found.ours = self.best_right(buffers, timed)
        if found.ours is not None:
            found.ours_us = timed[found.ours]
        if found.choice != "cublas":
            self.in_use.setdefault((layer.op, layer.n, layer.k), set()).add(found.choice)
        self.found.append(found)
        print(found.line(), flush=True)

    def best_right(self, buffers: Buffers, timed: dict[SkinnyConfig, float]) -> SkinnyConfig | None:
        """Return the fastest config whose result is right, one in use if as good."""
        layer = buffers.layer
        in_use = self.in_use.get((layer.op, layer.n, layer.k), set())
        bound = min(timed.values(), default=0.0) * (1 + CLOSE)
        order = sorted(timed, key=lambda c: (not (c in in_use and timed[c] <= bound), timed[c]))
        return next((config for config in order if self.is_right(buffers, config)), None)

    def is_right(self, buffers: Buffers, config: SkinnyConfig) -> bool:
        error = buffers.error(config)
        if error <= MAX_ERROR:
            return True
        self.num_wrong += 1
        layer = buffers.layer
        print(f"WRONG: {layer.model} {layer.name} m{buffers.m} {config.text()}: error {error:.1e}")
        return False

    def early_jobs(self) -> list[Job]:
        return [(f.layer, f.m, replace(f.ours, uses_pdl=True)) for f in self.found if f.ours]

    def start_early(self, found: Found) -> None:
        """Let a winner start before its predecessor's end, where that is right and faster."""
        if found.ours is None:
            return
        buffers = Buffers(found.layer, found.m)
        early = replace(found.ours, uses_pdl=True)
        us = time_us(buffers, early)
        print(f"{found.line()}  pdl {us or float('nan'):8.2f} us", flush=True)
        if us is not None and us < found.ours_us and self.is_right(buffers, early):
            found.ours, found.ours_us = early, us

    def lines(self) -> Iterator[str]:
        """Yield a line a model and row count: what a step's linear layers take, us."""
        totals: dict[tuple[str, int], list[float]] = {}
        for found in self.found:
            total = totals.setdefault((found.layer.model, found.m), [0.0, 0.0, 0.0])
            for index, us in enumerate((found.best_us, found.cublas_us, found.least_us)):
                total[index] += us * found.layer.per_step
        yield "linear layers of a step, us: best of both, cublas alone, roofline"
        for (model, m), (best, cublas, roofline) in totals.items():
            yield f"{model:13} {m:3} {best:9.0f} {cublas:9.0f} {roofline:9.0f}"

    def document(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name(),
            "source": "measured",
            "command": " ".join(["python -m headrace.bench.tune", *sys.argv[1:]]),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "entries": [found.entry() for found in self.found],
        }


def written(document: dict[str, Any]) -> str:
    """Return the table as JSON, an entry a line, so that a change of it can be read."""
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in document["entries"])
    head = json.dumps({k: v for k, v in document.items() if k != "entries"}, indent=1)
    return f'{head[:-2]},\n "entries": [\n{entries}\n]}}\n'


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the tuning table of this GPU.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--ms", nargs="+", type=int, choices=ROW_COUNTS, default=list(ROW_COUNTS))
    parser.add_argument("--pdl", action="store_true", help="allow programmatic dependent launch")
    parser.add_argument("--max-seconds", type=float, default=150.0)
    parser.add_argument("--jobs", type=int, default=16, help="processes that compile")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, pool: ProcessPoolExecutor, start: float) -> Tuning:
    """Compile, time and check all that was asked for, as far as the time goes."""
    end = start + options.max_seconds
    wanted = [(layer, m) for model in options.models for layer in LAYERS[model] for m in options.ms]
    jobs = [(layer, m, config) for layer, m in wanted for config in candidates(layer, m)]
    compile_all(pool, jobs, start + COMPILE_SHARE * options.max_seconds)
    tuning = Tuning()
    for number, (layer, m) in enumerate(wanted):
        if time.monotonic() > end:
            print(f"out of time: {len(wanted) - number} of {len(wanted)} layers and rows left out")
            return tuning
        tuning.tune(layer, m)
    if options.pdl:
        compile_all(pool, tuning.early_jobs(), end)
        for number, found in enumerate(tuning.found):
            if time.monotonic() > end:
                print(f"out of time: {len(tuning.found) - number} left without an early start")
                break
            tuning.start_early(found)
    return tuning


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("a tuning table is measured on a GPU; found none: run this on the machine it is for")
        return 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        # A graph is captured on any stream but the default one.
        with torch.cuda.stream(torch.cuda.Stream()):
            tuning = measure(options, pool, start)
        pool.shutdown(cancel_futures=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(written(tuning.document()), encoding="utf-8")
    print("\n".join(tuning.lines()))
    num, seconds = len(tuning.found), time.monotonic() - start
    print(f"wrote {num} entries to {options.out} in {seconds:.0f} s")
    return 1 if tuning.num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
