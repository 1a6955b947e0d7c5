"""The fp8 KV pool and the W8A8 layers in the whole engine; interpreted where there is no GPU."""

import numpy as np
import pytest
import torch
import transformers

from headrace.tests.worker.engine.conftest import Harness
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.gpu_start import E4M3_MAX, SCALE_MARGIN, build_gpu_runner
from headrace.worker.frames import EngineConfig

pytestmark = [
    pytest.mark.gpu,
    # Triton's interpreter computes with numpy, which warns where the noise's hash wraps, and of
    # what padding rows hold: attention leaves theirs unwritten.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

VOCAB, NUM_BLOCKS, BLOCK_SIZE, STEP_TOKENS = 96, 6, 16, 20
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
#: share of the logits' norm by which fp8 keys and values may move them. Each is off by 2.6% (rms):
#: a layer's attention by about twice that, scores and values, and the layers add as squares do.
KV_ERROR = 0.1
#: W8A8: each of 4 products a layer is off by 3.7% (kernels/fp8.py), gate and up multiply theirs.
W8A8_ERROR = 0.2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fp8")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(folder)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return folder, rounded.float().eval()  # the weights that the engine has


@pytest.fixture(scope="module")
def runner(saved):
    """Return an engine's runner with an fp8 pool."""
    return runner_of(saved[0], kv_dtype="fp8")


def runner_of(folder, **changes):
    config = EngineConfig(
        str(folder), device="cuda", block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, max_num_seqs=2,
        max_step_tokens=STEP_TOKENS, max_seq_tokens=48, **changes,
    )  # fmt: skip
    return build_gpu_runner(config, Architecture.from_folder(folder), folder)


@torch.inference_mode()
def behind_of(model, seq):
    """Return by how much each token's logit is below the largest, as a share of the row's norm."""
    known = seq.tokens[: seq.num_received].tolist()
    logits = model(torch.tensor([known])).logits[0, seq.num_prompt - 1 : -1]
    behind = logits.max(dim=1).values - logits[torch.arange(len(logits)), torch.tensor(seq.output)]
    return (behind / logits.norm(dim=1)).max().item()


def finish(runner, *lengths):
    """Let random prompts get 3 tokens each; return the sequences."""
    harness = Harness(runner, NUM_BLOCKS, BLOCK_SIZE, max_num_seqs=2, max_step_tokens=STEP_TOKENS)
    rng = np.random.default_rng()
    seqs = [harness.add(rng.integers(0, VOCAB, n).tolist(), 3) for n in lengths]
    harness.finish()
    return seqs


def test_a_greedy_stream_from_an_fp8_pool_is_near_that_of_the_model(saved, runner):
    """Within a block, and over two steps and blocks: no token is further behind than the error."""
    assert runner._cache.k.dtype is torch.float8_e4m3fn
    for seq in finish(runner, 5, 24):
        assert seq.num_output == 3
        # An error spread over the row moves single logits by its share of the row at most.
        assert behind_of(saved[1], seq) < KV_ERROR
    assert torch.isfinite(runner._cache.k.float()).all()
    assert runner._cache.k.float().abs().sum() > 0


@torch.inference_mode()
def test_scales_are_those_of_the_calibration_s_largest_keys_and_values(saved, runner):
    """The same tokens by transformers; bf16 keys are within 2% of fp32 ones."""
    tokens = torch.randint(
        VOCAB, (STEP_TOKENS,), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    kept = saved[1](tokens[None].long(), use_cache=True).past_key_values
    cache = runner._cache
    for layer in range(SHAPE["num_hidden_layers"]):
        for scale, values in (
            (cache.k_scale, kept.layers[layer].keys),
            (cache.v_scale, kept.layers[layer].values),
        ):
            largest = values[0].abs().amax(dim=(1, 2))  # [num_kv_heads]
            expected = largest * SCALE_MARGIN / E4M3_MAX
            assert (scale[layer] > 0).all()
            torch.testing.assert_close(scale[layer].cpu(), expected, rtol=0.02, atol=0)


def test_fp8_layers_start_clean_and_their_stream_is_near_that_of_the_model(saved):
    """Calibration leaves nothing of its prompt in pool and slots."""
    fresh = runner_of(saved[0], kv_dtype="fp8", weights_dtype="fp8")
    for stored in (fresh._cache.k, fresh._cache.v):
        assert not stored.view(torch.uint8).any()
    assert not fresh._state.words.any()
    for seq in finish(fresh, 7):
        assert seq.num_output == 3
        assert behind_of(saved[1], seq) < W8A8_ERROR
