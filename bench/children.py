"""The environment of processes that a benchmark starts: they find what it has found.

A checkout's folders are importable by a path that may stand in sys.path alone (.imports, which
pytest adds), and `bench` is in no package that is installed.

Called by: engine.py, engine_ours.py, engine_peers.py, kernel_precompile.py.
"""

from __future__ import annotations

import os
import sys


def child_environ() -> dict[str, str]:
    """Return this process's environment with its import path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
