import pytest
import torch

from headrace.kernels.fp8 import (
    FP8,
    TOLERANCE,
    fp8_linear,
    fp8_linear_reference,
    quantise_rows,
    quantise_rows_reference,
    quantise_weight,
    saturate_reference,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def codes(x):
    return x.view(torch.uint8).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 576), (3, 100), (7, 256), (2, 1023)])
def test_quantised_rows_equal_their_reference(shape, dtype, device):
    x = (torch.randn(shape, device=device) * torch.rand(shape[0], 1, device=device) * 50).to(dtype)
    out = torch.full(shape, float("nan"), device=device).to(FP8)
    scale = torch.full((shape[0], 1), float("nan"), device=device)
    found = quantise_rows(x, out, scale)
    assert found[0] is out
    assert found[1] is scale
    expected, expected_scale = quantise_rows_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes(out), codes(expected))
    # The largest magnitude of each row is the largest number there is.
    assert (out.float().abs().amax(dim=1) == 448).all()


def test_every_code_and_every_tie_is_rounded_as_torch_does(device):
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    nudged = torch.cat((ties * (1 + 2**-20), ties * (1 - 2**-20)))
    # A row whose largest magnitude is 448 has scale 1, so the values arrive as they are.
    row = torch.cat((numbers, ties, nudged))
    x = torch.cat((row, -row))[None].to(device)
    out, scale = quantise_rows(x)
    assert scale.item() == 1.0
    assert torch.equal(codes(out), codes(x.to(FP8)))


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite(device):
    x = torch.zeros(3, 64, device=device)
    x[1] = 1e-38
    x[2, 3] = 1e-13
    out, scale = quantise_rows(x)
    expected, expected_scale = quantise_rows_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes(out), codes(expected))
    assert (out.float() * scale).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("function", [quantise_rows, quantise_rows_reference])
def test_invariant_2_what_is_no_number_makes_its_row_nan(function, bad, device):
    x = torch.randn(3, 100, device=device)
    x[1, 70] = bad
    out, scale = function(x)
    assert out.float().isnan().all(dim=1).tolist() == [False, True, False]
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert not out.float()[[0, 2]].isnan().any()


def test_invariant_1_the_reference_saturates():
    x = torch.tensor([447.0, 449.0, 1e30, -1e30, float("nan"), float("inf")])
    nan = float("nan")
    expected = torch.tensor([448.0, 448.0, 448.0, -448.0, nan, nan])
    torch.testing.assert_close(saturate_reference(x).float(), expected, equal_nan=True)


def test_a_weight_is_quantised_by_outputs_in_parts(device, monkeypatch):
    monkeypatch.setattr("headrace.kernels.fp8._WEIGHT_ROWS", 5)
    weight = torch.randn(12, 48, device=device, dtype=torch.bfloat16)
    out, scale = quantise_weight(weight)
    expected, expected_scale = quantise_rows_reference(weight)
    assert torch.equal(codes(out), codes(expected))
    assert torch.equal(scale, expected_scale)


def error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def make_activations(kind, num_tokens, width, device):
    x = torch.randn(num_tokens, width, device=device)
    if kind == "outliers":  # a few channels a hundred times the rest, as decoders have them
        x[:, torch.randperm(width)[: width // 64]] *= 100
    if kind == "heavy tails":
        x = x / torch.rand(num_tokens, width, device=device).clamp(min=1e-3)
    return x.bfloat16()


@pytest.mark.parametrize("kind", ["normal", "outliers", "heavy tails"])
def test_the_error_against_bf16_is_that_of_the_rounding(kind, device):
    # A mantissa of 3 bits is off by 2.6% rms (uniform within half a step, over a binade); two
    # factors, independent, make 3.7% of the product. What lies 2^-15 below a row's largest is lost,
    # which none of these inputs feels. A tenth more is left for chance.
    x = make_activations(kind, 32, 512, device)
    w = (torch.randn(128, 512, device=device) * 0.02).bfloat16()
    quantised = *quantise_rows(x), *quantise_weight(w)
    expected = x.float() @ w.float().t()
    found = error(fp8_linear_reference(*quantised), expected)
    print(f"W8A8 error on {kind} inputs: {found:.4f}")
    assert 0.02 < found < 0.042
    assert error(expected.bfloat16(), expected) < 0.003


@pytest.mark.parametrize("num_tokens", [1, 5, 32])
def test_fp8_linear_multiplies_what_its_reference_does(num_tokens, device):
    x = make_activations("outliers", num_tokens, 96, device)
    w = torch.randn(48, 96, device=device).bfloat16()
    quantised = *quantise_rows(x), *quantise_weight(w)
    out = torch.full((num_tokens, 48), float("nan"), dtype=torch.bfloat16, device=device)
    assert fp8_linear(*quantised, out=out).data_ptr() == out.data_ptr()
    # Rounding to bf16, and the tensor cores' 14 bits of partial sums.
    assert error(out, fp8_linear_reference(*quantised, torch.float32)) < TOLERANCE[out.dtype]
    exact = fp8_linear(*quantised, use_fast_accum=False)
    assert error(exact, fp8_linear_reference(*quantised, torch.float32)) < 3e-3


def test_no_rows_are_no_launch(device):
    x, x_scale = quantise_rows(torch.empty(0, 32, device=device))
    w, w_scale = quantise_weight(torch.randn(16, 32, device=device))
    assert fp8_linear(x, x_scale, w, w_scale).shape == (0, 16)


def test_bad_arguments_are_told_apart(device):
    x, x_scale = quantise_rows(torch.randn(4, 32, device=device))
    w, w_scale = quantise_weight(torch.randn(16, 32, device=device))
    for args, text in (
        ((x.float(), x_scale, w, w_scale), r"x_fp8 must be torch.float8_e4m3fn; found torch.fl"),
        ((x, x_scale[:, 0], w, w_scale), r"x_scale must have shape \[4, 1\]; found \[4\]: "),
        ((x, x_scale, w[:, :16], w_scale), r"x_fp8 must have shape \[4, 16\]; found \[4, 32\]: "),
        ((x, x_scale, w[:8], w_scale[:8]), r"to be multiples of 16; found 32 and 8: "),
        ((x, x_scale, w, w_scale.t()), r"w_scale must have shape \[16, 1\]; found \[1, 16\]: "),
        ((x, x_scale, w, w_scale, torch.float16), r"out_dtype must be .*; found torch.float16: "),
    ):
        with pytest.raises(ValueError, match=text):
            fp8_linear(*args)
    with pytest.raises(ValueError, match=r"weight must be .*; found \[4, 32\] in torch.float8"):
        quantise_weight(x)
    with pytest.raises(ValueError, match=r"x must be one of .*; found torch.float64: "):
        quantise_rows(torch.randn(2, 32, device=device).double())
