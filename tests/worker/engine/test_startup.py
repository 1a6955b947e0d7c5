"""startup.py: limits by device, and the ledger."""

import time

import msgspec
import pytest
import torch

from headrace.worker.engine import startup
from headrace.worker.engine.runner import resolve_config
from headrace.worker.engine.startup import StartupLedger, fill_limits, gpu_uuid
from headrace.worker.frames import EngineConfig


def limits(**named):
    filled = fill_limits(EngineConfig("", **named))
    assert fill_limits(filled) == filled
    return filled.max_num_seqs, filled.max_step_tokens, filled.target_step_ms


def test_invariant_1_a_device_fills_what_nobody_named():
    assert limits(device="cuda") == (256, 8192, 50.0)
    assert limits(device="cpu") == limits(device="auto") == (64, 512, 0.0)


def test_invariant_2_what_is_named_is_kept_and_the_rest_gives_way():
    named = {"max_num_seqs": 1024, "max_step_tokens": 2048, "target_step_ms": 0.0}
    assert limits(device="cuda", **named) == (1024, 2048, 0.0)
    assert limits(device="cpu", max_num_seqs=600) == (600, 600, 0.0)
    assert limits(device="cpu", max_step_tokens=16) == (16, 16, 0.0)
    assert limits(device="cuda", max_step_tokens=16) == (16, 16, 50.0)


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ({"device": "cuda", "max_num_seqs": 1025}, "max_num_seqs is 1025; .* at most 1024"),
        ({"max_num_seqs": 8, "max_step_tokens": 7}, "max_num_seqs is 8, max_step_tokens 7"),
        ({"max_num_seqs": -1}, "max_num_seqs is -1"),
        ({"gpu_memory_fraction": 0.99}, "gpu_memory_fraction is 0.99; 0.1 to 0.98"),
        ({"gpu_memory_fraction": 0.05}, "gpu_memory_fraction is 0.05"),
        ({"gpu_memory_fraction": float("nan")}, "gpu_memory_fraction is nan"),
        ({"kv_dtype": "fp8", "weights_dtype": "fp8"}, "kv_dtype and weights_dtype fp8 asked"),
        ({"weights_dtype": "fp8"}, "weights_dtype fp8 asked; the device is a CPU"),
    ],
)
def test_what_cannot_be_is_refused_with_the_values(named, text):
    with pytest.raises(ValueError, match=text):
        fill_limits(EngineConfig("", **named))


def test_fp8_is_left_to_a_gpu():
    assert fill_limits(EngineConfig("", device="cuda", kv_dtype="fp8")).kv_dtype == "fp8"
    assert limits(device="cpu", max_num_seqs=2048) == (2048, 2048, 0.0)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_auto_is_the_gpu_where_there_is_one(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = EngineConfig("")
    expected = "cuda" if has_gpu else "cpu"
    assert resolve_config(config).device == expected
    assert resolve_config(resolve_config(config)) == resolve_config(config)
    assert resolve_config(msgspec.structs.replace(config, device="cpu")).device == "cpu"
    # The stub needs no device, and its limits must not depend on where a test runs.
    assert resolve_config(msgspec.structs.replace(config, runner="stub")).device == "cpu"


def test_invariant_3_the_ledger_is_in_order_and_its_lines_end_with_the_sum():
    ledger = StartupLedger()
    with ledger.stage("weights", 3 << 30):
        began = time.monotonic()
        while time.monotonic() - began < 0.01:
            pass
    with ledger.stage("pool", 1 << 30):
        pass
    ledger.note_imports()
    names = [entry.name for entry in ledger.entries]
    assert names == ["process and imports", "weights", "pool"]
    assert ledger.entries[1].seconds >= 0.01
    *_, pool, total = ledger.lines()
    assert pool.split()[0] == "pool"
    assert pool.endswith("1.00 GiB")
    assert total.split()[0] == "total"
    assert total.endswith("4.00 GiB")
    seconds = sum(entry.seconds for entry in ledger.entries)
    assert float(total.split()[1]) == pytest.approx(seconds, abs=0.006)


def test_a_stage_that_fails_leaves_no_entry():
    ledger = StartupLedger(torch.device("cpu"))
    with pytest.raises(MemoryError), ledger.stage("pool"):
        raise MemoryError
    assert ledger.entries == []


def test_the_age_of_this_process_grows_with_the_clock():
    began, first = time.monotonic(), startup._process_age_s()
    assert first > 0.1, "imports alone take longer"
    later = startup._process_age_s()
    assert 0 < later - first < time.monotonic() - began


def test_a_gpu_is_named_as_nvml_names_it_and_none_where_there_is_none():
    """Triton's interpreter runs an engine for `cuda` on a machine without one."""
    assert gpu_uuid(EngineConfig("", device="cpu")) == ""
    assert gpu_uuid(EngineConfig("", device="cuda", runner="stub")) == ""
    found = gpu_uuid(EngineConfig("", device="cuda"))
    assert found.startswith("GPU-") if torch.cuda.is_available() else found == ""
