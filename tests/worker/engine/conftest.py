"""Tiny random models saved by transformers, and the engine's step without a process around it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from headrace.tests.worker.engine.played import Played
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.cpu_runner import CpuRunner
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.outcome import take_results
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.weights import load_weights
from headrace.worker.frames import Admit, SamplingParams

VOCAB = 320
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": ("Llama", {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "smollm2": ("Llama", {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "mistral": ("Mistral", {"sliding_window": 21}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


class Harness:
    """Scheduler, pool and runner, stepped by the test with every invariant checked."""

    def __init__(self, runner, num_blocks, block_size, max_num_seqs=16, max_step_tokens=64):
        self.runner = runner
        self.pool = KVPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, max_num_seqs, max_step_tokens)
        self.num_added = 0
        self.finished = {}  # seq_id -> Sequence

    def add(self, prompt, max_tokens, output=(), **asked):
        self.num_added += 1
        admit = make_admit(self.num_added, prompt, max_tokens, output, **asked)
        seq = Sequence.from_admit(admit, self.num_added)
        self.scheduler.add(seq)
        return seq

    def step(self):
        """Run one step; return [(sequence, token)]."""
        plan = self.scheduler.plan()
        self.scheduler.check(plan)
        batch = self.scheduler.submit(plan)
        due = [self.scheduler.table.sequence(slot) for slot in batch.due_slots]
        self.runner.submit(batch)
        sampled = self.runner.collect()
        assert sampled.is_finite.all()
        outcome = take_results(batch, sampled)
        self.scheduler.settle(outcome.sound)
        for slot, _ in outcome.ended:
            seq = self.scheduler.table.sequence(slot)
            self.scheduler.retire(seq, is_finished=True)
            self.finished[seq.asked.seq_id] = seq
        self.scheduler.check()
        return list(zip(due, sampled.tokens.tolist(), strict=True))

    def finish(self, max_steps=2000):
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")


def make_admit(seq_id, prompt, max_tokens, output=(), params=None, **asked):
    as_bytes = [np.array(ids, "<i4").tobytes() for ids in (prompt, output)]
    params = params or SamplingParams(temperature=0.0)
    return Admit(seq_id, *as_bytes, params, max_tokens, **asked)


@pytest.fixture(scope="session")
def admit():
    return make_admit


@pytest.fixture
def played(admit):
    """Return a function that builds a scheduler whose model is played."""

    def build(**limits):
        return Played(admit, **limits)

    return build


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return a function that saves a model of MODELS once and gives its folder."""
    folders = {}

    def save(name: str) -> Path:
        if name not in folders:
            family, changes = MODELS[name]
            torch.manual_seed(sorted(MODELS).index(name))
            config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            for key, tensor in model.named_parameters():
                if key.endswith(("norm.weight", "bias")):
                    torch.nn.init.normal_(tensor, mean=1.0 if "norm" in key else 0.0, std=0.3)
            folders[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(folders[name])
        return folders[name]

    return save


@pytest.fixture(scope="session")
def peer(model_folder):
    """Return a function that gives the same model as transformers runs it."""
    models = {}

    def load(name: str):
        if name not in models:
            models[name] = transformers.AutoModelForCausalLM.from_pretrained(
                model_folder(name), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return models[name]

    return load


@pytest.fixture
def harness(model_folder):
    """Return a function that builds an engine's inside for a model of MODELS."""

    def build(name="smollm2", num_blocks=64, block_size=4, **limits):
        arch = Architecture.from_folder(model_folder(name))
        weights = load_weights(model_folder(name), arch, torch.float32)
        runner = CpuRunner(arch, weights, block_size, num_blocks)
        return Harness(runner, num_blocks, block_size, **limits)

    return build
