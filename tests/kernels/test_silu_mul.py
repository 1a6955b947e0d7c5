import pytest
import torch

from headrace.kernels.fp8 import FP8, quantise_rows
from headrace.kernels.silu_mul import TOLERANCE, silu_mul, silu_mul_fp8, silu_mul_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "inter"), [(1, 1), (1, 1536), (3, 100), (5, 1024)])
def test_silu_mul_equals_its_reference(num_tokens, inter, dtype, device, assert_close):
    gate_up = (torch.randn(num_tokens, 2 * inter, device=device) * 3).to(dtype)
    out = torch.full((num_tokens, inter), float("nan"), dtype=dtype, device=device)
    assert silu_mul(gate_up, out=out) is out
    assert_close(out, silu_mul_reference(gate_up), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "inter"), [(1, 1), (1, 1536), (3, 100)])
def test_the_fp8_sibling_writes_what_quantised_rows_are(
    num_tokens, inter, dtype, device, assert_same_fp8
):
    gate_up = (torch.randn(num_tokens, 2 * inter, device=device) * 3).to(dtype)
    expected, expected_scale = quantise_rows(silu_mul(gate_up))
    out = torch.full((num_tokens, inter), float("nan"), device=device).to(FP8)
    scale = torch.full((num_tokens, 1), float("nan"), device=device)
    silu_mul_fp8(gate_up, out, scale)
    assert_same_fp8((out, scale), (expected, expected_scale))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_seen_in_its_row(bad, device):
    gate_up = torch.randn(3, 64, device=device)
    gate_up[1, 40] = bad
    assert not silu_mul(gate_up)[1, 8].isfinite()
    codes, scale = silu_mul_fp8(gate_up)
    assert codes.float().isnan().all(dim=1).tolist() == [False, True, False]
    assert scale.isnan().flatten().tolist() == [False, True, False]


def test_gate_is_the_first_half(device, assert_close):
    gate, up = torch.randn(2, 8, device=device), torch.randn(2, 8, device=device)
    expected = gate * torch.sigmoid(gate) * up
    assert_close(silu_mul_reference(torch.cat((gate, up), 1)), expected, TOLERANCE)
    assert_close(silu_mul(torch.cat((gate, up), 1)), expected, TOLERANCE)


def test_large_gates_neither_overflow_nor_turn_to_nan(device):
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]], device=device)
    expected = torch.tensor([[0.0, 0.0, 100.0, 1e4]], device=device)
    torch.testing.assert_close(silu_mul(gate_up), expected)


def test_bad_arguments_are_told_apart(device):
    with pytest.raises(ValueError, match=r"gate_up must have an even width.*; found 5: "):
        silu_mul(torch.randn(2, 5, device=device))
    with pytest.raises(ValueError, match=r"out must have shape \[2, 3\]; found \[2, 6\]: "):
        silu_mul(torch.randn(2, 6, device=device), out=torch.empty(2, 6, device=device))
    with pytest.raises(ValueError, match=r"out must be torch.float8_e4m3fn; found torch.float32: "):
        silu_mul_fp8(torch.randn(2, 6, device=device), torch.empty(2, 3, device=device))
    assert silu_mul_fp8(torch.empty(0, 6, device=device))[0].shape == (0, 3)
    assert silu_mul(torch.empty(0, 6, device=device)).shape == (0, 3)
