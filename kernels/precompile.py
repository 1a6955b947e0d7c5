"""Compile kernels without launching them: what a real launch would look up is then on disk.

    with collecting((9, 0)) as variants:      # of every launch within, on meta tensors
        ...
    for variant in variants.values():
        compile_variant(variant)

Triton compiles a kernel once for each kind of arguments: dtypes, compile-time values, integers that
are 1 or divisible by 16, pointers that are divisible by 16, warps and stages. `collecting` has
Triton's own `JITFunction.run` make the key of each launch, with a stand-in for each tensor, and
takes note of every key that is new instead of compiling. No GPU is needed nor touched.

Invariants:
1. A variant has the key that the same launch has on a GPU whose allocations are aligned to 16 bytes
   (they are, to 512): a stand-in's address is its tensor's offset into its storage.
2. Each distinct variant is in the dict once, whatever the number of its launches.
3. Inside `collecting` nothing is compiled and nothing is launched; behind it launches are real
   again, and Triton knows nothing of what was collected.

Called by worker/engine/gpu_compile.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from headrace.kernels.triton_seam import is_interpreted

#: Triton's caches are by device; this is none, so that what is collected meets nothing real.
NO_DEVICE = -1
Capability = tuple[int, int]  # of a GPU: (9, 0) is Hopper


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel for one kind of arguments."""

    name: str  # of the kernel
    key: str  # Triton's, within the kernel
    compile: Callable[[], Any]  # under `_target` only
    capability: Capability


class _StandIn:
    """What Triton asks of a tensor to choose a variant."""

    __slots__ = ("_address", "dtype")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0


class _TargetDriver:
    """A GPU that only says what it is."""

    def __init__(self, capability: Capability) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_device(self) -> int:
        return NO_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextmanager
def _target(capability: Capability) -> Iterator[None]:
    """Compile for a GPU of this capability, whether there is one or not."""
    from triton.runtime.driver import driver

    config: Any = driver
    before = config._active  # not `active`, which would look for a GPU
    config._active = _TargetDriver(capability)
    try:
        yield
    finally:
        config._active = before


def _stand_in(value: Any) -> Any:
    return _StandIn(value) if isinstance(value, torch.Tensor) else value


@contextmanager
def collecting(capability: Capability) -> Iterator[dict[str, Variant]]:
    """Note the variants of all launches instead of launching; the dict fills as they are made."""
    if is_interpreted():
        raise RuntimeError(
            "variants are collected of kernels that Triton compiles; found its interpreter on: "
            "start a process without TRITON_INTERPRET"
        )
    from triton import knobs
    from triton.runtime.jit import JITFunction

    kernels: Any = JITFunction
    run, hook = kernels.run, knobs.runtime.jit_cache_hook
    collection = _Collection(capability, run)

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        collection.launch(kernel, args, options)

    kernels.run = launch
    knobs.runtime.jit_cache_hook = collection.note
    try:
        with _target(capability):
            yield collection.variants
    finally:
        kernels.run, knobs.runtime.jit_cache_hook = run, hook
        collection.forget()


class _Collection:
    """The variants met so far."""

    def __init__(self, capability: Capability, run: Callable[..., Any]) -> None:
        self.variants: dict[str, Variant] = {}
        self._capability, self._run = capability, run
        self._kernels: set[Any] = set()
        self._compile: Callable[[], Any] = partial(run)  # of the launch being made

    def launch(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Have Triton look this launch up; it calls `note` where it finds nothing."""
        if kernel not in self._kernels:
            self._kernels.add(kernel)
            kernel.device_caches.pop(NO_DEVICE, None)  # what `compile_variant` has left
        mocks = [_stand_in(value) for value in args]
        options = {name: _stand_in(value) for name, value in options.items()}
        self._compile = partial(self._run, kernel, *mocks, grid=(1,), warmup=True, **options)
        self._compile()

    def note(self, *, key: str, fn: Any, **_: Any) -> bool:
        """Take a key that Triton has not met; True tells Triton not to compile it."""
        kernel = fn.jit_function
        name = f"{fn.module}.{fn.name}"
        variant = Variant(fn.name, key, self._compile, self._capability)
        self.variants[hashlib.sha256(f"{name} {key}".encode()).hexdigest()] = variant
        # Something that is not None: Triton does not ask for this key again.
        kernel.device_caches[NO_DEVICE][0][key] = variant
        return True

    def forget(self) -> None:
        for kernel in self._kernels:
            kernel.device_caches.pop(NO_DEVICE, None)


def compile_variant(variant: Variant, *, builds_launcher: bool) -> None:
    """Compile into Triton's cache on disk, or find it there.

    Args:
        variant: of `collecting`.
        builds_launcher: also the C function that passes its arguments, which Triton before 3.7
            has gcc compile for each signature; needs libcuda, which a machine with a GPU has.
    """
    from triton.backends.nvidia import driver as nvidia

    with _target(variant.capability):
        kernel = variant.compile()
    if builds_launcher and hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def build_driver() -> None:
    """Compile the C module by which Triton speaks to the GPU's driver; needs libcuda."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


def cache_folder() -> Path:
    """Return where Triton keeps what it compiled."""
    from triton import knobs

    return Path(knobs.cache.dir)


def sources_digest() -> str:
    """Return a hash of all that decides what a kernel compiles to: this folder, Triton, torch."""
    import triton

    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.glob("tuning/*.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
