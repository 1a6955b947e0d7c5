"""RMSNorm, alone and joined with the residual addition before it.

    y = cast(x / sqrt(mean(x^2) + eps)) * weight          [num_tokens, hidden]
    residual += x;  y = rms_norm(residual)                 the residual stream is fp32, in place

Numerics: the mean and the division are in fp32, the quotient is cast to the weight's dtype and only
then multiplied by the weight, as transformers' LlamaRMSNorm does. The residual stream is kept in
fp32, so a layer's output is rounded once, when it is made, and not again when it is added.
A row is held whole in registers: one read of each input, one write of each output. The fp8 sibling
writes what `quantise_rows` makes of y (fp8.py, invariant 3).
On one H200: 8192 rows of 4096 in 101.5 us, 92 % of 4.3 TB/s; one row 2.1 us (residual_rms_norm).
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.fp8 import fp8_outputs, quantise_row
from headrace.kernels.triton_seam import tl, triton


def rms_norm_reference(
    x: torch.Tensor,  # [num_tokens, hidden]; any leading shape works
    weight: torch.Tensor,  # [hidden], whose dtype the result has
    eps: float,
) -> torch.Tensor:
    """Norm each row of x to unit root mean square and scale it by weight."""
    x_fp32 = x.float()
    inverse_rms = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x_fp32 * inverse_rms).to(weight.dtype)


def residual_rms_norm_reference(
    x: torch.Tensor,  # [num_tokens, hidden], what the layer before made
    residual: torch.Tensor,  # [num_tokens, hidden] fp32, the stream it is added to
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual stream and norm the sum; return (normed, new residual), both new."""
    new_residual = residual + x
    return rms_norm_reference(new_residual, weight, eps), new_residual


@triton.jit
def norm_row(row, weight, hidden, eps, dtype: tl.constexpr) -> tl.tensor:
    """Norm one row held in fp32; rounded to dtype before and after the weight; for kernels."""
    inverse_rms = tl.rsqrt(tl.sum(row * row, axis=0) / hidden + eps)
    return ((row * inverse_rms).to(dtype).to(tl.float32) * weight).to(dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # in: [num_tokens, hidden]
    weight_ptr,  # in: [hidden]
    out_ptr,  # out: [num_tokens, hidden]
    hidden,
    eps,
    BLOCK: tl.constexpr,  # hidden, up to the next power of two
) -> None:
    offsets = tl.arange(0, BLOCK)
    is_inside = offsets < hidden
    base = tl.program_id(0).to(tl.int64) * hidden
    row = tl.load(x_ptr + base + offsets, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
    normed = norm_row(row, weight, hidden, eps, out_ptr.dtype.element_ty)
    tl.store(out_ptr + base + offsets, normed, mask=is_inside)


@triton.jit
def _add_row(x_ptr, residual_ptr, base, offsets, is_inside) -> tl.tensor:
    """Add one row of x to the residual stream in memory and return the sum."""
    x = tl.load(x_ptr + base + offsets, mask=is_inside, other=0.0).to(tl.float32)
    row = tl.load(residual_ptr + base + offsets, mask=is_inside, other=0.0) + x
    tl.store(residual_ptr + base + offsets, row, mask=is_inside)
    return row


@triton.jit
def _residual_rms_norm_kernel(
    x_ptr,  # in: [num_tokens, hidden]
    residual_ptr,  # in and out: [num_tokens, hidden] fp32
    weight_ptr,  # in: [hidden]
    out_ptr,  # out: [num_tokens, hidden]
    num_tokens,
    hidden,
    eps,
    BLOCK: tl.constexpr,  # hidden, up to the next power of two
) -> None:
    offsets = tl.arange(0, BLOCK)
    is_inside = offsets < hidden
    # Programs take rows in turn, so a grid smaller than the rows reads the weight less often.
    weight = tl.load(weight_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
    for token in range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0)):
        base = token * hidden
        row = _add_row(x_ptr, residual_ptr, base, offsets, is_inside)
        normed = norm_row(row, weight, hidden, eps, out_ptr.dtype.element_ty)
        tl.store(out_ptr + base + offsets, normed, mask=is_inside)


@triton.jit
def _residual_rms_norm_fp8_kernel(
    x_ptr,  # in: [num_tokens, hidden]
    residual_ptr,  # in and out: [num_tokens, hidden] fp32
    weight_ptr,  # in: [hidden]
    out_ptr,  # out: [num_tokens, hidden] e4m3
    scale_ptr,  # out: [num_tokens] fp32
    num_tokens,
    hidden,
    eps,
    BLOCK: tl.constexpr,  # hidden, up to the next power of two
) -> None:
    offsets = tl.arange(0, BLOCK)
    is_inside = offsets < hidden
    weight = tl.load(weight_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
    for token in range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0)):
        base = token * hidden
        row = _add_row(x_ptr, residual_ptr, base, offsets, is_inside)
        normed = norm_row(row, weight, hidden, eps, x_ptr.dtype.element_ty)
        codes, scale = quantise_row(normed.to(tl.float32))
        tl.store(out_ptr + base + offsets, codes, mask=is_inside)
        tl.store(scale_ptr + token, scale)


@triton.jit
def _chosen_rms_norm_kernel(
    x_ptr,  # in: [num_tokens, hidden]
    residual_ptr,  # in: [num_tokens, hidden] fp32
    weight_ptr,  # in: [hidden]
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    out_ptr,  # out: [num_rows, hidden]
    hidden,
    eps,
    BLOCK: tl.constexpr,  # hidden, up to the next power of two
) -> None:
    index = tl.program_id(0).to(tl.int64)
    token = tl.load(rows_ptr + index).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    is_inside = offsets < hidden
    is_read = is_inside & (token >= 0)
    source = token * hidden + offsets
    x = tl.load(x_ptr + source, mask=is_read, other=0.0).to(tl.float32)
    row = tl.load(residual_ptr + source, mask=is_read, other=0.0) + x
    weight = tl.load(weight_ptr + offsets, mask=is_read, other=0.0).to(tl.float32)
    normed = norm_row(row, weight, hidden, eps, out_ptr.dtype.element_ty)
    tl.store(out_ptr + index * hidden + offsets, normed, mask=is_inside)


def row_launch(hidden: int, num_warps: int | None = None) -> dict[str, int]:
    """Size a program for one row: about eight values a thread."""
    block = triton.next_power_of_2(max(hidden, 1))
    return {"BLOCK": block, "num_warps": num_warps or min(16, max(1, block // 256))}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm each row of x and scale it by weight.

    Args:
        x: [num_tokens, hidden], contiguous; the residual stream in fp32 will do with any weight.
        weight: [hidden], dtype of x, or of the result where x is fp32.
        eps: added to the mean square.
        out: like x, of weight's dtype; may be x itself where that is the same. Allocated when None.
    """
    check_leading("x", x, 2)
    check_leading("weight", weight, 1)
    dtype = weight.dtype if x.dtype is torch.float32 else x.dtype
    check_tensor("weight", weight, (x.shape[1],), dtype, x.device)
    if out is None:
        out = torch.empty_like(x, dtype=dtype)
    check_tensor("out", out, tuple(x.shape), dtype, x.device)
    if x.numel() > 0:
        _rms_norm_kernel[(x.shape[0],)](x, weight, out, x.shape[1], eps, **row_launch(x.shape[1]))
    return out


def _check_inputs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    check_leading("x", x, 2)
    check_tensor("residual", residual, tuple(x.shape), torch.float32, x.device)
    check_tensor("weight", weight, (x.shape[1],), x.dtype, x.device)


def residual_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    max_programs: int | None = None,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual in place and norm the sum; return (normed, residual).

    Args:
        x: [num_tokens, hidden], contiguous.
        residual: [num_tokens, hidden] fp32, updated in place; left as it is when rows are given.
        weight: [hidden], dtype of x.
        eps: added to the mean square.
        out: like x, [num_rows, hidden] when rows are given; may be x itself without rows.
            Allocated when None.
        rows: [num_rows] int32, the only rows that are normed, in this order; -1 = a row of zeros.
        max_programs: grid limit, to measure; a program takes several rows then.
        num_warps: of a program, to measure others than the default.
    """
    _check_inputs(x, residual, weight)
    num_tokens, hidden = x.shape
    num_rows = num_tokens
    if rows is not None:
        num_rows = rows.shape[0]
        check_tensor("rows", rows, (num_rows,), torch.int32, x.device)
    if out is None:
        out = x.new_empty((num_rows, hidden))
    check_tensor("out", out, (num_rows, hidden), x.dtype, x.device)
    if out.numel() == 0:
        return out, residual
    tile = row_launch(hidden, num_warps)
    if rows is not None:
        _chosen_rms_norm_kernel[(num_rows,)](x, residual, weight, rows, out, hidden, eps, **tile)
        return out, residual
    grid = (min(num_tokens, max_programs or num_tokens),)
    _residual_rms_norm_kernel[grid](x, residual, weight, out, num_tokens, hidden, eps, **tile)
    return out, residual


def residual_rms_norm_fp8(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    max_programs: int | None = None,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do as residual_rms_norm and quantise each normed row; return (normed, scale, residual).

    Args:
        x: [num_tokens, hidden], contiguous.
        residual: [num_tokens, hidden] fp32, updated in place.
        weight: [hidden], dtype of x.
        eps: added to the mean square.
        out: [num_tokens, hidden] e4m3. Allocated when None.
        scale: [num_tokens, 1] fp32. Allocated when None.
        max_programs: grid limit, to measure; a program takes several rows then.
        num_warps: of a program, to measure others than the default.
    """
    _check_inputs(x, residual, weight)
    num_tokens, hidden = x.shape
    out, scale = fp8_outputs("out", (num_tokens, hidden), out, scale, x.device)
    if x.numel() > 0:
        grid = (min(num_tokens, max_programs or num_tokens),)
        _residual_rms_norm_fp8_kernel[grid](
            x, residual, weight, out, scale, num_tokens, hidden, eps,
            **row_launch(hidden, num_warps),
        )  # fmt: skip
    return out, scale, residual


#: Two roundings to the dtype (the quotient, the product), each up to one unit in the last place of
#: values below 8; Triton's interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
