import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headrace.kernels.rms_norm import (
    TOLERANCE,
    residual_rms_norm,
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
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_rms_norm_equals_its_reference(shape, dtype, device, assert_close):
    x = torch.randn(shape, device=device).to(dtype)
    residual = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[1], device=device).to(dtype)
    before = x.clone(), residual.clone()
    normed, new_residual = residual_rms_norm(x, residual, weight, 1e-5)
    expected, expected_residual = residual_rms_norm_reference(x, residual, weight, 1e-5)
    assert_close(new_residual, expected_residual, TOLERANCE)
    assert_close(normed, expected, TOLERANCE)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


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
    with pytest.raises(ValueError, match=r"weight must be torch.float32; found torch.float16: "):
        rms_norm(x, weight.half(), 1e-5)
    with pytest.raises(ValueError, match=r"x must be contiguous; found strides \[1, 4\]"):
        rms_norm(torch.randn(64, 4, device=device).t(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"x must be one of .*; found torch.float64: "):
        rms_norm(x.double(), weight.double(), 1e-5)
    with pytest.raises(ValueError, match=r"x must have 2 dimensions; found shape \[64\]: "):
        rms_norm(x[0], weight, 1e-5)
    with pytest.raises(ValueError, match=r"residual must have shape \[4, 64\]; found \[3, 64\]: "):
        residual_rms_norm(x, x[:3], weight, 1e-5)
    with pytest.raises(ValueError, match=r"out must be contiguous"):
        rms_norm(x, weight, 1e-5, out=torch.empty(64, 4, device=device).t())
