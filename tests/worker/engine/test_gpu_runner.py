"""The GPU runner against transformers and the CPU runner; interpreted where there is no GPU."""

import numpy as np
import pytest
import torch
import transformers

from headrace.tests.worker.engine.conftest import Harness
from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.gpu_start import build_gpu_runner
from headrace.worker.engine.last_words import DeviceLost
from headrace.worker.engine.runner import build_runner
from headrace.worker.frames import EngineConfig, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    # Triton's interpreter computes with numpy, which warns where the noise's hash wraps, and of
    # what padding rows hold: attention leaves theirs unwritten.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

VOCAB = 320
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 21}),
}
NUM_BLOCKS, BLOCK_SIZE = 32, 16


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function that saves a random model once and gives (folder, model)."""
    made = {}

    def save(name):
        if name not in made:
            family, changes = MODELS[name]
            torch.manual_seed(len(made))
            config = getattr(transformers, f"{family}Config")(**SHAPE | changes)
            model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return save


def config_of(folder, **changes):
    asked = {
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 4,
        "num_blocks": NUM_BLOCKS,
    }
    asked |= {"max_step_tokens": 32, "max_seq_tokens": 128, "device": "cuda"}
    return EngineConfig(model_folder=str(folder), **asked | changes)


def harness_of(folder, **changes):
    config = config_of(folder, **changes)
    runner = build_gpu_runner(config, Architecture.from_folder(folder), folder)
    return Harness(runner, NUM_BLOCKS, BLOCK_SIZE, max_num_seqs=4, max_step_tokens=32)


def prompts_of(*lengths):
    rng = np.random.default_rng()
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def greedy(model, prompt, num_tokens):
    given = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            given, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(given),
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(saved, name):
    """Prompts of one token, within a block, over several steps, and a prefix that is shared."""
    folder, model = saved(name)
    harness = harness_of(folder)
    prompts = prompts_of(5, 40, 1, 17)
    prompts.append(prompts[1][:34])
    for prompt in prompts:
        harness.add(prompt, 5)
    harness.finish()
    for index, prompt in enumerate(prompts):
        assert harness.finished[index + 1].output.tolist() == greedy(model, prompt, 5)


def test_every_sampling_parameter_draws_what_the_cpu_draws(saved):
    folder, _ = saved("llama")
    asked = [
        SamplingParams(temperature=0.8, seed=7),
        SamplingParams(temperature=1.1, top_k=20, top_p=0.8, min_p=0.01, seed=2**63 + 5),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5),
        SamplingParams(temperature=0.7, frequency_penalty=0.9, seed=-3, logit_bias={5: 4.0}),
        SamplingParams(temperature=0.0, logprobs=3, logit_bias={17: 30.0}),
    ]
    config = config_of(folder, device="cpu")
    harnesses = [harness_of(folder), Harness(build_runner(config), NUM_BLOCKS, BLOCK_SIZE, 4, 32)]
    prompts = prompts_of(*[6] * len(asked))
    for harness in harnesses:
        for prompt, params in zip(prompts, asked, strict=True):
            harness.add(prompt, 6, output=[3, 3, 9], params=params)
        harness.finish()
    on_gpu, on_cpu = (
        [harness.finished[i + 1].output.tolist() for i in range(len(asked))]
        for harness in harnesses
    )
    assert on_gpu == on_cpu


def test_logprobs_are_those_of_the_cpu(saved):
    folder, _ = saved("llama")
    params = SamplingParams(temperature=0.9, top_k=30, seed=5, logprobs=4)
    found = []
    prompt = prompts_of(9)[0]
    for harness in (
        harness_of(folder),
        Harness(build_runner(config_of(folder, device="cpu")), NUM_BLOCKS, BLOCK_SIZE, 4, 32),
    ):
        harness.add(prompt, 1, params=params)
        batch = harness.scheduler.submit(harness.scheduler.plan())
        harness.runner.submit(batch)
        found.append(harness.runner.collect().logprobs[0])
    (chosen, ids, values), (cpu_chosen, cpu_ids, cpu_values) = found
    assert ids.tolist() == cpu_ids.tolist()
    assert chosen == pytest.approx(cpu_chosen, abs=1e-4)
    np.testing.assert_allclose(values, cpu_values, atol=1e-4)


def test_a_stop_token_ends_the_row_on_the_device(saved):
    """The step in flight behind the stop draws nothing for it, and says that it did not live."""
    folder, model = saved("llama")
    prompt = prompts_of(12)[0]
    stop = greedy(model, prompt, 1)[0]
    harness = harness_of(folder)
    harness.add(prompt, 8, stop_token_ids=[stop])
    batches = [harness.scheduler.submit(harness.scheduler.plan()) for _ in range(2)]
    for batch in batches:
        harness.runner.submit(batch)
    first, second = harness.runner.collect(), harness.runner.collect()
    assert first.is_stop.tolist() == [True]
    assert second.tokens.tolist() == [-1]
    assert second.is_stop.tolist() == [False]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_size": 24}, "block_size is 24"),
        ({"kv_dtype": "fp8"}, "float32 asked with fp8"),
        ({"weights_dtype": "fp8"}, "float32 asked with fp8"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(saved, changes, named):
    folder, _ = saved("llama")
    with pytest.raises(UnsupportedModel, match=named):
        harness_of(folder, **changes)


def test_a_head_dim_without_kernels_is_refused_with_those_there_are(tmp_path):
    config = transformers.LlamaConfig(**SHAPE | {"head_dim": 32})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"head_dim is 32; .* \[64, 96, 128, 256\]"):
        harness_of(tmp_path)


def test_a_pool_that_does_not_fit_is_refused_in_bytes(saved):
    folder, _ = saved("llama")
    with pytest.raises(MemoryError, match="bytes in blocks of"):
        harness_of(folder, num_blocks=1 << 40)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.AcceleratorError("an illegal memory access was encountered"), DeviceLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), DeviceLost),
        (RuntimeError("Triton Error [CUDA]: unspecified launch failure"), DeviceLost),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_a_fault_of_the_device_is_told_from_one_of_ours(saved, monkeypatch, error, raised):
    folder, _ = saved("llama")
    harness = harness_of(folder)

    def fail(*_):
        raise error

    monkeypatch.setattr(harness.runner._graphs, "run", fail)
    harness.add([5, 6], 4)
    with pytest.raises(raised) as found:
        harness.step()
    assert type(found.value) is raised
