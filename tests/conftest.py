"""Fixtures of all tests (see real_parts.py), and how Triton runs, before anything imports it.

A kernel decorated while TRITON_INTERPRET is unset can never be interpreted, so this comes first.
The question whether there is a GPU goes to torch, which does not import Triton.
"""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest_plugins = ["headrace.tests.real_parts"]

BROWSER = Path(__file__).parent / "browser"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the browser tests, which need Chromium, unless they are named."""
    named = (Path(config.invocation_params.dir, arg.split("::")[0]) for arg in config.args)
    if collection_path == BROWSER and not any(path.is_relative_to(BROWSER) for path in named):
        return True
    return None
