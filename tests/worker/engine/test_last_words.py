"""What an engine says last: codes by type, and the innermost place of ours."""

import msgspec
import pytest
import torch

from headrace.worker.engine.architecture import UnsupportedModel
from headrace.worker.engine.last_words import DeviceLost, last_words
from headrace.worker.engine.stub import die
from headrace.worker.frames import FrameError


def raised(act) -> Exception:
    with pytest.raises(Exception) as found:
        act()
    assert isinstance(found.value, Exception)
    return found.value


def throw(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsupportedModel("x"), "unsupported_model"),
        (MemoryError("x"), "out_of_memory"),
        (torch.OutOfMemoryError("x"), "out_of_memory"),
        (DeviceLost("x"), "device_lost"),
        (torch.AcceleratorError("x"), "device_lost"),
        (FrameError("x"), "bad_frame"),
        (msgspec.ValidationError("x"), "bad_config"),
        (ValueError("x"), "bad_config"),
        (KeyError("x"), "engine_failed"),
    ],
)
def test_each_type_has_its_code(error, code):
    words = last_words(raised(lambda: throw(error)))
    assert (words.code, words.kind) == (code, type(error).__name__)


def test_the_place_is_the_innermost_frame_of_ours_below_a_library():
    error = raised(lambda: die(6))
    assert last_words(error).where == "stub.py:die"
    error = raised(lambda: msgspec.json.decode("{"))
    assert last_words(error).where == "test_last_words.py:<lambda>", "else the innermost of all"


def test_an_error_without_a_text_says_its_name():
    assert last_words(raised(lambda: throw(RuntimeError()))).text == "RuntimeError"
