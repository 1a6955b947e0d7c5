"""batch.py and runner.py: the flat layout, the stub, and resumed drawing."""

import copy
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from headrace.tests.worker.engine.conftest import Harness
from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.cpu_runner import CpuRunner
from headrace.worker.engine.flat import flatten
from headrace.worker.engine.runner import build_runner
from headrace.worker.engine.startup import StartupLedger
from headrace.worker.engine.stub import StubRunner, stub_token
from headrace.worker.frames import EngineConfig, SamplingParams


def test_a_batch_lays_rows_positions_and_slots_out(harness):
    engine = harness(block_size=4, max_num_seqs=8, max_step_tokens=12)
    first = engine.add(range(10, 15), 4)
    engine.step()
    second = engine.add(range(20, 50), 4)
    plan = engine.scheduler.plan()
    assert plan.decodes.tolist() == [first.slot]
    assert [(chunk.seq, chunk.num_tokens) for chunk in plan.chunks] == [(second, 11)]
    batch = flatten(engine.scheduler.submit(plan))
    assert batch.tokens.tolist() == [first.output[0], *range(20, 31)]
    assert batch.positions.tolist() == [5, *range(11)]
    assert batch.cu_q_lens.tolist() == [0, 1, 12]
    assert batch.context_lens.tolist() == [6, 11]
    tables = [first.table, second.table]
    rows = [0] + [1] * 11
    expected = [
        tables[row][p // 4] * 4 + p % 4 for row, p in zip(rows, batch.positions, strict=True)
    ]
    assert batch.slots.tolist() == expected
    assert len(set(expected)) == len(expected)
    assert batch.due == [first]
    assert batch.due_rows.tolist() == [0]
    assert all(
        array.dtype == np.int32
        for array in (batch.tokens, batch.positions, batch.slots, batch.cu_q_lens, batch.due_rows)
    )
    assert batch.block_tables[0, len(first.table) :].tolist() == [-1] * (3 - len(first.table))


def test_a_batch_tells_what_has_changed_since_the_last_one(harness):
    engine = harness(block_size=4, max_num_seqs=8, max_step_tokens=12)
    first = engine.add(range(10, 16), 9)
    batch = engine.scheduler.submit(engine.scheduler.plan())
    assert batch.started == [first]
    assert batch.new_blocks.tolist() == [[0, 0, first.table[0]], [0, 1, first.table[1]]]
    assert (batch.num_decodes, batch.num_prefill_tokens, batch.context_tokens) == (0, 6, 6)
    assert (batch.due_slots.tolist(), batch.due_epochs.tolist()) == ([0], [0])
    for position in (6, 7, 8):
        batch = engine.scheduler.submit(engine.scheduler.plan())
        assert batch.started == []
        assert batch.decode_positions.tolist() == [position]
        assert batch.context_tokens == position + 1
        new = [] if position < 8 else [[0, 2, first.table[2]]]
        assert batch.new_blocks.tolist() == new
    assert all(a.dtype == np.int32 for a in (batch.decode_slots, batch.due_slots, batch.new_blocks))
    assert batch.decode_positions.dtype == np.int32


def test_a_plan_drops_a_sequence_from_decodes_and_chunks(harness):
    engine = harness()
    for prompt in ([5], [5, 6], [5, 6, 7]):
        engine.add(prompt, 4)
    plan = engine.scheduler.plan()
    assert plan.num_tokens == 6
    for slot in (0, 2):
        plan.drop(slot)
    assert [chunk.slot for chunk in plan.chunks] == [1]
    assert (plan.num_tokens, plan.num_prefill_tokens) == (2, 2)


def test_the_stub_is_a_pure_function_that_avoids_special_tokens():
    found = [stub_token(seed, i, 300) for seed in (0, 1, -1, 2**63) for i in range(200)]
    assert found == [stub_token(seed, i, 300) for seed in (0, 1, -1, 2**63) for i in range(200)]
    assert min(found) >= 256
    assert max(found) < 300
    assert found[:200] != found[200:400]
    assert len(set(found)) == 44


def test_a_stub_tells_a_host_that_has_lost_count(harness, model_folder):
    engine = harness()
    engine.runner = build_runner(
        EngineConfig(model_folder=str(model_folder("qwen3")), runner="stub", num_blocks=64)
    )
    seq = engine.add([5, 6, 7], 9)
    engine.step()
    engine.scheduler.table.num_computed[seq.slot] -= 1
    engine.scheduler.table.num_known[seq.slot] -= 1
    with pytest.raises(RuntimeError, match="the scheduler is wrong"):
        engine.runner.submit(engine.scheduler.submit(engine.scheduler.plan()))


def test_runners_are_built_by_name(model_folder):
    folder = str(model_folder("qwen3"))
    model = build_runner(EngineConfig(model_folder=folder, num_blocks=3, block_size=8))
    stub = build_runner(EngineConfig(model_folder=folder, runner="stub", kv_bytes=1 << 40))
    assert isinstance(model, CpuRunner)
    assert isinstance(stub, StubRunner)
    assert (model.num_blocks, model.block_size, model.dtype_name) == (3, 8, "float32")
    assert stub.num_blocks > 10**6  # it holds no memory, so it may promise any


def test_random_weights_need_no_checkpoint_and_are_the_same_each_time(model_folder, tmp_path):
    shutil.copy(model_folder("qwen3") / "config.json", tmp_path)
    ledger = StartupLedger()
    config = EngineConfig(str(tmp_path), random_weights=True, num_blocks=64, block_size=4)
    outputs = []
    for runner in (build_runner(config, ledger), build_runner(config)):
        harness = Harness(runner, num_blocks=64, block_size=4)
        harness.add([5, 6, 7, 8], 6, params=SamplingParams(temperature=0.0))
        harness.finish()
        outputs.append(harness.finished[1].output.tolist())
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 6
    weights, pool = ledger.entries
    arch = Architecture.from_folder(tmp_path)
    checkpoint = load_file(model_folder("qwen3") / "model.safetensors")
    num_values = sum(tensor.numel() for tensor in checkpoint.values())
    assert (weights.name, weights.num_bytes) == ("weights", num_values * 4)
    assert (pool.name, pool.num_bytes) == ("pool", 64 * 4 * arch.kv_bytes_per_token * 4)


@torch.inference_mode()
def test_bfloat16_is_no_further_from_the_truth_than_transformers(model_folder, peer, harness):
    folder = model_folder("llama")
    theirs = copy.deepcopy(peer("llama")).to(torch.bfloat16)
    ours = harness("llama")
    ours.runner = build_runner(
        EngineConfig(model_folder=str(folder), dtype="bfloat16", num_blocks=64, block_size=4)
    )
    assert ours.runner.dtype_name == "bfloat16"
    errors = np.zeros(2)
    for i in range(8):
        prompt = list(range(10 + i, 30 + 3 * i))
        exact = peer("llama")(torch.tensor([prompt])).logits[0, -1]
        rounded = theirs(torch.tensor([prompt])).logits[0, -1].float()
        ours.add(prompt, 1)
        ours.step()
        likely = exact.topk(32).indices
        for j, logits in enumerate((ours.runner._logits[0], rounded)):
            errors[j] += float((logits - exact)[likely].abs().mean())
    assert errors[0] < errors[1]


def test_a_stub_without_enough_vocabulary_is_refused(model_folder, tmp_path):
    text = (model_folder("qwen3") / "config.json").read_text().replace("320", "200")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match="256"):
        build_runner(EngineConfig(model_folder=str(tmp_path), runner="stub"))


@pytest.mark.parametrize("logged", [1, 5, 11])
def test_a_resumed_drawn_sequence_goes_on_as_the_uninterrupted_one(logged, harness):
    params = SamplingParams(
        temperature=1.2, top_p=0.95, seed=12345, presence_penalty=0.3, repetition_penalty=1.1
    )
    whole = harness("qwen2")
    seq = whole.add([7, 8, 9], 12, params=params)
    whole.finish()
    resumed = harness("qwen2", block_size=8, max_step_tokens=16)
    others = [resumed.add([20 + i] * 9, 12, params=SamplingParams(seed=i)) for i in range(3)]
    again = resumed.add([7, 8, 9], 12, output=seq.output[:logged], params=params)
    resumed.finish()
    assert again.output.tolist() == seq.output.tolist()
    assert all(other.num_output == 12 for other in others)


def test_seeds_make_outputs_differ(harness):
    engine = harness("qwen2")
    seqs = [engine.add([7, 8], 8, params=SamplingParams(seed=seed)) for seed in range(6)]
    engine.finish()
    assert len({tuple(seq.output.tolist()) for seq in seqs}) > 3
