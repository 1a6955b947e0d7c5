import pytest
import torch

from headrace.kernels.paged_decode import paged_decode_reference
from headrace.kernels.paged_prefill import TOLERANCE, paged_prefill, paged_prefill_reference
from headrace.kernels.prefill_work import (
    PrefillTiling,
    choose_tiling,
    make_prefill_work,
    plan_prefill,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run_both(
    cache, chunk_lens, num_q_heads, dtype, window=None, num_before=0, num_after=0, **options
):
    """Return the chunks' rows from the kernel and the reference; other rows must stay as poisoned.

    Rows of q outside the chunks are NaN too: nothing may read them.
    """
    device, head_dim = cache.k.device, cache.k.shape[3]
    starts = torch.tensor([num_before, *chunk_lens]).cumsum(0).to(torch.int32).to(device)
    inside = slice(num_before, num_before + sum(chunk_lens))
    num_tokens = inside.stop + num_after
    q = torch.full((num_tokens, num_q_heads, head_dim), float("nan"), dtype=dtype, device=device)
    q[inside] = torch.randn(sum(chunk_lens), num_q_heads, head_dim, device=device).to(dtype)
    args = (q, cache.k, cache.v, cache.block_tables, starts, cache.context_lens, head_dim**-0.5)
    out = torch.full_like(q, float("nan"))
    actual = paged_prefill(*args, window=window, out=out, **options)
    assert actual is out
    assert actual[:num_before].isnan().all()
    assert actual[inside.stop :].isnan().all()
    shared = {name: value for name, value in options.items() if name not in ("work", "tiling")}
    return actual[inside], paged_prefill_reference(*args, window=window, **shared)[inside]


def put_heads_first(cache):
    """Lay the cache out as [num_blocks, num_kv_heads, block_size, head_dim]; the view stays."""
    cache.k = cache.k.transpose(1, 2).contiguous().transpose(1, 2)
    cache.v = cache.v.transpose(1, 2).contiguous().transpose(1, 2)


def quantise(cache):
    """Turn the cache into fp8; return the options with its scales, one a KV head."""
    scales = {}
    for name in ("k", "v"):
        values = getattr(cache, name).float()
        scale = values.nan_to_num().abs().amax((0, 1, 3)) / 448
        setattr(cache, name, (values / scale[:, None]).to(torch.float8_e4m3fn))
        scales[f"{name}_scale"] = scale
    return scales


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_its_reference(dtype, device, make_cache, assert_close):
    # A whole prompt of one block, one over, a chunk after others, a decode, and one with no chunk.
    cache = make_cache([16, 17, 40, 21, 9], 64, dtype)
    actual, expected = run_both(cache, [16, 17, 7, 1, 0], 6, dtype, num_after=3)
    assert_close(actual, expected, TOLERANCE)


def test_chunks_stand_behind_decodes_and_between_empty_ones(device, make_cache, assert_close):
    cache = make_cache([9, 33, 7, 4, 18, 3], 64, torch.float32)
    actual, expected = run_both(
        cache, [0, 12, 0, 0, 18, 0], 6, torch.float32, num_before=5, num_after=2
    )
    assert_close(actual, expected, TOLERANCE)


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
    actual, _ = run_both(cache, [0], 6, torch.float32, num_after=2)
    assert actual.shape[0] == 0


@pytest.mark.parametrize("window", [None, 5])
def test_a_chunk_longer_than_a_tile_is_cut(window, device, make_cache, assert_close):
    # 18 query heads a KV head leave 3 tokens of 16-bit rows a tile, the rest of its rows idle.
    cache = make_cache([70, 45], 64, torch.float16, num_kv_heads=1)
    tiling = PrefillTiling(64, 18, 16, 4, 2, 1)
    actual, expected = run_both(cache, [9, 31], 18, torch.float16, window, tiling=tiling)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_heads_of_a_group_may_be_cut_apart(heads, device, make_cache, assert_close):
    cache = make_cache([30, 20], 64, torch.float16, num_kv_heads=2)
    tiling = PrefillTiling(16, heads, 16, 4, 2, 1)
    actual, expected = run_both(cache, [11, 20], 12, torch.float16, tiling=tiling)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("num_programs", [1, 3, 1000])
def test_any_grid_does_all_the_work(num_programs, device, make_cache, assert_close):
    cache = make_cache([40, 5, 23], 64, torch.float32)
    chunk_lens = [17, 5, 9]
    starts = torch.tensor([0, *chunk_lens]).cumsum(0).to(torch.int32).to(device)
    q = torch.randn(31, 6, 64, device=device)
    args = (q, cache.k, cache.v, cache.block_tables, starts, cache.context_lens, 0.125)
    out = torch.full_like(q, float("nan"))
    paged_prefill(*args, out=out, num_programs=num_programs)
    assert_close(out, paged_prefill_reference(*args), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 64])
def test_either_layout_of_the_cache(dtype, block_size, device, make_cache, assert_close):
    cache = make_cache([70, 21], 64, dtype, block_size=block_size)
    put_heads_first(cache)
    assert not cache.k.is_contiguous()
    actual, expected = run_both(cache, [30, 21], 4, dtype)
    assert_close(actual, expected, TOLERANCE)


def test_chunks_take_their_rows_of_a_wider_table(device, make_cache, assert_close):
    cache = make_cache([20, 35, 8], 64, torch.float32)
    wide = torch.full((9, 40), -1, dtype=torch.int32, device=device)
    slots = torch.tensor([7, 0, 4], dtype=torch.int32, device=device)
    wide[slots.long(), : cache.block_tables.shape[1]] = cache.block_tables
    plain = run_both(cache, [3, 14, 8], 6, torch.float32)
    assert_close(*plain, TOLERANCE)
    cache.block_tables = wide[:, :5]
    actual, expected = run_both(cache, [3, 14, 8], 6, torch.float32, table_rows=slots)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 13])
def test_an_fp8_cache_equals_its_dequantised_self(dtype, window, device, make_cache, assert_close):
    cache = make_cache([16, 41, 9], 64, dtype)
    put_heads_first(cache)
    cache.drop_blocks_behind(window or 100, [16, 20, 9])
    scales = quantise(cache)
    actual, expected = run_both(cache, [16, 20, 9], 4, dtype, window, **scales)
    assert_close(actual, expected, TOLERANCE)


def test_layers_of_one_step_share_a_plan(device, make_cache, assert_close):
    cache = make_cache([40, 5, 23], 64, torch.bfloat16)
    tile_tokens = choose_tiling(3, 64, torch.bfloat16).tile_tokens
    starts = torch.tensor([2, 19, 24, 33], dtype=torch.int32, device=device)
    work = make_prefill_work(64, 3, tile_tokens, device)
    plan_prefill(work, starts, cache.context_lens)
    for window in (None, 6):
        actual, expected = run_both(
            cache, [17, 5, 9], 6, torch.bfloat16, window, num_before=2, work=work
        )
        assert_close(actual, expected, TOLERANCE)


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
        ({"v_cache": cache.v.half()}, r"v_cache must be torch.float32; found torch.float16: "),
        ({"k_cache": cache.k[..., :32]}, r"k_cache must be \[num_blocks, .* found \[.*32\]: "),
        ({"v_cache": cache.v.mT.contiguous().mT}, r"v_cache must be dense in its last .*; found"),
        ({"k_scale": torch.ones(2)}, r"k_scale must be given for a torch.float8_e4m3fn .*; found"),
        ({"block_tables": cache.block_tables.long()}, r"block_tables must be torch.int32; found"),
        (
            {"block_tables": cache.block_tables.mT},
            r"block_tables must be dense in its last .*; found",
        ),
        ({"table_rows": cache.context_lens[:1]}, r"table_rows must have shape \[2\]; found \[1\]"),
        ({"scale": 0.0}, r"scale must be above 0; found 0.0: "),
        ({"tiling": PrefillTiling(64, 2, 16, 4, 2, 1)}, r"heads must divide the group .* found 2"),
        (
            {"work": make_prefill_work(8, 2, 3, device)},
            r"work must list tiles of 5 tokens, .*; found 3: ",
        ),
        (
            {"work": make_prefill_work(8, 2, 5, torch.device("meta"))},
            r"work must be on .*, where q is; found meta: ",
        ),
        ({"q": good["q"][0]}, r"q must have 3 dimensions; found shape \[6, 64\]: "),
    ):
        with pytest.raises(ValueError, match=text):
            paged_prefill(**(good | changed))
