"""gpu_compile.py and gpu_compilers.py: which kernels, in which processes, and when none; no GPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headrace.worker.engine import gpu_compilers
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.gpu_compilers import Compilers, command_of, stamp_of, start_compilers
from headrace.worker.frames import EngineConfig

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).parent
NAME, HOPPER = "NVIDIA H200", (9, 0)
SHAPE = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


@pytest.fixture(scope="module")
def environ(tmp_path_factory) -> dict[str, str]:
    """Return the environment of a process in which Triton compiles."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("triton"))
    return kept | {"PYTHONPATH": str(ROOT / ".imports"), "TRITON_CACHE_DIR": cache}


def run(environ: dict[str, str], *command: str) -> dict:
    done = subprocess.run(
        [sys.executable, *command], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- which kernels ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def variants(folder, environ) -> dict:
    return run(environ, str(HERE / "engine_variants.py"), str(folder))


def test_steps_on_the_meta_device_ask_for_what_real_tensors_ask_for(variants):
    assert variants["meta"] == variants["real"]
    # All kinds of steps are there: with and without chunks, of few rows, of one.
    names = {key.split(" ")[0] for key in variants["meta"]}
    assert {"_paged_prefill_kernel", "_skinny_tiles_kernel", "_write_words_kernel"} <= names
    assert "_decode_layers_kernel" in names


@pytest.mark.parametrize("pool", ["deep", "deep_fp8"])
def test_a_shortened_model_asks_for_what_the_whole_one_does(variants, pool):
    whole, shortened = variants[pool]
    assert shortened == whole


def test_a_model_is_shortened_to_its_kinds_of_layers(variants):
    # Two windows; over fp8 each at four places of the scales, the last of them in layer 10.
    assert variants["num_layers"] == [3, 12]


# -- processes -------------------------------------------------------------------------------


def test_a_pass_compiles_all_and_a_second_finds_all(folder, environ):
    config = EngineConfig(
        str(folder), dtype="float32", max_num_seqs=1, max_step_tokens=16, max_seq_tokens=128
    )
    command = command_of(config, NAME, HOPPER, 2)
    command.remove("--launchers")  # they need a libcuda
    cache, found, said = Path(environ["TRITON_CACHE_DIR"]), [], ""
    for _ in range(2):
        with subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            process_group=0,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            said = process.stdout.read()
        assert process.returncode == 0, said
        found.append({path.relative_to(cache) for path in cache.rglob("*") if path.is_file()})
    num_kernels = int(said.split()[1])
    assert f"compiled {num_kernels} of {num_kernels} kernels in 2 processes" in said
    assert len({path for path in found[0] if path.suffix == ".cubin"}) == num_kernels > 15
    assert found[0] == found[1]


def test_invariants_1_and_2_each_task_runs_once_whatever_becomes_of_others(tmp_path, environ):
    failures = _run_tasks(environ, tmp_path)
    assert failures == ["raises: ValueError: first line", "dies: its process died"]
    left = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert left == dict.fromkeys(["one", "raises", "dies", "two", "three", "four"], 1)


def _run_tasks(environ: dict[str, str], folder: Path) -> list[str]:
    command = [sys.executable, str(HERE / "forked_tasks.py"), str(folder)]
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
    return json.loads(said)


def test_invariant_3_all_end_with_the_engine(tmp_path, environ):
    command = [sys.executable, str(HERE / "forked_tasks.py"), str(tmp_path), "waits"]
    with subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == b"waiting\n"
        process.stdin.close()  # as the kernel does when the engine dies
        assert process.wait(30) == -signal.SIGKILL
        # The pipe ends when the last of the forked ones has.
        assert process.stdout.read() == b""


# -- whether, and what becomes of it ---------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Have torch say that there is a Hopper, and Triton keep its cache in tmp_path."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(gpu_compilers, "cache_folder", lambda: tmp_path / "triton")
    return torch.device("cuda")


def test_without_a_gpu_nothing_is_started(folder):
    arch = Architecture.from_folder(folder)
    with start_compilers(EngineConfig(str(folder)), arch, torch.device("cpu")) as compilers:
        assert compilers.command == []
        assert compilers.wait() == []
    compilers.stamp()


def test_invariant_1_with_the_stamp_nothing_is_started(folder, gpu):
    config, arch = EngineConfig(str(folder)), Architecture.from_folder(folder)
    first = start_compilers(config, arch, gpu)
    assert "headrace.worker.engine.gpu_compile" in first.command
    assert first.command[first.command.index("--capability") + 1 :][:2] == ["9", "0"]
    first.stamp()
    assert stamp_of(config, arch, NAME).exists()
    assert start_compilers(config, arch, gpu).command == []


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 128},
        {"kv_dtype": "fp8"},
        {"weights_dtype": "fp8"},
        {"dtype": "float32"},
        {"max_num_seqs": 3},
        {"max_step_tokens": 300},
        {"max_seq_tokens": 200},
    ],
)
def test_a_stamp_is_of_one_config(folder, gpu, changes):
    arch = Architecture.from_folder(folder)
    config, other = EngineConfig(str(folder)), EngineConfig(str(folder), **changes)
    assert stamp_of(config, arch, NAME) != stamp_of(other, arch, NAME)


def test_a_stamp_is_of_one_gpu_and_one_build(folder, gpu, monkeypatch):
    config, arch = EngineConfig(str(folder)), Architecture.from_folder(folder)
    stamp = stamp_of(config, arch, NAME)
    assert stamp != stamp_of(config, arch, "NVIDIA L40S")
    # What pool and memory are given changes no kernel.
    assert stamp == stamp_of(EngineConfig(str(folder), num_blocks=7), arch, NAME)
    monkeypatch.setattr(gpu_compilers, "sources_digest", lambda: "of other kernels")
    assert stamp != stamp_of(config, arch, NAME)


def test_a_failure_is_told_and_survived(tmp_path):
    program = "print('not compiled: _some_kernel'); raise SystemExit(1)"
    with Compilers(tmp_path / "stamp", [sys.executable, "-c", program]) as compilers:
        told = compilers.wait()
    assert "status 1" in told[0]
    assert told[1] == "kernels: not compiled: _some_kernel"
    compilers.stamp()
    assert (tmp_path / "stamp").exists()


def test_invariant_4_the_limit_ends_the_processes(tmp_path):
    program = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    with Compilers(tmp_path / "stamp", [sys.executable, "-c", program]) as compilers:
        told = compilers.wait(limit_s=0.2)
        process = compilers._process
        assert process is not None
        assert process.returncode == -signal.SIGKILL
    assert told == ["kernels: not all compiled within 0 s; the rest as they are met"]


def test_a_start_that_fails_ends_the_processes(tmp_path):
    compilers = Compilers(tmp_path / "stamp", ["sleep", "600"])
    with pytest.raises(MemoryError), compilers:
        raise MemoryError("the weights do not fit")
    process = compilers._process
    assert process is not None
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "stamp").exists()
