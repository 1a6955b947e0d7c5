"""The engine against transformers on the same weights: logits within tolerance, tokens equal.

fp32 throughout. What is varied is what must not matter: who else is in the batch, how a prompt is
cut into chunks, what the prefix cache holds, who was preempted, where an earlier attempt stopped.
"""

import numpy as np
import pytest
import torch

#: fp32 sums in another order over 3 layers of width 48; logits are of the order of 10.
TOLERANCE = 2e-4
MODELS = [
    "llama",
    "smollm2",
    "llama-biased",
    "llama-linear",
    "mistral",
    "qwen2",
    "qwen2-windows",
    "qwen3",
]


def make_prompts(seed, lengths, vocab=320):
    random = np.random.default_rng(seed)
    return [random.integers(3, vocab, length).tolist() for length in lengths]


@torch.inference_mode()
def peer_logits(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


@torch.inference_mode()
def peer_greedy(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(peer_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers_at_every_output(name, harness, peer):
    engine = harness(name, max_step_tokens=16)
    prompts = make_prompts(1, [3, 37, 1])
    seqs = [engine.add(prompt, 6) for prompt in prompts]
    compared = 0
    while engine.scheduler.has_work:
        for row, (seq, _) in enumerate(engine.step()):
            logits = engine.runner._logits[row]
            expected = peer_logits(peer(name), seq.tokens[: seq.num_received - 1].tolist())[-1]
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
            compared += 1
    assert compared == 6 * len(seqs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("block_size", "max_step_tokens"), [(4, 16), (16, 7), (64, 512)])
def test_greedy_tokens_equal_in_any_batch_and_chunk(
    name, block_size, max_step_tokens, harness, peer
):
    num_blocks = 1024 // block_size
    engine = harness(name, num_blocks, block_size, max_num_seqs=6, max_step_tokens=max_step_tokens)
    prompts = make_prompts(2, [1, 15, 16, 17, 40, 64])
    seqs = [engine.add(prompt, 5 + i) for i, prompt in enumerate(prompts[:3])]
    engine.step()
    seqs += [engine.add(prompt, 8) for prompt in prompts[3:]]  # joins a batch under way
    engine.finish()
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert seq.output.tolist() == peer_greedy(peer(name), prompt, seq.asked.max_tokens)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_greedy_tokens_equal_with_a_cached_prefix(name, harness, peer):
    engine = harness(name, num_blocks=64, block_size=4)
    first, second = make_prompts(3, [30, 9])
    prompts = [first, first, first[:12] + second, first[:8], first[:29]]
    for i, prompt in enumerate(prompts):
        seq = engine.add(prompt, 4)
        engine.finish()
        assert seq.output.tolist() == peer_greedy(peer(name), prompt, 4)
        assert seq.cached_tokens == [0, 28, 12, 4, 28][i]


@pytest.mark.parametrize("name", ["smollm2", "mistral", "qwen2"])
def test_greedy_tokens_equal_through_preemptions(name, harness, peer):
    engine = harness(name, num_blocks=14, block_size=4, max_step_tokens=24)
    # Short outputs are expected after these, so more is admitted than can be finished at once.
    engine.scheduler.lengths.add(2)
    engine.scheduler.lengths.add(40)
    for _ in range(30):
        engine.scheduler.lengths.add(3)
    prompts = make_prompts(4, [7, 9, 8, 11])
    seqs = [engine.add(prompt, 20, is_batch=i == 1) for i, prompt in enumerate(prompts)]
    engine.finish()
    assert engine.scheduler.num_preempted_total > 0
    for seq, prompt in zip(seqs, prompts, strict=True):
        assert seq.output.tolist() == peer_greedy(peer(name), prompt, 20)


@pytest.mark.parametrize("logged", [1, 4, 9])
def test_a_resumed_sequence_goes_on_with_the_same_tokens(logged, harness, peer):
    (prompt,) = make_prompts(5, [11])
    expected = peer_greedy(peer("qwen3"), prompt, 10)
    engine = harness("qwen3")
    seq = engine.add(prompt, 10, output=expected[:logged])
    engine.finish()
    assert seq.output.tolist() == expected


def test_a_masked_block_of_nan_spoils_only_its_own_sequence(harness, peer):
    engine = harness("smollm2", num_blocks=16, block_size=4)
    (prompt,) = make_prompts(6, [9])
    engine.runner._k_cache.fill_(torch.nan)
    engine.runner._v_cache.fill_(torch.nan)
    engine.runner.clear(list(range(16)))
    seq = engine.add(prompt, 4)
    engine.finish()
    assert seq.output.tolist() == peer_greedy(peer("smollm2"), prompt, 4)
