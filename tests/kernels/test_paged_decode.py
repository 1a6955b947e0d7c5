import pytest
import torch

from headrace.kernels.decode_work import DecodeWork, plan_decode
from headrace.kernels.paged_decode import (
    TOLERANCE,
    DecodeTuning,
    paged_decode,
    paged_decode_reference,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One token; padding in the middle; a block exactly full; one over; several blocks.
CONTEXT_LENS = [1, 0, 16, 17, 37]
FP8 = torch.float8_e4m3fn


def make_work(cache, num_q_heads, window=None, num_shares=4, table_rows=None):
    """Plan in shares of one unit and up, so that short tests are cut as long steps are."""
    heads = (num_q_heads, *cache.k.shape[2:])
    max_seqs, device = len(cache.context_lens), cache.k.device
    work = DecodeWork.allocate(
        max_seqs, heads, device, window, num_shares=num_shares, overhead=1, min_share=1
    )
    plan_decode(work, cache.context_lens, table_rows)
    return work


def run_both(cache, num_q_heads, dtype, window=None, num_shares=4, **options):
    head_dim = cache.k.shape[3]
    q = torch.randn(len(cache.context_lens), num_q_heads, head_dim, device=cache.k.device)
    args = (q.to(dtype), cache.k, cache.v, cache.block_tables, cache.context_lens, head_dim**-0.5)
    out = torch.full_like(args[0], float("nan"))
    table_rows, tuning = options.pop("table_rows", None), options.pop("tuning", None)
    work = make_work(cache, num_q_heads, window, num_shares, table_rows)
    actual = paged_decode(*args, window, out, work=work, tuning=tuning, **options)
    assert actual is out
    return actual, paged_decode_reference(*args, window, table_rows=table_rows, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_shares", [1, 5])
def test_kernel_equals_its_reference(num_shares, dtype, device, make_cache, assert_close):
    cache = make_cache(CONTEXT_LENS, 64, dtype)
    actual, expected = run_both(cache, 6, dtype, num_shares=num_shares)
    assert_close(actual, expected, TOLERANCE)
    assert (actual[1] == 0).all()


@pytest.mark.parametrize("merges_inside", [True, False])
@pytest.mark.parametrize("num_shares", [2, 3, 7, 64])
def test_the_number_of_shares_does_not_change_the_result(
    num_shares, merges_inside, make_cache, assert_close
):
    cache = make_cache([64, 3, 0, 100], 64, torch.float32, num_kv_heads=1)
    tuning = DecodeTuning(16, merges_inside=merges_inside)
    actual, expected = run_both(cache, 2, torch.float32, num_shares=num_shares, tuning=tuning)
    assert_close(actual, expected, TOLERANCE)


def test_more_splits_than_the_merge_holds_at_once(make_cache, assert_close):
    cache = make_cache([600], 64, torch.float32, num_kv_heads=1)
    actual, expected = run_both(cache, 1, torch.float32, num_shares=40)
    assert_close(actual, expected, TOLERANCE)


def test_a_work_list_planned_inside_gives_the_same(device, make_cache, assert_close):
    cache = make_cache([200, 0, 5], 64, torch.float32, num_kv_heads=1)
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    cache.block_tables = cache.block_tables[[1, 2, 0]]
    q = torch.randn(3, 2, 64, device=device)
    args = (q, cache.k, cache.v, cache.block_tables, cache.context_lens, 0.125)
    actual = paged_decode(*args, table_rows=rows)
    assert_close(actual, paged_decode_reference(*args, table_rows=rows), TOLERANCE)


def test_a_step_of_mostly_padding(make_cache, assert_close):
    lens = [0] * 40
    lens[3], lens[38] = 20, 7
    actual, expected = run_both(make_cache(lens, 64, torch.float32), 4, torch.float32)
    assert_close(actual, expected, TOLERANCE)


def test_arrivals_are_zero_again_and_launches_repeat_bit_for_bit(device, make_cache):
    cache = make_cache([90, 40], 64, torch.float32)
    work = make_work(cache, 4, num_shares=5)
    q = torch.randn(2, 4, 64, device=device)
    args = (q, cache.k, cache.v, cache.block_tables, cache.context_lens, 0.125)
    first = paged_decode(*args, work=work)
    assert not work.arrivals.any()
    work.partial.fill_(float("nan"))
    work.partial_lse.fill_(float("nan"))
    assert torch.equal(paged_decode(*args, work=work), first)
    assert not work.arrivals.any()


def test_very_unequal_lengths(make_cache, assert_close):
    cache = make_cache([1, 2, 400, 3, 0, 1, 90, 1], 64, torch.float32, num_kv_heads=1)
    actual, expected = run_both(cache, 3, torch.float32, num_shares=6)
    assert_close(actual, expected, TOLERANCE)


def test_rows_behind_the_sequences_are_left_alone(device, make_cache, assert_close):
    cache = make_cache([5, 0, 20], 64, torch.float32)
    q = torch.full((6, 4, 64), float("nan"), device=device)
    q[:3] = torch.randn(3, 4, 64, device=device)
    out = torch.full_like(q, 7.0)
    args = (q, cache.k, cache.v, cache.block_tables, cache.context_lens, 0.125)
    paged_decode(*args, out=out)
    assert_close(out[:3], paged_decode_reference(*args)[:3], TOLERANCE)
    assert (out[3:] == 7.0).all()


def test_tables_of_slots_in_any_order_inside_a_wider_state(device, make_cache, assert_close):
    cache = make_cache([33, 0, 18, 50], 64, torch.float32)
    rows = torch.tensor([4, -1, 0, 2], dtype=torch.int32, device=device)
    width = cache.block_tables.shape[1]
    state = torch.full((6, width + 9), -5, dtype=torch.int32, device=device)
    tables = state[:, 4 : 4 + width]
    for seq in (0, 2, 3):
        tables[int(rows[seq])] = cache.block_tables[seq]
    cache.block_tables = tables
    actual, expected = run_both(cache, 4, torch.float32, table_rows=rows)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("window", [None, 20])
def test_a_cache_with_a_heads_page_in_one_piece(window, make_cache, assert_close):
    cache = make_cache([16, 45], 64, torch.float32)
    # One pool for keys and values: the block stride is that of both together.
    pool = torch.stack((cache.k.transpose(1, 2), cache.v.transpose(1, 2)), dim=1)
    cache.k, cache.v = pool[:, 0].transpose(1, 2), pool[:, 1].transpose(1, 2)
    actual, expected = run_both(cache, 4, torch.float32, window)
    assert_close(actual, expected, TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merges_inside", [True, False])
def test_an_fp8_cache_with_a_scale_a_head(merges_inside, dtype, device, make_cache, assert_close):
    cache = make_cache([17, 0, 40], 64, torch.float32)
    # NaN in every slot without a token stays NaN in fp8.
    cache.k, cache.v = (cache.k * 2).to(FP8), (cache.v * 3).to(FP8)
    scales = {
        "k_scale": torch.tensor([0.5, 1.5], device=device),
        "v_scale": torch.tensor([2.0, 0.25], device=device),
    }
    tuning = DecodeTuning(16, merges_inside=merges_inside)
    actual, expected = run_both(cache, 4, dtype, tuning=tuning, **scales)
    assert_close(actual, expected, TOLERANCE)


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


@pytest.mark.parametrize("num_shares", [1, 3])
@pytest.mark.parametrize("window", [1, 16, 21, 100])
def test_a_window_needs_no_block_behind_it(window, num_shares, device, make_cache, assert_close):
    cache = make_cache([1, 33, 50], 64, torch.float32)
    cache.drop_blocks_behind(window, [1, 1, 1])
    actual, expected = run_both(cache, 6, torch.float32, window, num_shares)
    assert_close(actual, expected, TOLERANCE)
    assert not expected.isnan().any()


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
        ({"context_lens": cache.context_lens[:1]}, r"block_tables must have shape \[1, 2\]; found"),
        ({"block_tables": cache.block_tables.long()}, r"block_tables must be torch.int32; found"),
        ({"block_tables": cache.block_tables[:1]}, r"block_tables must have shape .*; found \[1"),
        ({"q": good["q"].half()}, r"k_cache must be torch.float16 as .*; found torch.float32: "),
        ({"q": good["q"].transpose(0, 1)}, r"q must be contiguous; found strides"),
        ({"context_lens": cache.context_lens.repeat(2)}, r"q must have a row for each of 4 .*; f"),
        ({"k_cache": cache.k.mT}, r"k_cache must be .* head_dim 64; found \["),
        ({"v_cache": cache.v.mT.contiguous().mT}, r"v_cache must be dense in its last .*; found"),
        (
            {"v_cache": cache.v.transpose(1, 2).contiguous().transpose(1, 2)},
            r"v_cache must have the strides of k_cache, .*; found \[",
        ),
        ({"k_scale": torch.ones(2, device=device)}, r"k_scale must be given for .*; found one"),
        ({"k_cache": cache.k.to(FP8), "v_cache": cache.v.to(FP8)}, r"k_scale .*; found none with"),
        ({"tuning": DecodeTuning(32)}, r"tile must .* divide block_size; found 32 and 16: "),
        (
            {"work": make_work(cache, 6), "table_rows": cache.context_lens},
            r"table_rows must be given to plan_decode .*; found both here: ",
        ),
        ({"work": make_work(cache, 8)}, r"work must be allocated .*; found \(8, 64, 2, None\)"),
        ({"work": make_work(cache, 6, 9)}, r"\(6, 64, 2, None\) .*; found \(6, 64, 2, 9\)"),
    ):
        with pytest.raises(ValueError, match=text):
            paged_decode(**(good | changed))
