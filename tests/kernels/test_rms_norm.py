import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headrace.kernels.fp8 import FP8, quantise_rows
from headrace.kernels.rms_norm import (
    TOLERANCE,
    residual_rms_norm,
    residual_rms_norm_fp8,
    residual_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One row, an odd width, a power of two, more rows than one; 576 is SmolLM2's.
SHAPES = [(1, 1), (1, 576), (3, 100), (7, 256), (2, 1023)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_its_reference(shape, dtype, device, assert_close):
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[1], device=device).to(dtype)
    out = torch.full_like(x, float("nan"))
    assert rms_norm(x, weight, 1e-5, out=out) is out
    assert_close(out, rms_norm_reference(x, weight, 1e-5), TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_stream_is_normed_into_the_weights_dtype(dtype, device, assert_close):
    x, weight = torch.randn(3, 100, device=device), torch.randn(100, device=device).to(dtype)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), TOLERANCE)


def make_stream(shape, dtype, device):
    """Return (x, residual in fp32, weight)."""
    x, residual = torch.randn(2, *shape, device=device)
    return x.to(dtype), residual, torch.randn(shape[1], device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_rms_norm_equals_its_reference_and_adds_in_place(
    shape, dtype, device, assert_close
):
    x, residual, weight = make_stream(shape, dtype, device)
    before = x.clone()
    expected, expected_residual = residual_rms_norm_reference(x, residual, weight, 1e-5)
    out = torch.full_like(x, float("nan"))
    normed, new_residual = residual_rms_norm(x, residual, weight, 1e-5, out=out)
    assert normed is out
    assert new_residual is residual
    # One fp32 addition: the same bits everywhere.
    assert torch.equal(residual, expected_residual)
    assert_close(normed, expected, TOLERANCE)
    assert torch.equal(x, before)


def test_a_program_that_takes_several_rows_does_them_all(device):
    x, residual, weight = make_stream((7, 100), torch.float32, device)
    expected, expected_residual = residual_rms_norm(x, residual.clone(), weight, 1e-5)
    out = torch.full_like(x, float("nan"))
    residual_rms_norm(x, residual, weight, 1e-5, out=out, max_programs=3)
    assert torch.equal(out, expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [100, 576])
def test_chosen_rows_are_normed_in_order_and_padding_is_zero(hidden, dtype, device, assert_close):
    x, residual, weight = make_stream((5, hidden), dtype, device)
    before = residual.clone()
    rows = torch.tensor([4, -1, 0, 4, -1], dtype=torch.int32, device=device)
    out = torch.full((5, hidden), float("nan"), dtype=dtype, device=device)
    normed, same_residual = residual_rms_norm(x, residual, weight, 1e-5, out=out, rows=rows)
    assert normed is out
    expected, _ = residual_rms_norm_reference(x, residual, weight, 1e-5)
    assert_close(out[[0, 2, 3]], expected[[4, 0, 4]], TOLERANCE)
    assert torch.equal(out[[1, 4]], torch.zeros_like(out[:2]))
    assert torch.equal(same_residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (3, 100), (5, 1024)])
def test_the_fp8_sibling_writes_what_quantised_rows_are(shape, dtype, device, assert_same_fp8):
    x, residual, weight = make_stream(shape, dtype, device)
    normed, expected_residual = residual_rms_norm(x, residual.clone(), weight, 1e-5)
    expected, expected_scale = quantise_rows(normed)
    out = torch.full(shape, float("nan"), device=device).to(FP8)
    scale = torch.full((shape[0], 1), float("nan"), device=device)
    residual_rms_norm_fp8(x, residual, weight, 1e-5, out, scale, max_programs=2)
    assert_same_fp8((out, scale), (expected, expected_scale))
    assert torch.equal(residual, expected_residual)


def test_a_nan_in_a_row_stays_in_that_row(device):
    x, residual, weight = make_stream((3, 64), torch.float32, device)
    residual[1, 5] = float("nan")
    codes, scale, _ = residual_rms_norm_fp8(x, residual.clone(), weight, 1e-5)
    normed, _ = residual_rms_norm(x, residual, weight, 1e-5)
    for found in (normed, codes.float(), scale):
        assert found.isnan().all(dim=1).tolist() == [False, True, False]
        assert not found[[0, 2]].isnan().any()


def test_rms_norm_may_write_over_its_input(device, assert_close):
    x, weight = torch.randn(4, 96, device=device), torch.randn(96, device=device)
    expected = rms_norm_reference(x, weight, 1e-5)
    rms_norm(x, weight, 1e-5, out=x)
    assert_close(x, expected, TOLERANCE)


def test_a_row_of_zeros_stays_zero(device):
    x, weight = torch.zeros(2, 64, device=device), torch.ones(64, device=device)
    assert torch.equal(rms_norm(x, weight, 1e-6), x)


def test_no_rows_are_no_launch(device):
    x, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    assert rms_norm(x, weight, 1e-6).shape == (0, 64)
    assert residual_rms_norm(x, x, weight, 1e-6)[1].shape == (0, 64)
    assert residual_rms_norm_fp8(x, x, weight, 1e-6)[0].shape == (0, 64)
    no_rows = torch.empty(0, dtype=torch.int32, device=device)
    some = torch.randn(3, 64, device=device)
    assert residual_rms_norm(some, some, weight, 1e-6, rows=no_rows)[0].shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_what_transformers_computes(dtype):
    norm = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(5, 48).to(dtype)
    assert torch.equal(rms_norm_reference(x, norm.weight.data, 1e-5), norm(x))


def test_bad_arguments_are_told_apart(device):
    x, weight = torch.randn(4, 64, device=device), torch.randn(64, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \[64\]; found \[32\]: "):
        rms_norm(x, weight[:32], 1e-5)
    with pytest.raises(ValueError, match=r"weight must be torch.float16; found torch.float32: "):
        rms_norm(x.half(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"weight must be one of .*; found torch.float64: "):
        rms_norm(x, weight.double(), 1e-5)
    with pytest.raises(ValueError, match=r"x must be contiguous; found strides \[1, 4\]"):
        rms_norm(torch.randn(64, 4, device=device).t(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"x must be one of .*; found torch.float64: "):
        rms_norm(x.double(), weight.double(), 1e-5)
    with pytest.raises(ValueError, match=r"x must have 2 dimensions; found shape \[64\]: "):
        rms_norm(x[0], weight, 1e-5)
    with pytest.raises(ValueError, match=r"residual must have shape \[4, 64\]; found \[3, 64\]: "):
        residual_rms_norm(x, x[:3], weight, 1e-5)
    with pytest.raises(ValueError, match=r"residual must be torch.float32; found torch.bfloat16"):
        residual_rms_norm(x, x.bfloat16(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"rows must be torch.int32; found torch.int64: "):
        residual_rms_norm(x, x, weight, 1e-5, rows=torch.arange(2, device=device))
    rows = torch.arange(2, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"out must have shape \[2, 64\]; found \[4, 64\]: "):
        residual_rms_norm(x, x, weight, 1e-5, torch.empty_like(x), rows=rows)
    with pytest.raises(ValueError, match=r"scale must have shape \[4, 1\]; found \[4\]: "):
        residual_rms_norm_fp8(x, x, weight, 1e-5, scale=torch.empty(4, device=device))
    with pytest.raises(ValueError, match=r"out must be contiguous"):
        rms_norm(x, weight, 1e-5, out=torch.empty(64, 4, device=device).t())
