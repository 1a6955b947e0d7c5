"""The floor against the table it comes from, and against sums done by hand."""

import pytest

from headrace.bench import workload
from headrace.bench.roofline import ModelCost, Roofline, count_distinct_tokens

#: columns: weights GB, KV KiB a token, batch-1 step ms, 64 sequences, 256 x 1024/1024, that with
#: fp8 KV, "mixed", that with fp8 KV; the last five in thousands of tokens a second.
TABLE = {
    "qwen3-0.6b": (1.19, 112, 0.31, 30.0, 23.1, 43.8, 36, 65),
    "llama-1b": (2.47, 32, 0.58, 57.9, 60.6, 93.9, 73, 99),
    "qwen3-8b": (15.1, 144, 3.56, 10.8, 11.85, 17.2, 13.4, 17),
    "llama-8b": (15.0, 128, 3.52, 11.4, 12.7, 18.2, 14.1, 17.6),
}
OTHERS = {
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def cost_of(name):
    return ModelCost.from_config(workload.MODELS.get(name) or OTHERS[name])


def rate(roofline, requests):
    """Thousands of output tokens a second."""
    return sum(out for _, out in requests) / roofline.workload_s(requests, 256) / 1e3


@pytest.mark.parametrize("name", TABLE)
def test_the_reference_table_is_reproduced(name):
    weights_gb, kv_kib, alone_ms, of_64, of_256, of_256_fp8, mixed, mixed_fp8 = TABLE[name]
    bf16, fp8 = Roofline(cost_of(name)), Roofline(cost_of(name), kv_bytes=1)
    assert bf16.weight_bytes / 1e9 == pytest.approx(weights_gb, rel=0.01)
    assert bf16.kv_bytes_per_token == kv_kib * 1024
    assert bf16.decode_s(1100) * 1e3 == pytest.approx(alone_ms, rel=0.02)
    assert 64 / bf16.decode_s(64 * 1100) / 1e3 == pytest.approx(of_64, rel=0.03)
    # Prompts that share nothing: each begins with a token of its own.
    equal = [([n] * 1024, 1024) for n in range(256)]
    assert rate(bf16, equal) == pytest.approx(of_256, rel=0.03)
    assert rate(fp8, equal) == pytest.approx(of_256_fp8, rel=0.03)
    requests = workload.requests("mixed", 49152)
    assert rate(bf16, requests) == pytest.approx(mixed, rel=0.03)
    assert rate(fp8, requests) == pytest.approx(mixed_fp8, rel=0.03)


def test_a_full_batch_makes_the_rest_wait():
    floor = Roofline(ModelCost(layer_params=10**9, head_params=10**8, kv_elements=1000))
    requests = [([n, 5, 6], 3) for n in range(5)]
    # Each makes two tokens in decode steps, at contexts 4 and 5.
    prefill_s = floor.prefill_s(15)
    together_s = floor.decode_s(5 * 4) + floor.decode_s(5 * 5)
    in_turn_s = 5 * (floor.decode_s(4) + floor.decode_s(5))
    assert floor.workload_s(requests, 5) == pytest.approx(prefill_s + together_s)
    assert floor.workload_s(requests, 1) == pytest.approx(prefill_s + in_turn_s)
    assert floor.workload_s(requests, 99) == floor.workload_s(requests, 5)


def test_a_place_is_taken_over_at_the_next_step():
    floor = Roofline(ModelCost(layer_params=10**9, head_params=0, kv_elements=1000))
    requests = [([1], 2), ([2], 4), ([3], 3)]
    steps_s = floor.decode_s(2 + 2) + floor.decode_s(3 + 2) + floor.decode_s(4 + 3)
    assert floor.workload_s(requests, 2) == pytest.approx(floor.prefill_s(3) + steps_s)


def test_one_output_token_needs_no_decode_step():
    floor = Roofline(cost_of("llama-8b"))
    assert floor.workload_s([([1] * 4096, 1)], 8) == floor.prefill_s(4096)


def test_a_short_prefill_still_reads_the_weights():
    floor = Roofline(cost_of("llama-8b"))
    assert floor.prefill_s(1) == floor.decode_s(0)
    assert floor.prefill_s(4096) > 5 * floor.prefill_s(1)


def test_fp8_layers_halve_bytes_and_double_the_rate_but_for_lm_head():
    cost = cost_of("llama-8b")
    bf16, fp8 = Roofline(cost), Roofline(cost, layer_bytes=1)
    assert bf16.weight_bytes - fp8.weight_bytes == cost.layer_params
    assert fp8.prefill_s(8192) == pytest.approx(bf16.prefill_s(8192) / 2)


def test_shared_prefixes_are_computed_once():
    assert count_distinct_tokens([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9], [5]]) == 3 + 1 + 1 + 1
    assert count_distinct_tokens([[1, 2], [1, 2]]) == 2
    assert count_distinct_tokens([]) == 0
    shared = [prompt for prompt, _ in workload.requests("shared", 49152)]
    # Own tokens that begin alike by chance are few.
    assert count_distinct_tokens(shared) == pytest.approx(8 * 2048 + 512 * 64, abs=64)
