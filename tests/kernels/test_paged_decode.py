import pytest
import torch

from headrace.kernels.paged_decode import (
    TOLERANCE,
    choose_num_splits,
    paged_decode,
    paged_decode_reference,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One token; padding in the middle; a block exactly full; one over; several blocks.
CONTEXT_LENS = [1, 0, 16, 17, 37]


def run_both(cache, num_q_heads, dtype, window=None, **splitting):
    head_dim = cache.k.shape[3]
    q = torch.randn(len(cache.context_lens), num_q_heads, head_dim, device=cache.k.device)
    args = (q.to(dtype), cache.k, cache.v, cache.block_tables, cache.context_lens)
    out = torch.full_like(args[0], float("nan"))
    actual = paged_decode(*args, head_dim**-0.5, window=window, out=out, **splitting)
    assert actual is out
    return actual, paged_decode_reference(*args, head_dim**-0.5, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_kernel_equals_its_reference(num_splits, dtype, device, make_cache, assert_close):
    cache = make_cache(CONTEXT_LENS, 64, dtype)
    actual, expected = run_both(cache, 6, dtype, num_splits=num_splits, min_split_tokens=16)
    assert_close(actual, expected, TOLERANCE)
    assert (actual[1] == 0).all()


@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_every_head_dim(head_dim, device, make_cache, assert_close):
    cache = make_cache([19], head_dim, torch.bfloat16, num_kv_heads=1)
    actual, expected = run_both(cache, 3, torch.bfloat16)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (9, 3), (4, 4), (20, 1)])
def test_every_grouping_of_heads(num_q_heads, num_kv_heads, device, make_cache, assert_close):
    cache = make_cache([18, 5], 64, torch.float32, num_kv_heads=num_kv_heads)
    actual, expected = run_both(cache, num_q_heads, torch.float32)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("window", [1, 16, 21, 100])
def test_a_window_needs_no_block_behind_it(window, num_splits, device, make_cache, assert_close):
    cache = make_cache([1, 33, 50], 64, torch.float32)
    cache.drop_blocks_behind(window, [1, 1, 1])
    actual, expected = run_both(
        cache, 6, torch.float32, window, num_splits=num_splits, min_split_tokens=16
    )
    assert_close(actual, expected, TOLERANCE)
    assert not expected.isnan().any()


@pytest.mark.parametrize("num_splits", [1, 2, 5, 64])
def test_the_number_of_splits_does_not_change_the_result(num_splits, make_cache, assert_close):
    cache = make_cache([64, 3, 47], 64, torch.float32, num_kv_heads=1)
    actual, expected = run_both(cache, 2, torch.float32, num_splits=num_splits, min_split_tokens=1)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("block_size", [32, 128])
def test_larger_blocks(block_size, device, make_cache, assert_close):
    cache = make_cache([block_size, block_size + 1], 64, torch.float32, 1, block_size)
    actual, expected = run_both(cache, 3, torch.float32)
    assert_close(actual, expected, TOLERANCE)


def test_the_reference_is_dense_attention(device, make_cache):
    cache = make_cache([29], 64, torch.float32)
    q = torch.randn(1, 6, 64, device=device)
    actual = paged_decode_reference(
        q, cache.k, cache.v, cache.block_tables, cache.context_lens, 0.3, window=11
    )
    k, v = (dense[0][-11:].transpose(0, 1)[None] for dense in (cache.dense_k, cache.dense_v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected[0].transpose(0, 1))


def test_a_machine_without_a_gpu_is_not_split_for():
    assert choose_num_splits(1, 1 << 20, torch.device("cpu")) == 1


def test_bad_arguments_are_told_apart(device, make_cache):
    cache = make_cache([5, 3], 64, torch.float32)
    good = {
        "q": torch.randn(2, 6, 64, device=device),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "block_tables": cache.block_tables,
        "context_lens": cache.context_lens,
        "scale": 0.125,
    }
    odd_cache = torch.zeros(4, 12, 2, 64, device=device)
    small_heads = torch.zeros(4, 16, 2, 32, device=device)
    for changed, text in (
        ({"window": 0}, r"window must be at least 1 .*; found 0: "),
        (
            {"k_cache": odd_cache, "v_cache": odd_cache},
            r"block_size must be a power .*; found 12: ",
        ),
        (
            {
                "q": good["q"][:, :, :32].contiguous(),
                "k_cache": small_heads,
                "v_cache": small_heads,
            },
            r"head_dim in \[64, 96, 128, 256\]; found 32: ",
        ),
        ({"q": good["q"][:, :5].contiguous()}, r"must be a multiple of .*; found 5 and 2: "),
        ({"context_lens": cache.context_lens[:1]}, r"context_lens must have shape \[2\]; found"),
        ({"block_tables": cache.block_tables.long()}, r"block_tables must be torch.int32; found"),
        ({"block_tables": cache.block_tables[:1]}, r"block_tables must have shape .*; found \[1"),
        ({"q": good["q"].half()}, r"k_cache must be torch.float16; found torch.float32: "),
        ({"q": good["q"].transpose(0, 1)}, r"q must be contiguous; found strides"),
        ({"num_splits": 0}, r"num_splits must be from 1 to 64 .*; found 0 and 256: "),
    ):
        with pytest.raises(ValueError, match=text):
            paged_decode(**(good | changed))
