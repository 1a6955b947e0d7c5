"""What is collected are the variants that a GPU would ask for, each once; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.kernels.precompile import collecting, sources_digest
from headrace.kernels.triton_seam import is_interpreted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> dict:
    environ = os.environ | {
        "PYTHONPATH": str(ROOT / ".imports"),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    environ.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("collect_variants.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_invariant_1_keys_are_those_of_real_tensors(collected):
    assert collected["meta"] == collected["real"]
    # Of 1 row, of a number divisible by 16, and of another.
    picks = [key for key in collected["meta"] if key.startswith("_lm_head_pick_kernel")]
    assert len(picks) == 3
    # Column 3 of the state is at an odd word, its column 8 at a whole 16 bytes.
    (penalise,) = [key for key in collected["meta"] if key.startswith("_penalise_rows_kernel")]
    assert "('*i32', '')" in penalise
    assert "('*i32', 'D')" in penalise


def test_invariant_2_a_variant_launched_again_is_noted_once(collected):
    assert collected["num_once"] == collected["num_twice"] == len(set(collected["meta"]))


def test_invariant_3_nothing_of_the_collection_is_left(collected):
    assert collected["is_restored"]


def test_compiling_again_makes_nothing_new(collected):
    first, second = collected["cubins"]
    assert first == second == collected["num_chosen"] > 0


@pytest.mark.skipif(not is_interpreted(), reason="Triton's interpreter is off beside a GPU")
def test_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"), collecting((9, 0)):
        pass


def test_the_digest_of_the_sources_is_the_same_twice():
    assert sources_digest() == sources_digest()
    assert len(sources_digest()) == 64
