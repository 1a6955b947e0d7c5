"""A fleet of the benchmark's own: `headrace up` as a process, ended with the benchmark.

Called by: bench.cpu, bench.latency.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def own_fleet(folder: Path, **settings: str) -> Generator[dict[str, Any]]:
    """Yield what `up` says of itself (api_url, api_key); only these settings reach it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HEADRACE_")}
    env |= {"HEADRACE_DATA_DIR": str(folder), "HEADRACE_PORT": "0", **settings}
    command = [sys.executable, "-m", "headrace.fleet", "up", "--json"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError(f"the fleet did not start: status {process.wait()}")
        yield json.loads(line)
    finally:
        process.terminate()
        process.wait(60)
