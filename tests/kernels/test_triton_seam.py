"""Each test asks a fresh interpreter, because what it is about is decided at import."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> str:
    environ = os.environ | {"PYTHONPATH": str(ROOT / ".imports")}
    environ.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_references_work_where_there_is_no_triton():
    modules = [path.stem for path in (ROOT / "kernels").glob("*.py")]
    assert "paged_decode" in modules
    run_python(
        "import sys, importlib; sys.modules['triton'] = None\n"
        f"for name in {modules!r}: importlib.import_module('headrace.kernels.' + name)\n"
        "import torch\n"
        "from headrace.kernels.rms_norm import rms_norm_reference\n"
        "ones = torch.ones(1, 4)\n"
        "assert torch.equal(rms_norm_reference(ones, ones[0], 0), ones)"
    )


def test_a_launch_without_triton_says_what_is_missing():
    printed = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "from headrace.kernels import rms_norm\n"
        "try: rms_norm._rms_norm_kernel[(1,)]()\n"
        "except RuntimeError as error: print(error)"
    )
    assert "asked to launch _rms_norm_kernel; Triton is not installed" in printed


def test_a_launch_on_the_cpu_outside_the_interpreter_points_to_the_reference():
    printed = run_python(
        "import torch\n"
        "from headrace.kernels.rms_norm import rms_norm\n"
        "try: rms_norm(torch.ones(1, 4), torch.ones(4), 1e-6)\n"
        "except ValueError as error: print(error)"
    )
    assert "x must be on a GPU; found it on the CPU: call the reference" in printed
