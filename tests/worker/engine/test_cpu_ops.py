"""cpu_ops.py against the kernels' references, over the shapes a step can have."""

import numpy as np
import pytest
import torch

from headrace.kernels.paged_decode import paged_decode_reference
from headrace.kernels.paged_prefill import paged_prefill_reference
from headrace.kernels.qkv_rope_write import qkv_rope_write_reference
from headrace.kernels.rms_norm import residual_rms_norm_reference, rms_norm_reference
from headrace.kernels.silu_mul import silu_mul_reference
from headrace.worker.engine import cpu_ops
from headrace.worker.engine.flat import FlatBatch

#: on values of the order of 1: fp32 sums in another order; bf16 has 8 bits, and attention rounds
#: its weights to it before the second product.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)
BLOCK_SIZE, MAX_BLOCKS, NUM_BLOCKS = 4, 12, 64


def make_batch(q_lens, context_lens, seed=0):
    """Lay out a batch with tables of distinct random blocks, decodes first."""
    random = np.random.default_rng(seed)
    used = [-(-length // BLOCK_SIZE) for length in context_lens]
    free = random.permutation(NUM_BLOCKS).astype(np.int32)
    tables = np.full((len(q_lens), MAX_BLOCKS), -1, np.int32)
    for row, count in enumerate(used):
        tables[row, :count], free = free[:count], free[count:]
    positions = np.concatenate(
        [np.arange(c - q, c) for q, c in zip(q_lens, context_lens, strict=True)]
    )
    rows = np.repeat(np.arange(len(q_lens)), q_lens)
    slots = tables[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return FlatBatch(
        tokens=np.zeros(len(positions), np.int32),
        positions=positions.astype(np.int32),
        slots=slots.astype(np.int32),
        cu_q_lens=np.cumsum([0, *q_lens]).astype(np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables=tables,
        due=[],
        due_rows=np.array([], np.int32),
    )


def make_step(batch, dtype, head_dim, heads_per_kv, window=None):
    angles = torch.outer(torch.arange(64.0), 10_000.0 ** (-torch.arange(head_dim // 2) / 8))
    cos, sin = cpu_ops.rope_tables(angles.cos(), angles.sin())
    windows = frozenset([window])
    step = cpu_ops.CpuStep.build(batch, cos, sin, windows, BLOCK_SIZE, heads_per_kv, dtype)
    return step, angles.cos(), angles.sin()


def make_caches(num_kv_heads, head_dim, dtype):
    shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


BATCHES = {
    "one token": ([1], [1]),
    "one decode": ([1], [17]),
    "a full block": ([1], [16]),
    "decodes of all lengths": ([1] * 7, [1, 4, 5, 16, 17, 33, 48]),
    "a whole prompt": ([13], [13]),
    "a chunk in the middle": ([5], [30]),
    "mixed": ([1, 1, 1, 6, 9], [3, 40, 8, 6, 30]),
}


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("window", [None, 1, 6, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(6, 2), (4, 4)])
def test_attention_equals_the_reference(batch_name, window, dtype, num_q_heads, num_kv_heads):
    torch.manual_seed(3)
    batch = make_batch(*BATCHES[batch_name])
    head_dim = 16
    step, _, _ = make_step(batch, dtype, head_dim, num_q_heads // num_kv_heads, window)
    k_cache, v_cache = make_caches(num_kv_heads, head_dim, dtype)
    q = torch.randn(len(batch.positions), num_q_heads, head_dim).to(dtype)
    found = cpu_ops.paged_attention(q, step, k_cache, v_cache, 0.3, window)
    expected = paged_prefill_reference(
        q,
        k_cache,
        v_cache,
        torch.from_numpy(batch.block_tables),
        torch.from_numpy(batch.cu_q_lens),
        torch.from_numpy(batch.context_lens),
        0.3,
        window,
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.view(q.shape), expected, atol=tolerance, rtol=tolerance)
    if len(q) == len(batch.context_lens):
        tables, lens = torch.from_numpy(batch.block_tables), torch.from_numpy(batch.context_lens)
        decoded = paged_decode_reference(q, k_cache, v_cache, tables, lens, 0.3, window)
        torch.testing.assert_close(found.view(q.shape), decoded, atol=tolerance, rtol=tolerance)


def test_attention_reads_no_block_but_those_of_the_table():
    batch = make_batch(*BATCHES["mixed"])
    step, _, _ = make_step(batch, torch.float32, 16, 1)
    k_cache, v_cache = make_caches(2, 16, torch.float32)
    q = torch.randn(len(batch.positions), 2, 16)
    expected = cpu_ops.paged_attention(q, step, k_cache, v_cache, 0.3, None)
    others = np.setdiff1d(np.arange(1, NUM_BLOCKS), batch.block_tables)
    k_cache[others], v_cache[others] = torch.nan, torch.nan
    found = cpu_ops.paged_attention(q, step, k_cache, v_cache, 0.3, None)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("batch_name", ["one decode", "mixed"])
def test_rope_and_write_equal_the_reference_and_touch_nothing_else(dtype, has_norm, batch_name):
    torch.manual_seed(4)
    batch = make_batch(*BATCHES[batch_name])
    step, cos, sin = make_step(batch, dtype, 16, 3)
    qkv = torch.randn(len(batch.positions), (6 + 2 + 2) * 16).to(dtype)
    norms = (torch.randn(16).to(dtype), torch.randn(16).to(dtype)) if has_norm else None
    k_cache, v_cache = make_caches(2, 16, dtype)
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    expected = qkv_rope_write_reference(
        qkv,
        cos,
        sin,
        torch.from_numpy(batch.positions),
        torch.from_numpy(batch.slots),
        k_expected,
        v_expected,
        6,
        *(norms or (None, None)),
        eps=1e-5,
    )
    found = cpu_ops.qkv_rope_write(qkv, step, k_cache, v_cache, 6, norms, 1e-5)
    for ours, theirs in ((found, expected), (k_cache, k_expected)):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(v_cache, v_expected, atol=0, rtol=0)
    untouched = np.setdiff1d(np.arange(NUM_BLOCKS * BLOCK_SIZE), batch.slots)
    torch.testing.assert_close(
        k_cache.view(-1, 2, 16)[untouched], k_expected.view(-1, 2, 16)[untouched], atol=0, rtol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_norms_and_gate_equal_the_references(dtype, num_rows):
    torch.manual_seed(5)
    x, residual = torch.randn(2, num_rows, 24).to(dtype)
    weight = torch.randn(24).to(dtype)
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    normed, total = cpu_ops.residual_rms_norm(x, residual.float(), weight, 1e-5)
    expected = residual_rms_norm_reference(x.float(), residual.float(), weight.float(), 1e-5)
    assert (normed.dtype, total.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(normed.float(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(total, expected[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        cpu_ops.rms_norm(x, weight, 1e-5),
        rms_norm_reference(x, weight, 1e-5),
        atol=tolerance,
        rtol=tolerance,
    )
    torch.testing.assert_close(
        cpu_ops.silu_mul(x), silu_mul_reference(x), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 5, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_weights_multiply_as_plain_ones(dtype, num_rows, has_bias):
    torch.manual_seed(6)
    x, weight = torch.randn(num_rows, 40).to(dtype), torch.randn(23, 40).to(dtype)
    bias = torch.randn(23).to(dtype) if has_bias else None
    packed = cpu_ops._pack(weight) if cpu_ops._can_pack(dtype) else weight
    found = cpu_ops.linear(x, packed, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None)
    expected = (expected + bias.double() if has_bias else expected).to(dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
