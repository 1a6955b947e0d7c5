"""Every kernel against its ceiling and against torch's own: right first, then timed.

    python -m bench.kernels [PART ...] [--quick] [--match TEXT,...] [--check] [--jobs N]
                            [--out FILE] [--max-seconds S]

A part is a file of bench/kernel_cases/; without names, all. The ceilings (part `copy`: a large
copy, a large matrix product) come first. What happens to a case, in order:

1. Compiled: in one of `--jobs` processes that share Triton's cache, by one call of `run`. One that
   raises or takes its process down is named, counted as broken, and takes no other with it.
2. Checked: `check` runs it on poisoned outputs and returns its error against a reference. Above
   `max_error`, or no number, it is WRONG: no time of it counts.
3. Timed: replays of a CUDA graph that holds several calls, after a warm-up; the median. A case
   rotates its own buffers, so that it does not measure the L2 cache.

One line a case: us, TB/s and its share of 4.3, TFLOP/s and its share of 790, error; last a table of
the best variant, the default and the peers of each workload. `--out` appends a JSON line a case.
`--max-seconds` ends the run early and says what was left out. `--check` stops after step 2.

Without a GPU nothing can be timed: `--check` then checks what a part's `tiny_cases()` yields, if it
has that function, in Triton's interpreter. Exit status: 0, or 1 if a case was wrong or broken.

Run from the repository root, with PYTHONPATH=.imports unless headrace is installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from headrace.bench import kernel_precompile, kernel_timing
from headrace.bench.roofline import BF16_FLOP_PER_S, HBM_BYTES_PER_S

#: the part that measures the device itself; always the first.
CEILINGS = "copy"
#: first word of the variants that are not ours.
PEERS = ("torch", "cublas", "cudnn")


def _spent() -> object:
    raise RuntimeError("this case was measured and has given its tensors back")


@dataclass
class Case:
    """One variant of one kernel on one workload; tensors are made inside the two functions."""

    part: str  # file of bench/kernel_cases/
    name: str  # workload: "qwen3-0.6b b256 ctx1536"
    variant: str  # "default", "tile64 w4 s3", or "torch sdpa": an implementation to beat
    run: Callable[[], object]  # launches on the current stream; capturable, no host sync
    check: Callable[[], float] | None = None  # ||out - ref|| / ||ref|| on poisoned outputs
    num_bytes: float = 0  # fewest bytes of HBM it must move
    flops: float = 0  # floating-point operations it must do
    max_error: float = 1e-2

    def drop_tensors(self) -> None:
        """Forget the functions, and so what they hold; the case cannot run any more."""
        self.run, self.check = _spent, None

    @property
    def label(self) -> str:
        return f"{self.part} | {self.name} | {self.variant}"

    @property
    def is_peer(self) -> bool:
        return self.variant.split()[0] in PEERS


@dataclass
class Outcome:
    """What came of a case; empty where a step was not reached."""

    case: Case
    error: float | None = None  # of check
    us: float | None = None
    is_graph: bool = True  # False: capture failed, so launch gaps are in the time
    failure: str = ""  # first line of what it raised
    is_fatal: bool = False  # nothing more can run on the device in this process

    @property
    def is_right(self) -> bool:
        # A NaN is above every bound: it is no number that passes.
        is_close = self.error is None or self.error <= self.case.max_error
        return is_close and not self.failure

    @property
    def bytes_per_s(self) -> float | None:
        return self.case.num_bytes / self.us * 1e6 if self.us and self.case.num_bytes else None

    @property
    def flop_per_s(self) -> float | None:
        return self.case.flops / self.us * 1e6 if self.us and self.case.flops else None

    def line(self) -> str:
        """Say it in one line."""
        parts = [f"{self.case.label:72s}"]
        if self.failure:
            return f"{parts[0]} BROKEN {self.failure}"
        if self.us is not None:
            parts.append(f"{self.us:9.2f} us" + ("" if self.is_graph else " (no graph)"))
        if rate := self.bytes_per_s:
            parts.append(f"{rate / 1e12:5.2f} TB/s {rate / HBM_BYTES_PER_S:4.0%}")
        if rate := self.flop_per_s:
            parts.append(f"{rate / 1e12:5.0f} TFLOP/s {rate / BF16_FLOP_PER_S:4.0%}")
        if self.error is not None:
            parts.append(f"error {self.error:.1e}")
        return "  ".join(parts + ([] if self.is_right else ["WRONG"]))

    def record(self) -> dict[str, object]:
        """Give the case and its figures as JSON values."""
        case, error = self.case, self.error
        return {
            "part": case.part,
            "name": case.name,
            "variant": case.variant,
            "us": self.us,
            "bytes_per_s": self.bytes_per_s,
            "flop_per_s": self.flop_per_s,
            "error": error if error is None or math.isfinite(error) else str(error),
            "max_error": case.max_error,
            "is_right": self.is_right,
            "is_graph": self.is_graph,
            "failure": self.failure,
        }


@dataclass
class Limits:
    """When to stop measuring."""

    max_seconds: float
    started_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.started_s + self.max_seconds - time.monotonic()


def find_parts() -> list[str]:
    """Return the names of all parts, the ceilings first."""
    names = {path.stem for path in (Path(__file__).parent / "kernel_cases").glob("*.py")}
    return sorted(names, key=lambda name: (name != CEILINGS, name))


def load_part(part: str) -> ModuleType:
    return importlib.import_module(f"headrace.bench.kernel_cases.{part}")


def list_cases(parts: list[str], *, quick: bool, match: str = "") -> list[Case]:
    """Return the parts' cases asked for, those of one workload together: they share its tensors."""
    cases = [case for part in parts for case in load_part(part).cases(quick)]
    wanted = match.split(",")
    cases = [case for case in cases if any(text in case.name for text in wanted)]
    places: dict[tuple[str, str], int] = {}
    for case in cases:
        places.setdefault((case.part, case.name), len(places))
    return sorted(cases, key=lambda case: places[case.part, case.name])


def free_tensors(part: str) -> None:
    """Drop what a part's cached factories hold, and give back the memory of what nothing holds."""
    for value in vars(load_part(part)).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def run_to_its_end(case: Case) -> None:
    """Run a case and wait for the device."""
    try:
        case.run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch.AcceleratorError as error:
        raise kernel_precompile.DeviceLost(first_line(error)) from error
    finally:
        case.drop_tensors()


def measure(case: Case, *, with_time: bool) -> Outcome:
    """Check a case, and time it if it is right; what it raises is its outcome."""
    outcome = Outcome(case)
    try:
        outcome.error = case.check() if case.check else None
        if with_time and outcome.is_right:
            timing = kernel_timing.time_calls(case.run)
            outcome.us, outcome.is_graph = timing.us, timing.is_graph
    except torch.AcceleratorError as error:
        outcome.failure, outcome.is_fatal = first_line(error), True
    except Exception as error:  # noqa: BLE001 (a broken variant must not end the others' run)
        outcome.failure = first_line(error)
    return outcome


def measure_all(
    cases: list[Case], broken: dict[str, str], limits: Limits, *, with_time: bool
) -> Iterator[Outcome]:
    """Yield an outcome a case, freeing each workload's tensors behind it."""
    for number, case in enumerate(cases):
        if limits.left_s <= 0:
            print(f"out of time: {len(cases) - number} cases left out, from {case.label}")
            return
        if number and (case.part, case.name) != (cases[number - 1].part, cases[number - 1].name):
            free_tensors(cases[number - 1].part)
        failure = broken.get(case.label)
        outcome = Outcome(case, failure=failure) if failure else measure(case, with_time=with_time)
        case.drop_tensors()
        yield outcome
        if outcome.is_fatal:
            print(f"the device is lost: {len(cases) - number - 1} cases left out")
            return


def summary(outcomes: list[Outcome]) -> Iterator[str]:
    """Yield a line a workload: its best variant, the default and the peers, in us."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.us is not None and outcome.is_right:
            groups.setdefault((outcome.case.part, outcome.case.name), []).append(outcome)
    for (part, name), group in groups.items():
        times = {outcome.case.variant: outcome.us or 0.0 for outcome in group}
        ours = {o.case.variant: o.us or 0.0 for o in group if not o.case.is_peer}
        best = min(ours, key=lambda variant: ours[variant]) if ours else ""
        shown = {f"best = {best}": times[best]} if best else {}
        shown |= {"default": times["default"]} if "default" in times else {}
        shown |= {variant: us for variant, us in times.items() if variant not in ours}
        cells = "  ".join(f"{variant} {us:.2f}" for variant, us in shown.items())
        yield f"{part:16s} {name:36s} {cells}"


def run_on_gpu(parts: list[str], options: argparse.Namespace) -> list[Outcome]:
    """Compile, check and time the parts' cases; print as they come."""
    limits = Limits(options.max_seconds)
    cases = list_cases(parts, quick=options.quick, match=options.match)
    print(f"{len(cases)} cases of {', '.join(parts)} on {torch.cuda.get_device_name()}", flush=True)
    quick = ["--quick"] if options.quick else []
    broken = kernel_precompile.compile_all(
        [case.label for case in cases],
        [
            *(sys.executable, "-m", "headrace.bench.kernels", *parts, *quick),
            *("--match", options.match, "--share"),
        ],
        num_jobs=min(options.jobs, len(cases)),
        timeout_s=limits.left_s,
    )
    print(f"compiled in {time.monotonic() - limits.started_s:.1f} s", flush=True)
    outcomes: list[Outcome] = []
    for outcome in measure_all(cases, broken, limits, with_time=not options.check):
        outcomes.append(outcome)
        print(outcome.line(), flush=True)
        if options.out:
            with options.out.open("a") as file:
                device = torch.cuda.get_device_name()
                file.write(json.dumps({"device": device, **outcome.record()}) + "\n")
    if not options.check:
        print("\n".join(["", "us of the best variant, the default and the peers:"]))
        print("\n".join(summary(outcomes)), flush=True)
    return outcomes


def run_on_cpu(parts: list[str], options: argparse.Namespace) -> list[Outcome]:
    """Check the tiny cases of those parts that have some."""
    print("no GPU here: timing needs one" + ("" if options.check else "; --check needs none"))
    if not options.check:
        return []
    outcomes: list[Outcome] = []
    for part in parts:
        tiny = getattr(load_part(part), "tiny_cases", None)
        if tiny is None:
            print(f"{part}: has no tiny_cases(), nothing checked")
        for case in tiny() if tiny else ():
            outcomes.append(measure(case, with_time=False))
            print(outcomes[-1].line(), flush=True)
    return outcomes


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(find_parts()))
    parser.add_argument("--quick", action="store_true", help="default variants, main shapes")
    parser.add_argument("--match", default="", help="only workloads with one of these, by comma")
    parser.add_argument("--check", action="store_true", help="no timing")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--out", type=Path, help="file that gets a JSON line a case")
    parser.add_argument("--max-seconds", type=float, default=480.0)
    parser.add_argument("--share", help=argparse.SUPPRESS)  # of a compiling process: "2:8:17"
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(find_parts()):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {find_parts()}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for; return the exit status."""
    options = parse(arguments)
    parts = sorted(
        set(options.parts or find_parts()) | {CEILINGS}, key=lambda name: (name != CEILINGS, name)
    )
    if options.share:
        cases = list_cases(options.parts, quick=options.quick, match=options.match)
        keys = [(case.part, case.name) for case in cases]
        runs = [partial(run_to_its_end, case) for case in cases]
        kernel_precompile.compile_share(keys, runs, options.share, free_tensors)
        return 0
    run_here = run_on_gpu if torch.cuda.is_available() else run_on_cpu
    return 0 if all(outcome.is_right for outcome in run_here(parts, options)) else 1


if __name__ == "__main__":
    sys.exit(main())
