"""fp8 (e4m3) numbers with a scale a row: made from rows, and multiplied (W8A8).

    scale[t] = max_i |x[t, i]| / 448,   x_fp8[t, i] = e4m3(x[t, i] * 448 / max_i |x[t, i]|)
    y = (x_fp8 @ w_fp8^T) * x_scale * w_scale^T                    [num_tokens, num_outputs]

e4m3 has 3 bits of mantissa, 448 as its largest number, a NaN and no infinity. Rows of activations
are measured as they come (dynamic), rows of a weight (its outputs) once, at load.

Invariants:
1. Rounding is to the nearest, ties to even; a finite value beyond +-448 becomes +-448.
2. NaN and infinity become NaN, never a number: an overflow upstream stays seen. A row that holds
   one is NaN throughout, its scale too.
3. What a kernel writes here equals `quantise_rows` of what its sibling without fp8 writes.

Numerics: scales in fp32 by correctly rounded division, so torch and the kernel agree in every bit
on a GPU. Triton's interpreter casts to e4m3 wrongly (NaN, carries and subnormals), so there the
bits are put together by hand. The product is cuBLASLt's through `torch._scaled_mm`: a GPU of
compute capability 8.9 on, fp32 accumulation, bf16 out. Its error is that of rounding: each factor's
is 2.6% of its size (rms), so ||W8A8 - bf16|| / ||bf16|| is 3.7% on normal inputs, 3.3% with some
channels a hundred times the rest, 3.0% with heavy tails (a row's largest number is exact).
On one H200: quantise_rows 92 % of 4.3 TB/s; fp8_linear 1.8 to 2.1 times as fast as cuBLAS in bf16
at 2048 rows, 0.8 to 1.8 times at 64.
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.triton_seam import is_interpreted, tl, triton

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
#: A row's largest magnitude counts as at least this, so that a row of zeros has a finite inverse.
MIN_AMAX = 1e-12
#: Rows of a weight quantised at once: bounds the fp32 copy to 64 MiB at 16,384 inputs.
_WEIGHT_ROWS = 1024

# Kernels see globals only when they are constexpr, which is for Triton's eyes, not pyright's.
_FP8_MAX = tl.constexpr(FP8_MAX)  # pyright: ignore[reportCallIssue]
_MIN_AMAX = tl.constexpr(MIN_AMAX)  # pyright: ignore[reportCallIssue]
_CASTS_BY_HAND = tl.constexpr(is_interpreted())  # pyright: ignore[reportCallIssue]


def saturate_reference(x: torch.Tensor) -> torch.Tensor:
    """Cast to e4m3 by invariants 1 and 2; any shape."""
    x = x.float()
    clamped = x.clamp(-FP8_MAX, FP8_MAX)
    return torch.where(x.isfinite(), clamped, float("nan")).to(FP8)


def quantise_rows_reference(
    x: torch.Tensor,  # [num_rows, width]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (x_fp8: [num_rows, width], scale: [num_rows, 1] fp32)."""
    x = x.float()
    amax = x.abs().amax(dim=1, keepdim=True).clamp(min=MIN_AMAX)
    amax = torch.where(amax.isfinite(), amax, float("nan"))
    # Tensor by tensor: torch multiplies by a reciprocal where either side is a Python number.
    largest = torch.full_like(amax, FP8_MAX)
    return saturate_reference(x * (largest / amax)), amax / largest


def fp8_linear_reference(
    x_fp8: torch.Tensor,  # [num_tokens, width]
    x_scale: torch.Tensor,  # [num_tokens, 1] fp32
    w_fp8: torch.Tensor,  # [num_outputs, width]
    w_scale: torch.Tensor,  # [num_outputs, 1] fp32
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return x w^T of the dequantised factors, multiplied in fp32: [num_tokens, num_outputs]."""
    return ((x_fp8.float() * x_scale) @ (w_fp8.float() * w_scale).t()).to(out_dtype)


@triton.jit
def _bits_of_e4m3(value) -> tl.tensor:
    """Round fp32 within +-448 (or NaN) to e4m3 by integer arithmetic."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # From 2^-6 on: round at the third bit of the mantissa, then move the exponent's bias by 120.
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    code = (rounded >> 20) - (120 << 3)
    # Below: a multiple of 2^-9; adding 2^23 rounds it to an integer in the lowest bits.
    subnormal = (tl.abs(value) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0x3C800000, subnormal, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _to_e4m3(value) -> tl.tensor:
    """Cast fp32 that rounds to a number within +-448, or is NaN."""
    if _CASTS_BY_HAND:
        code = _bits_of_e4m3(value)
    else:
        code = value.to(tl.float8e4nv)
    return code


@triton.jit
def saturate(value) -> tl.tensor:
    """Cast fp32 to e4m3 by invariants 1 and 2; for use inside kernels."""
    clamped = tl.minimum(tl.maximum(value, -_FP8_MAX), _FP8_MAX)
    return _to_e4m3(tl.where(tl.abs(value) < float("inf"), clamped, float("nan")))


@triton.jit
def quantise_row(
    row,  # [width] fp32, zero beyond the end
) -> tuple[tl.tensor, tl.tensor]:
    """Return (e4m3 values, scale) of one row held whole; for use inside kernels."""
    magnitude = tl.abs(row)
    # Not every maximum passes a NaN on, so NaN counts as infinity here.
    amax = tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), axis=0)
    amax = tl.where(amax < float("inf"), tl.maximum(amax, _MIN_AMAX), float("nan"))
    # Nothing to clamp: the largest magnitude becomes 448 but for a last place of fp32.
    return _to_e4m3(row * tl.div_rn(_FP8_MAX, amax)), tl.div_rn(amax, _FP8_MAX)


@triton.jit
def _quantise_rows_kernel(
    x_ptr,  # in: [num_rows, width]
    out_ptr,  # out: [num_rows, width] e4m3
    scale_ptr,  # out: [num_rows] fp32
    width,
    BLOCK: tl.constexpr,  # width, up to the next power of two
) -> None:
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    is_inside = offsets < width
    x = tl.load(x_ptr + row * width + offsets, mask=is_inside, other=0.0).to(tl.float32)
    codes, scale = quantise_row(x)
    tl.store(out_ptr + row * width + offsets, codes, mask=is_inside)
    tl.store(scale_ptr + row, scale)


def wide_row_launch(width: int, num_warps: int | None = None) -> dict[str, int]:
    """Size a program for one wide row: sixteen values a thread, up to 1024 threads."""
    block = triton.next_power_of_2(max(width, 1))
    return {"BLOCK": block, "num_warps": num_warps or min(32, max(1, block // 512))}


def fp8_outputs(
    name: str,
    shape: tuple[int, int],
    out: torch.Tensor | None,
    scale: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a launcher's fp8 outputs, or make what is None: (out, scale: [num_rows, 1])."""
    if out is None:
        out = torch.empty(shape, dtype=FP8, device=device)
    if scale is None:
        scale = torch.empty((shape[0], 1), dtype=torch.float32, device=device)
    check_tensor(name, out, shape, FP8, device)
    check_tensor("scale", scale, (shape[0], 1), torch.float32, device)
    return out, scale


def quantise_rows(
    x: torch.Tensor,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its own largest magnitude; return (x_fp8, scale).

    Args:
        x: [num_rows, width], contiguous.
        out: like x, e4m3. Allocated when None.
        scale: [num_rows, 1] fp32. Allocated when None.
        num_warps: of a program, to measure others than the default.
    """
    check_leading("x", x, 2)
    out, scale = fp8_outputs("out", (x.shape[0], x.shape[1]), out, scale, x.device)
    if x.numel() > 0:
        tile = wide_row_launch(x.shape[1], num_warps)
        _quantise_rows_kernel[(x.shape[0],)](x, out, scale, x.shape[1], **tile)
    return out, scale


def quantise_weight(
    weight: torch.Tensor,  # [num_outputs, width]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight once, at load, on any device: (w_fp8, scale: [num_outputs, 1] fp32)."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.dtype == FP8:
        raise ValueError(
            f"weight must be [num_outputs, width] in a wider float than fp8; found "
            f"{list(weight.shape)} in {weight.dtype}: pass the linear layer's own weight"
        )
    out, scale = fp8_outputs("out", (weight.shape[0], weight.shape[1]), None, None, weight.device)
    for start in range(0, weight.shape[0], _WEIGHT_ROWS):
        rows = slice(start, start + _WEIGHT_ROWS)
        out[rows], scale[rows] = quantise_rows_reference(weight[rows])
    return out, scale


def fp8_linear(
    x_fp8: torch.Tensor,
    x_scale: torch.Tensor,
    w_fp8: torch.Tensor,
    w_scale: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    *,
    use_fast_accum: bool = True,
) -> torch.Tensor:
    """Return x w^T of two quantised matrices: [num_tokens, num_outputs] in bf16.

    Args:
        x_fp8: [num_tokens, width] e4m3, contiguous; width a multiple of 16.
        x_scale: [num_tokens, 1] fp32.
        w_fp8: [num_outputs, width] e4m3, contiguous; num_outputs a multiple of 16.
        w_scale: [num_outputs, 1] fp32.
        out_dtype: bfloat16, the one that row scales come with.
        out: [num_tokens, num_outputs]. Allocated when None.
        use_fast_accum: leave partial sums in the tensor cores, which keep about 14 bits of them.
    """
    device = x_fp8.device
    check_tensor("x_fp8", x_fp8, (x_fp8.shape[0], w_fp8.shape[-1]), FP8, device)
    (num_tokens, width), num_outputs = x_fp8.shape, w_fp8.shape[0]
    check_tensor("w_fp8", w_fp8, (num_outputs, width), FP8, device)
    check_tensor("x_scale", x_scale, (num_tokens, 1), torch.float32, device)
    check_tensor("w_scale", w_scale, (num_outputs, 1), torch.float32, device)
    if width % 16 or num_outputs % 16:
        raise ValueError(
            "fp8 needs width and num_outputs to be multiples of 16; found "
            f"{width} and {num_outputs}: run this layer in bf16"
        )
    if out_dtype != torch.bfloat16:
        raise ValueError(
            f"out_dtype must be torch.bfloat16 with a scale a row; found {out_dtype}: "
            "run a model of another dtype without fp8"
        )
    if out is None:
        out = torch.empty((num_tokens, num_outputs), dtype=out_dtype, device=device)
    check_tensor("out", out, (num_tokens, num_outputs), out_dtype, device)
    if num_tokens == 0 or device.type == "meta":  # torch has no form of this product for shapes
        return out
    # The second factor must be column-major, which the transposed view of a weight is.
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        x_fp8,
        w_fp8.t(),
        scale_a=x_scale,
        scale_b=w_scale.t(),
        out_dtype=out_dtype,
        use_fast_accum=use_fast_accum,
        out=out,
    )


#: The product in bf16 against the reference's in fp32, as a share of its norm: one rounding, and
#: the tensor cores' shorter partial sums. Codes and scales are compared exactly.
TOLERANCE = {torch.bfloat16: 5e-3}
