"""Compile the kernels of an engine's steps on many cores, without a GPU's memory.

    python -m headrace.worker.engine.gpu_compile --config JSON --device-name NAME
                                                 --capability 9 0 --jobs N [--launchers]

The engine is built on the meta device, where tensors have shapes and no memory, and takes the steps
that its start takes; kernels/precompile.py notes which kernels they are made of. Then this process
forks into `--jobs` that compile them, the slowest first, each taking the next that is left.

Invariants:
 1. Each distinct kernel is compiled by one process, once.
 2. One that fails, or a process that dies, costs what it was compiling and nothing else.
 3. When stdin ends (the engine has died), all processes of the group end too.

Exit status: 0 when all is compiled, else 1. The last line on stdout says how many were.

Called by: gpu_compilers.py.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch

from headrace.kernels.precompile import (
    Capability,
    Variant,
    build_driver,
    collecting,
    compile_variant,
)
from headrace.worker.engine import gpu_start
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.gpu_draw import Need
from headrace.worker.engine.gpu_graphs import decode_buckets
from headrace.worker.engine.gpu_runner import GpuRunner
from headrace.worker.engine.weights import Keep, Weights, expected_shapes, merge_weights
from headrace.worker.frames import EngineConfig

#: kernels that take longest (all but the first up to 3.3 s of 36 s, sm_90, Triton 3.7): begun last,
#: one of them would be waited for alone.
SLOWEST = (
    "_decode_layers_kernel",
    *("_lm_head_kernel", "_narrow_kernel", "_finish_kernel"),
    *("_paged_prefill_kernel", "_paged_decode_kernel", "_survey_kernel", "_skinny_tiles_kernel"),
)
#: bytes of one number on the pipe of work.
INDEX_BYTES = 4


def collect_variants(
    config: EngineConfig,
    arch: Architecture,
    device_name: str,  # of the GPU, by which the narrow layers' kernels are chosen
    capability: Capability,
) -> list[Variant]:
    """Return every kernel variant that an engine of this config launches, the slowest first."""
    with collecting(capability) as variants, torch.inference_mode():
        take_steps(config, shortened(arch, config), device_name, torch.device("meta"))
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    return sorted(variants.values(), key=lambda v: (ranks.get(v.name, len(ranks)), v.key))


def shortened(arch: Architecture, config: EngineConfig) -> Architecture:
    """Return the model with only so many layers as differ in what is launched for them.

    They differ by window, in being the last, and over an fp8 pool by where their scales lie, which
    repeats every 16 bytes.
    """
    period = 4 if config.kv_dtype == "fp8" else 1
    kinds = [(window, index % period) for index, window in enumerate(arch.windows)]
    num_layers = 1 + max(kinds.index(kind) for kind in kinds)
    # One more, so that each kind is met before the last layer too.
    num_layers = min(num_layers + 1, arch.num_layers)
    return replace(arch, num_layers=num_layers, windows=arch.windows[:num_layers])


def take_steps(
    config: EngineConfig, arch: Architecture, device_name: str, device: torch.device
) -> None:
    """Launch all that a start launches, and all that later steps do."""
    dtype = gpu_start.DTYPES[config.dtype]
    state = gpu_start.make_state(config, arch, device)
    weights = empty_weights(arch, dtype, device, gpu_start.keep_of(config))
    with device:  # its tables of rotations are made on torch's default device
        model = gpu_start.make_model(config, arch, weights, state, device_name)
    gpu_start.try_step(config, arch, model, state, dtype)
    cache = gpu_start.allocate(config, arch, dtype, device, 1)
    if config.kv_dtype == "fp8":
        gpu_start.calibrate(config, arch, model, state, cache)
    GpuRunner(arch, model, cache, state, gpu_start.DEPTH).capture()
    for bucket in decode_buckets(state.num_slots):
        model.draw_due(bucket, Need.LOGPROBS)  # with all that LOGITS launches
    state.set_blocks(np.zeros((1, 3), np.int32))
    state.begin()


def empty_weights(
    arch: Architecture, dtype: torch.dtype, device: torch.device, keep: Keep
) -> Weights:
    """Return weights of the model's shapes and any values."""
    shapes = expected_shapes(arch)
    tensors = {name: torch.empty(s, dtype=dtype, device=device) for name, s in shapes.items()}
    return merge_weights(tensors, arch, lambda _, tensor: tensor, keep)


# -- processes -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    run: Callable[[], None]


def run_all(tasks: list[Task], num_jobs: int) -> list[str]:
    """Run every task in one of the forked processes; return name and reason of what failed."""
    work, work_end = os.pipe()
    said, said_end = os.pipe()
    # 64 KiB, what a pipe holds, are 16,000 numbers.
    os.write(work_end, b"".join(i.to_bytes(INDEX_BYTES, "little") for i in range(len(tasks))))
    os.close(work_end)
    processes = []
    for _ in range(min(num_jobs, len(tasks))):
        process = os.fork()
        if process == 0:
            _run_share(tasks, work, said_end)
        processes.append(process)
    os.close(work)
    os.close(said_end)
    ended = dict(line.split(" ", 1) for line in _lines_until_all_end(said))
    os.close(said)
    for process in processes:
        os.waitpid(process, 0)
    return [
        f"{task.name}: {failure}"
        for index, task in enumerate(tasks)
        if (failure := ended.get(str(index), "its process died"))
    ]


def _run_share(tasks: list[Task], work: int, said: int) -> None:
    """Run one task after another until none is left; never returns."""
    while number := os.read(work, INDEX_BYTES):
        index, failure = int.from_bytes(number, "little"), ""
        try:
            tasks[index].run()
        except Exception as error:  # noqa: BLE001 (outermost: told, and on with the next)
            text = str(error).strip().splitlines() or [""]
            failure = f"{type(error).__name__}: {text[0][:200]}"
        # Short enough for a pipe to take it whole.
        os.write(said, f"{index} {failure}\n".encode())
    os._exit(0)


def _lines_until_all_end(said: int) -> list[str]:
    """Return what the processes say until the last has ended; end them with the engine."""
    told, watched = b"", [said, sys.stdin.fileno()]
    while True:
        readable = select.select(watched, [], [])[0]
        if said in readable:
            got = os.read(said, 1 << 16)
            told += got
            if not got:
                return told.decode().splitlines()
        elif not os.read(sys.stdin.fileno(), 1):
            os.killpg(os.getpgrp(), signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    start_s = time.monotonic()
    options = _parse(arguments)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # so that a kill of the group takes nobody else
    torch.set_num_threads(1)  # a fork takes no other thread along
    config = msgspec.json.decode(options.config, type=EngineConfig)
    arch = Architecture.from_folder(Path(config.model_folder))
    capability = options.capability[0], options.capability[1]
    variants = collect_variants(config, arch, options.device_name, capability)
    collected_s = time.monotonic() - start_s
    tasks = [Task("driver", build_driver)] if options.launchers else []
    for variant in variants:

        def run(variant: Variant = variant) -> None:
            compile_variant(variant, builds_launcher=options.launchers)

        tasks.append(Task(variant.name, run))
    failures = run_all(tasks, options.jobs)
    for failure in failures:
        print(f"not compiled: {failure}")
    print(
        f"compiled {len(tasks) - len(failures)} of {len(tasks)} kernels in {options.jobs} "
        f"processes in {time.monotonic() - start_s:.1f} s, {collected_s:.1f} s of them listing"
    )
    return 1 if failures else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile an engine's kernels into the cache.")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--device-name", required=True)
    parser.add_argument("--capability", type=int, nargs=2, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("--launchers", action="store_true", help="where there is a libcuda")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
