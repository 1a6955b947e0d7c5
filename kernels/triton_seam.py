"""Triton where it is installed, and one place that knows when it is not.

The plain-torch references live beside the kernels and are the CPU engine's path, so every kernel
file must import on a machine that has no Triton (macOS: the wheel exists for Linux only).

Invariants:
1. `triton` and `tl` are the real modules whenever Triton can be imported.
2. Without it, importing any kernel file works, its reference works, and launching its kernel
   raises RuntimeError that names what is missing.

Called by the kernel files of this folder only; nothing else imports Triton.
"""

from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    # Kernels are a language of their own: their types are Triton's to check, at compile time.
    triton: Any

    class _AnyName(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_AnyName):
        tensor = Any
        constexpr = Any

else:
    try:
        import triton
        import triton.language as tl
    except ModuleNotFoundError:

        class _MissingKernel:
            """What `@triton.jit` leaves of a kernel when there is no Triton to compile it."""

            def __init__(self, function: Any) -> None:
                self.name = function.__name__

            def __getitem__(self, grid: Any) -> NoReturn:
                raise RuntimeError(
                    f"asked to launch {self.name}; Triton is not installed on this machine: "
                    "use the reference beside it, or a Linux machine with triton installed"
                )

        class _MissingLanguage:
            tensor = Any

            class constexpr:
                def __init__(self, value: Any) -> None:
                    self.value = value

        class _MissingTriton:
            @staticmethod
            def jit(function: Any = None, **_: Any) -> Any:
                return _MissingTriton.jit if function is None else _MissingKernel(function)

        triton = _MissingTriton()
        tl = _MissingLanguage()


def is_interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter (on CPU tensors, with bf16 done wrong)."""
    try:
        from triton import knobs
    except ModuleNotFoundError:
        return False
    return bool(knobs.runtime.interpret)


__all__ = ["is_interpreted", "tl", "triton"]
