"""What an engine that ends by an error says last: a code, a text, and where it happened.

The courier judges by it whether the death is to be blamed on what ran (worker/evidence.py), and
operators group deaths by it, so `where` names code, not data: the innermost frame of ours.

Called by: loop.py (main), runners (DeviceLost).
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import msgspec

from headrace.worker.engine.architecture import UnsupportedModel
from headrace.worker.frames import Fatal, FrameError

#: Folders whose frames are ours, as they stand in a file's path.
_OURS = ("worker", "kernels", "contract")
_ROOT = Path(__file__).resolve().parents[2]


class DeviceLost(RuntimeError):
    """The GPU does not answer any more, or a kernel failed on it: nothing on it can be trusted."""


_CODES: dict[type[Exception], str] = {
    UnsupportedModel: "unsupported_model",
    MemoryError: "out_of_memory",
    DeviceLost: "device_lost",
    FrameError: "bad_frame",
    msgspec.ValidationError: "bad_config",
    msgspec.DecodeError: "bad_config",
    ValueError: "bad_config",
}


def _codes() -> dict[type[Exception], str]:
    torch = sys.modules.get("torch")  # only what is loaded can have raised; a stub has none
    if torch is None:
        return _CODES
    of_torch = {torch.OutOfMemoryError: "out_of_memory", torch.AcceleratorError: "device_lost"}
    return _CODES | of_torch


def last_words(error: Exception) -> Fatal:
    """Return what the courier is told of an engine that ends by this error."""
    return Fatal(
        code=_codes().get(type(error), "engine_failed"),
        text=str(error) or type(error).__name__,
        kind=type(error).__name__,
        where=_innermost(error),
    )


def _innermost(error: Exception) -> str:
    """Return `file:function` of the innermost frame that is our code; else of the innermost."""
    found = ""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename).resolve()
        is_ours = path.is_relative_to(_ROOT) and path.relative_to(_ROOT).parts[0] in _OURS
        if is_ours:
            return f"{path.name}:{frame.name}"
        found = found or f"{path.name}:{frame.name}"
    return found
