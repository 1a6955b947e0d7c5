"""The ceilings of the device: a large copy, and a large matrix product through cuBLAS.

What every other case is compared with was measured like this on one H200 (4.3 TB/s read + written,
790 TFLOP/s); a device that is far off here is not the one those figures are of. Also the product of
one row by a large weight, which reads and hardly writes: the ceiling of a linear layer in decode.

Called by: bench/kernels.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from headrace.bench.kernels import Case

#: elements of the copied tensor: 1 GiB of bf16, beyond any cache.
COPY_ELEMENTS = 1 << 29
CUBE = 8192
#: rows and columns of a weight as in a model of 8B; 235 MB, so one buffer is enough.
WEIGHT = (28672, 4096)


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return ||found - wanted|| / ||wanted||; both fp32 or fp64."""
    return float((found - wanted).norm() / wanted.norm())


@lru_cache
def _copy_tensors(num_elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randn(num_elements, device="cuda", dtype=torch.bfloat16)
    return source, torch.empty_like(source)


def _copy(num_elements: int) -> Case:
    def run() -> object:
        source, target = _copy_tensors(num_elements)
        return target.copy_(source)

    def check() -> float:
        source, target = _copy_tensors(num_elements)
        target.fill_(float("nan"))
        run()
        return 0.0 if torch.equal(source, target) else 1.0

    num_bytes = 2 * 2 * num_elements
    return Case("copy", "1 GiB copy", "default", run, check, num_bytes=num_bytes)


@lru_cache
def _factors(num_rows: int, num_columns: int, inner: int) -> tuple[torch.Tensor, ...]:
    make = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(num_rows, inner, **make)  # pyright: ignore[reportArgumentType]
    weight = torch.randn(num_columns, inner, **make)  # pyright: ignore[reportArgumentType]
    out = torch.empty(num_rows, num_columns, **make)  # pyright: ignore[reportArgumentType]
    return x, weight, out


def _product(name: str, num_rows: int, num_columns: int, inner: int) -> Case:
    def run() -> object:
        x, weight, out = _factors(num_rows, num_columns, inner)
        return torch.mm(x, weight.t(), out=out)

    def check() -> float:
        x, weight, out = _factors(num_rows, num_columns, inner)
        out.fill_(float("nan"))
        run()
        # Some rows of it: the whole in fp64 would take longer than all other cases.
        rows = torch.linspace(0, num_rows - 1, min(num_rows, 16), device=x.device).long()
        return error_of(out[rows].double(), x[rows].double() @ weight.t().double())

    num_elements = num_rows * inner + num_columns * inner + num_rows * num_columns
    flops = 2 * num_rows * num_columns * inner
    return Case("copy", name, "default", run, check, 2 * num_elements, flops)


def cases(quick: bool) -> Iterator[Case]:
    """Yield the ceilings; the same ones, quick or not."""
    del quick
    yield _copy(COPY_ELEMENTS)
    yield _product("8192-cube product", CUBE, CUBE, CUBE)
    for num_rows in (1, 64, 256, 2048):
        yield _product(f"{num_rows} rows by {list(WEIGHT)}", num_rows, *WEIGHT)
