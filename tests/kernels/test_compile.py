"""Every kernel compiles for sm_90 with the very arguments its launcher passes; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: What one block may have on Hopper: 227 KiB.
MAX_SHARED_BYTES = 227 * 1024
#: For all of it, on two slow cores shared with others: ten times what they take when idle.
COMPILE_SECONDS = 400
KERNELS = {
    "_rms_norm_kernel",
    "_residual_rms_norm_kernel",
    "_residual_rms_norm_fp8_kernel",
    "_chosen_rms_norm_kernel",
    "_embed_rms_norm_kernel",
    "_quantise_rows_kernel",
    "_silu_mul_kernel",
    "_silu_mul_fp8_kernel",
    "_qkv_rope_write_kernel",
    "_paged_decode_kernel",
    "_merge_splits_kernel",
    "_plan_decode_kernel",
    "_paged_prefill_kernel",
    "_plan_prefill_kernel",
    "_skinny_rows_kernel",
    "_skinny_tiles_kernel",
    "_lm_head_kernel",
    "_lm_head_pick_kernel",
    "_chosen_logprobs_kernel",
}
#: A whole step of one row: in 16 bits only.
LAYERS_KERNELS = {"_decode_layers_kernel"}
#: Work on logits, which are fp32 whatever the model is.
LOGITS_KERNELS = {
    "_survey_kernel",
    "_count_kernel",
    "_narrow_kernel",
    "_finish_kernel",
    "_noise_kernel",
    "_penalise_rows_kernel",
    "_logprobs_tile_kernel",
    "_logprobs_merge_kernel",
}
#: Work on the state of sequences, which is words.
STEP_KERNELS = {"_prepare_step_kernel", "_commit_step_kernel", "_write_words_kernel"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    environ = os.environ | {
        "PYTHONPATH": str(ROOT / ".imports"),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    environ.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_for_sm90.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=COMPILE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_in_every_dtype(compiled):
    built = {(row["kernel"], row["dtype"]) for row in compiled if row["cubin_bytes"] > 0}
    dtypes = ("float32", "float16", "bfloat16")
    wanted = {(kernel, dtype) for kernel in KERNELS for dtype in dtypes}
    wanted |= {(kernel, dtype) for kernel in LAYERS_KERNELS for dtype in dtypes[1:]}
    wanted |= {(kernel, "float32") for kernel in LOGITS_KERNELS}
    wanted |= {(kernel, "int32") for kernel in STEP_KERNELS}
    assert built == wanted


def test_every_kernel_of_the_folder_is_compiled(compiled):
    defined = set()
    for path in (ROOT / "kernels").glob("*.py"):
        defined |= {
            line.split("(")[0].removeprefix("def ")
            for line in path.read_text().splitlines()
            if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
        }
    assert {row["kernel"] for row in compiled} == defined


def test_attention_compiles_for_every_head_dim(compiled):
    for kernel in ("_paged_decode_kernel", "_paged_prefill_kernel"):
        dims = {row["head_dim"] for row in compiled if row["kernel"] == kernel}
        assert dims == {64, 96, 128, 256}


def test_matrix_products_run_on_tensor_cores(compiled):
    rows = [row for row in compiled if row["has_dot"]]
    kernels = {"_paged_decode_kernel", "_paged_prefill_kernel", "_lm_head_kernel"}
    assert {row["kernel"] for row in rows} == kernels | LAYERS_KERNELS | {"_skinny_tiles_kernel"}
    for row in rows:
        # fp32 is exact on purpose ("ieee"), which tensor cores are not.
        assert row["has_mma"] == (row["dtype"] != "float32"), row


def test_shared_memory_fits_a_block(compiled):
    for row in compiled:
        assert row["shared_bytes"] <= MAX_SHARED_BYTES, row
