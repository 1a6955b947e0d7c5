"""Collect the variants of a few launches, on meta tensors and on real ones, and compile some.

Run as a program, without TRITON_INTERPRET. Prints one JSON object: the keys of the same launches
made on meta tensors and on CPU tensors with addresses, whether each repeated launch was noted once,
and what two passes of compiling left in Triton's cache.
"""

import json
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import JITFunction

from headrace.kernels import checks
from headrace.kernels import step as layout
from headrace.kernels.embed import embed_rms_norm
from headrace.kernels.lm_head import lm_head_draw, lm_head_work
from headrace.kernels.penalise import penalise_rows
from headrace.kernels.precompile import NO_DEVICE, Variant, collecting, compile_variant
from headrace.kernels.sample import sample, sample_work
from headrace.kernels.step import write_words

HOPPER = (9, 0)


def launches(device: torch.device) -> None:
    """Launch on columns at odd offsets of one state, on 1, 24 and 32 rows, and on slices."""
    state = torch.zeros(40, 83, dtype=torch.int32, device=device)
    i32, f32, seeds = state[:, 3], state.view(torch.float32)[:, 5], state[:, 6:8]
    counts = torch.zeros(40, 512, dtype=torch.int16, device=device)
    for num_rows in (1, 24, 32):
        logits = torch.zeros(num_rows, 512, device=device)
        rows = torch.zeros(64, dtype=torch.int32, device=device)[4 : 4 + num_rows]
        penalise_rows(logits, rows, f32, f32, f32, counts, i32, state[:, 8:40], f32_bias(state))
        sample(logits, rows, f32, i32, f32, f32, seeds, i32, sample_work(32, 512, device))
        hidden, lm_head = (torch.zeros(n, 64, device=device) for n in (num_rows, 512))
        lm_head_draw(hidden, lm_head, rows, f32, seeds, i32, lm_head_work(32, 512, device))
        weight = torch.zeros(100, 48, dtype=torch.bfloat16, device=device)
        embed_rms_norm(rows, weight, weight.view(-1)[20:68], 1e-6)
    write_words(state, torch.zeros(2, 64, dtype=torch.int32, device=device), 32)


def f32_bias(state: torch.Tensor) -> torch.Tensor:
    return state.view(torch.float32)[:, 40:72]


def keys_of(variants: dict[str, Variant]) -> list[str]:
    return sorted(f"{variant.name} {variant.key}" for variant in variants.values())


def real_keys() -> list[str]:
    """Return what Triton asks its cache for, given tensors that have addresses."""
    checks.is_interpreted = lambda: True  # else launchers refuse the CPU
    found: list[str] = []

    def note(*, key, fn, **_):
        found.append(f"{fn.name} {key}")
        return True

    kernels: Any = JITFunction
    run = kernels.run

    def launch(kernel, *args, grid, warmup, **options):
        return run(kernel, *args, grid=grid, warmup=True, **options)

    with collecting(HOPPER):  # for its driver; the keys are made by Triton alone
        kernels.run, knobs.runtime.jit_cache_hook = launch, note
        launches(torch.device("cpu"))
    return sorted(set(found))


def main() -> None:
    real = real_keys()
    with collecting(HOPPER) as variants:
        launches(torch.device("meta"))
        num_once = len(variants)
        launches(torch.device("meta"))
    is_restored = knobs.runtime.jit_cache_hook is None and not any(
        NO_DEVICE in kernel.device_caches
        for kernel in vars(layout).values()
        if isinstance(kernel, JITFunction)
    )
    chosen = [
        v for v in variants.values() if v.name in ("_penalise_rows_kernel", "_write_words_kernel")
    ]
    files = []
    for _ in range(2):
        for variant in chosen:
            compile_variant(variant, builds_launcher=False)
        files.append(len(list(Path(knobs.cache.dir).rglob("*.cubin"))))
    result = {
        "meta": keys_of(variants),
        "real": real,
        "num_once": num_once,
        "num_twice": len(variants),
        "is_restored": is_restored,
        "num_chosen": len(chosen),
        "cubins": files,
        "triton": triton.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
