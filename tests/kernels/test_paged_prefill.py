import pytest
import torch

from headrace.kernels.paged_decode import paged_decode_reference
from headrace.kernels.paged_prefill import TOLERANCE, paged_prefill, paged_prefill_reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run_both(cache, chunk_lens, num_q_heads, dtype, window=None, num_padding=0):
    device, head_dim = cache.k.device, cache.k.shape[3]
    num_tokens = sum(chunk_lens) + num_padding
    starts = torch.tensor([0, *chunk_lens]).cumsum(0).to(torch.int32).to(device)
    q = torch.randn(num_tokens, num_q_heads, head_dim, device=device).to(dtype)
    args = (q, cache.k, cache.v, cache.block_tables, starts, cache.context_lens, head_dim**-0.5)
    out = torch.full_like(q, float("nan"))
    actual = paged_prefill(*args, window=window, out=out)
    assert actual is out
    return actual, paged_prefill_reference(*args, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_its_reference(dtype, device, make_cache, assert_close):
    # A whole prompt of one block, one over, a chunk after others, a decode, and one with no chunk.
    cache = make_cache([16, 17, 40, 21, 9], 64, dtype)
    actual, expected = run_both(cache, [16, 17, 7, 1, 0], 6, dtype, num_padding=3)
    assert_close(actual, expected, TOLERANCE)
    assert (actual[-3:] == 0).all()


@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_every_head_dim(head_dim, device, make_cache, assert_close):
    cache = make_cache([18], head_dim, torch.bfloat16, num_kv_heads=1)
    actual, expected = run_both(cache, [5], 3, torch.bfloat16)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (9, 3), (4, 4), (20, 1)])
def test_every_grouping_of_heads(num_q_heads, num_kv_heads, device, make_cache, assert_close):
    cache = make_cache([18, 5], 64, torch.float32, num_kv_heads=num_kv_heads)
    actual, expected = run_both(cache, [6, 5], num_q_heads, torch.float32)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("window", [1, 16, 21, 100])
def test_a_window_needs_no_block_behind_it(window, device, make_cache, assert_close):
    cache = make_cache([20, 50, 33], 64, torch.float32)
    chunk_lens = [20, 18, 1]
    cache.drop_blocks_behind(window, chunk_lens)
    actual, expected = run_both(cache, chunk_lens, 6, torch.float32, window)
    assert_close(actual, expected, TOLERANCE)
    assert not expected.isnan().any()


def test_one_token_alone_and_padding_alone(device, make_cache, assert_close):
    cache = make_cache([1], 64, torch.float32)
    actual, expected = run_both(cache, [1], 6, torch.float32)
    assert_close(actual, expected, TOLERANCE)
    actual, _ = run_both(cache, [0], 6, torch.float32, num_padding=2)
    assert (actual == 0).all()


@pytest.mark.parametrize("num_seqs", [3, 8])
def test_many_short_chunks_share_the_grid(num_seqs, device, make_cache, assert_close):
    chunk_lens = [1 + seq % 3 for seq in range(num_seqs)]
    cache = make_cache([length + 4 for length in chunk_lens], 64, torch.float32, num_kv_heads=1)
    actual, expected = run_both(cache, chunk_lens, 16, torch.float32)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("window", [None, 7])
def test_the_reference_is_dense_causal_attention(window, device, make_cache):
    cache = make_cache([29], 64, torch.float32)
    q = torch.randn(10, 6, 64, device=device)
    actual = paged_prefill_reference(
        q, cache.k, cache.v, cache.block_tables,
        torch.tensor([0, 10], dtype=torch.int32, device=device), cache.context_lens, 0.3, window,
    )  # fmt: skip
    seen = torch.ones(29, 29, dtype=torch.bool, device=device).tril()
    if window is not None:
        seen = seen.triu(1 - window)
    k, v = (dense[0].transpose(0, 1)[None] for dense in (cache.dense_k, cache.dense_v))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=seen[-10:], scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected[0].transpose(0, 1))


def test_a_chunk_of_one_token_is_a_decode(device, make_cache):
    cache = make_cache([1, 16, 40], 64, torch.float32)
    q = torch.randn(3, 6, 64, device=device)
    starts = torch.arange(4, dtype=torch.int32, device=device)
    paged = (cache.k, cache.v, cache.block_tables)
    for window in (None, 9):
        torch.testing.assert_close(
            paged_prefill_reference(q, *paged, starts, cache.context_lens, 0.1, window),
            paged_decode_reference(q, *paged, cache.context_lens, 0.1, window),
        )


def test_bad_arguments_are_told_apart(device, make_cache):
    cache = make_cache([5, 3], 64, torch.float32)
    good = {
        "q": torch.randn(8, 6, 64, device=device),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "block_tables": cache.block_tables,
        "cu_q_lens": torch.tensor([0, 5, 8], dtype=torch.int32, device=device),
        "context_lens": cache.context_lens,
        "scale": 0.125,
    }
    for changed, text in (
        ({"cu_q_lens": good["cu_q_lens"][:2]}, r"cu_q_lens must have shape \[3\]; found \[2\]: "),
        ({"cu_q_lens": good["cu_q_lens"].long()}, r"cu_q_lens must be torch.int32; found"),
        ({"window": -1}, r"window must be at least 1 .*; found -1: "),
        ({"q": good["q"][:, :5].contiguous()}, r"must be a multiple of .*; found 5 and 2: "),
        ({"v_cache": cache.v[1:]}, r"v_cache must have shape"),
        ({"q": good["q"][0]}, r"q must have 3 dimensions; found shape \[6, 64\]: "),
    ):
        with pytest.raises(ValueError, match=text):
            paged_prefill(**(good | changed))
