"""Collect an engine's variants in several ways, for test_gpu_compile.py.

Run as a program with a model folder, without TRITON_INTERPRET. Prints one JSON object: the variants
of whole and shortened models, and of steps taken on real tensors.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import JITFunction

from headrace.kernels import checks
from headrace.kernels.precompile import Variant, collecting
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.gpu_compile import collect_variants, shortened, take_steps
from headrace.worker.engine.gpu_graphs import Graphs
from headrace.worker.frames import EngineConfig

HOPPER, NAME = (9, 0), "NVIDIA H200"
META = torch.device("meta")


def keys_of(variants: dict[str, Variant]) -> list[str]:
    return sorted(f"{variant.name} {variant.key}" for variant in variants.values())


def whole(config: EngineConfig, arch: Architecture) -> list[str]:
    with collecting(HOPPER) as variants, torch.inference_mode():
        take_steps(config, arch, NAME, META)
    return keys_of(variants)


def on_real_tensors(config: EngineConfig, arch: Architecture) -> list[str]:
    """Return the keys that Triton makes of CPU tensors with addresses, by itself."""
    checks.is_interpreted = lambda: True  # else launchers refuse the CPU
    graphs: Any = Graphs
    graphs.prepare = lambda self, key, launch: launch()
    found: set[str] = set()

    def note(*, key, fn, **_):
        found.add(f"{fn.name} {key}")
        return True

    kernels: Any = JITFunction
    run = kernels.run

    def launch(kernel, *args, grid, warmup, **options):
        return run(kernel, *args, grid=grid, warmup=True, **options)

    with collecting(HOPPER), torch.inference_mode():
        kernels.run, knobs.runtime.jit_cache_hook = launch, note
        take_steps(config, arch, NAME, torch.device("cpu"))
    return sorted(found)


def main() -> None:
    folder = Path(sys.argv[1])
    arch = Architecture.from_folder(folder)
    config = EngineConfig(str(folder), max_num_seqs=24, max_step_tokens=48, max_seq_tokens=128)
    fp8 = EngineConfig(
        str(folder), kv_dtype="fp8", weights_dtype="fp8", max_num_seqs=4, max_step_tokens=32,
        max_seq_tokens=128,
    )  # fmt: skip
    # Sixteen: no number of layers may make a kernel of its own, as Triton does of multiples.
    deep = replace(arch, num_layers=16, windows=((None, 32, None) * 6)[:16])
    result = {
        "real": on_real_tensors(config, shortened(arch, config)),
        "meta": sorted(f"{v.name} {v.key}" for v in collect_variants(config, arch, NAME, HOPPER)),
        "deep": [whole(config, deep), whole(config, shortened(deep, config))],
        "deep_fp8": [whole(fp8, deep), whole(fp8, shortened(deep, fp8))],
        "num_layers": [shortened(deep, config).num_layers, shortened(deep, fp8).num_layers],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
