"""The whole benchmark on the CPU engine, a tiny model and shrunk workloads; peers of all fates."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headrace.bench import engine, engine_peers
from headrace.bench.engine_log import RunError, RunLog, figures
from headrace.bench.engine_ours import EngineOptions, OursDriver, build_config
from headrace.bench.engine_peers import PeerJob
from headrace.bench.engine_requests import make_requests
from headrace.bench.peer_vllm import llm_arguments
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.weights import expected_shapes

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}
OPTIONS = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--threads",
    "1",
    "--kv-gb",
    "0.002",
    "--scale",
    "0.02",
]
OPTIONS += ["--max-num-seqs", "8", "--max-step-tokens", "64"]

#: A package with the part of vLLM's interface that the peer uses; its engine answers at once.
FAKE_VLLM = """
import os, sys
from types import SimpleNamespace as N
__version__ = "0.0"
class LLM:
    def __init__(self, **arguments):
        fate = os.environ["FAKE_FATE"]
        if fate == "dies":
            print("no such device", file=sys.stderr)
            os._exit(3)
        self.fate, self.queue, self.llm_engine = fate, [], self
        seqs = arguments.get("max_num_seqs", 1024)
        tokens = arguments.get("max_num_batched_tokens", 1)
        self.vllm_config = N(
            scheduler_config=N(
                max_num_seqs=seqs, max_num_batched_tokens=tokens, async_scheduling=True
            ),
            cache_config=N(block_size=16, num_gpu_blocks=9, enable_prefix_caching=True),
            compilation_config=N(cudagraph_mode="FULL"),
        )
    def reset_prefix_cache(self):
        return True
    def generate(self, prompts, params, use_tqdm):
        if self.fate == "hangs" and len(prompts) > 1:
            import threading
            threading.Event().wait()
        short = self.fate == "stops early"
        made = [p.max_tokens - short for p in params]
        return [N(outputs=[N(token_ids=[1] * n)]) for n in made]
    def add_request(self, request_id, prompt, params):
        self.queue.append([request_id, params.max_tokens])
    def has_unfinished_requests(self):
        return bool(self.queue)
    def step(self):
        for item in self.queue:
            item[1] -= 1
        outputs = [N(request_id=name, outputs=[N(token_ids=[1])]) for name, _ in self.queue]
        self.queue = [item for item in self.queue if item[1]]
        return outputs
"""
FAKE_SAMPLING = """
from enum import Enum
RequestOutputKind = Enum("RequestOutputKind", "CUMULATIVE DELTA")
class SamplingParams:
    def __init__(self, **values):
        self.__dict__ |= values
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = expected_shapes(Architecture.from_folder(folder))
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(s, generator=generator) * 0.1 for name, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """Put a vllm in the path, of the fate that the returned function is told."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(FAKE_VLLM))
    (package / "sampling_params.py").write_text(FAKE_SAMPLING)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    return lambda fate: monkeypatch.setenv("FAKE_FATE", fate)


def job(folder, **fields):
    values = {
        "peer": "vllm",
        "setup": "equal",
        "model_folder": "m",
        "out_folder": str(folder),
        "workloads": ["single", "mixed"],
        "scale": 0.02,
        "vocab_size": 320,
        "max_num_seqs": 8,
        "max_step_tokens": 64,
        "max_seq_tokens": 100,
        "kv_bytes": 1 << 20,
        "kv_tokens": 4096,
    }
    return PeerJob(**{**values, **fields})


def rows_in(folder):
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_workloads_end_to_end_with_an_absent_peer(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine_peers.importlib.util, "find_spec", lambda name: None)
    names = "single,mixed,mixed1k,prefill,shared"
    command = ["--model", str(model_folder), "--workload", names, "--peer", "vllm", *OPTIONS]
    assert engine.main([*command, "--results", str(tmp_path), "--commit", "abc"]) == 0
    printed = capsys.readouterr().out
    assert "vllm is not installed: skipped" in printed
    rows = rows_in(tmp_path)
    assert [row["workload"] for row in rows] == names.split(",")
    for row in rows:
        assert (row["engine"], row["commit"], row["error"]) == ("headrace", "abc", None)
        rate = row["num_output_tokens"] / row["seconds"]
        assert row["output_tokens_per_s"] == pytest.approx(rate, rel=1e-4)
        percent = 100 * row["roofline_s"] / row["seconds"]
        assert row["roofline_percent"] == pytest.approx(percent, rel=1e-3)
        assert 0 < row["inter_token_p50_ms"] <= row["inter_token_p99_ms"] < row["seconds"] * 1e3
        assert 0 < row["first_token_p50_ms"] <= row["first_token_p99_ms"] < row["seconds"] * 1e3
        assert 0 < row["host_us_p50"] <= row["seconds"] * 1e6
        assert row["num_steps"] * row["settings"]["max_num_seqs"] >= row["num_output_tokens"]
        assert row["start_s"] > row["start_ledger"]["load_s"] > 0
        stages = row["start_ledger"]["stages"]
        assert list(stages) == ["process and imports", "weights", "pool", "own job"]
        assert sum(stage["seconds"] for stage in stages.values()) < row["start_s"] + 0.02
        assert stages["pool"]["num_bytes"] > 0
    assert rows[0]["num_steps"] >= rows[0]["num_output_tokens"]


def test_a_peer_beside_ours_has_the_same_requests(model_folder, tmp_path, fake_vllm, capsys):
    fake_vllm("answers")
    command = ["--model", str(model_folder), "--workload", "mixed,single", "--peer", "vllm"]
    assert engine.main([*command, *OPTIONS, "--results", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert [(row["engine"], row["workload"]) for row in rows] == [
        *(("headrace", "mixed"), ("headrace", "single")),
        *(("vllm equal", "mixed"), ("vllm equal", "single")),
        *(("vllm defaults", "mixed"), ("vllm defaults", "single")),
    ]
    assert len({row["num_output_tokens"] for row in rows if row["workload"] == "mixed"}) == 1
    assert len({row["roofline_s"] for row in rows if row["workload"] == "mixed"}) == 1
    assert rows[2]["settings"]["max_num_seqs"] == 8
    assert rows[4]["settings"]["max_num_seqs"] == 1024
    assert rows[2]["first_token_p50_ms"] > 0
    assert rows[2]["host_us_p50"] is None
    assert "vllm equal ready after" in capsys.readouterr().out


def test_a_peer_that_hangs_is_ended_and_told(tmp_path, fake_vllm):
    fake_vllm("hangs")
    found = list(engine_peers.run_peer(job(tmp_path, seconds=1.0), start_s=60))
    assert [(event.workload, event.error) for event in found] == [
        ("", ""),
        ("single", ""),
        ("", "did not end in 1 s"),
    ]


def test_a_peer_that_dies_leaves_its_last_words(tmp_path, fake_vllm):
    fake_vllm("dies")
    (event,) = engine_peers.run_peer(job(tmp_path), start_s=60)
    assert event.error == "its process ended early; its last words: no such device"


def test_a_peer_that_makes_other_tokens_than_asked_has_no_figures(tmp_path, fake_vllm):
    fake_vllm("stops early")
    _, event = engine_peers.run_peer(job(tmp_path), start_s=60)
    assert (event.workload, event.error) == ("single", "made 9 tokens, not those asked for")


def test_vllm_s_two_setups_differ_in_what_is_made_equal(tmp_path):
    equal = llm_arguments(job(tmp_path, max_num_seqs=1024))
    defaults = llm_arguments(job(tmp_path, setup="defaults"))
    assert equal.keys() - defaults.keys() == {
        "max_num_seqs",
        "max_num_batched_tokens",
        "kv_cache_memory_bytes",
    }
    assert equal["compilation_config"] == {"max_cudagraph_capture_size": 1024}
    assert defaults["compilation_config"] == {"max_cudagraph_capture_size": 1024}
    assert "compilation_config" not in llm_arguments(job(tmp_path))
    assert equal["enable_prefix_caching"]
    assert defaults["enable_prefix_caching"]
    assert llm_arguments(job(tmp_path, kv_dtype="fp8"))["kv_cache_dtype"] == "fp8"


def test_transformers_makes_the_tokens_asked_for_and_tells_their_times(model_folder, tmp_path):
    asked = job(tmp_path, peer="transformers", setup="continuous", model_folder=str(model_folder))
    found = list(engine_peers.run_peer(asked, start_s=60))
    assert [(event.workload, event.error) for event in found] == [
        ("", ""),
        ("single", ""),
        ("mixed", ""),
    ]
    for event in found[1:]:
        requests = make_requests(event.workload, 320, 0.02)
        traced = figures(RunLog.load(Path(event.log)), requests)
        assert traced.seconds == pytest.approx(event.seconds)
        assert 0 < traced.first_token_p50_ms < traced.seconds * 1e3


def test_prefixes_are_shared_within_a_run_and_not_between_runs(model_folder):
    options = EngineOptions(
        device="cpu",
        dtype="float32",
        max_num_seqs=1,
        max_step_tokens=64,
        block_size=16,
        kv_bytes=1 << 20,
    )
    prompt = list(range(20, 60))  # two blocks and a half
    with OursDriver(model_folder, options) as driver:
        for _ in range(2):
            log = driver.run([(prompt, 2)] * 4)
            assert log.num_prefill_tokens.sum() == 40 + 3 * 8


def test_an_engine_that_ends_says_why(model_folder):
    options = EngineOptions(
        device="cpu", dtype="float32", max_num_seqs=64, max_step_tokens=8, kv_bytes=1 << 20
    )
    with pytest.raises(RunError, match="bad_config: max_num_seqs is 64"):
        OursDriver(model_folder, options)


def test_a_refused_request_is_no_run(model_folder):
    options = EngineOptions(
        device="cpu", dtype="float32", max_num_seqs=4, max_step_tokens=64, kv_bytes=1 << 20
    )
    with OursDriver(model_folder, options) as driver, pytest.raises(RunError, match="refused"):
        driver.run([([11, 12], 4), ([13] * 600, 4)])


def test_an_option_that_the_engine_lacks_is_refused(model_folder, monkeypatch):
    fields = ("model_folder", "device", "dtype", "max_num_seqs", "max_step_tokens")
    monkeypatch.setattr("headrace.bench.engine_ours.CONFIG_FIELDS", fields)
    with pytest.raises(ValueError, match=r"kv_dtype asked of the engine; its config has model_f"):
        build_config(model_folder, EngineOptions(kv_dtype="fp8"))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "no-such", "--workload", "single"], "no folder with a"),
        (["--model", "qwen3-0.6b", "--workload", "double"], "double found; single, mixed"),
        (["--model", "qwen3-0.6b", "--workload", "single", "--peer", "x"], "x found; vllm"),
        (["--model", "qwen3-0.6b", "--workload", "single", "--scale", "2"], "at most 1 needed"),
    ],
)
def test_bad_options_are_refused(arguments, text, capsys):
    try:
        status = engine.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert text in capsys.readouterr().err
