"""RMSNorm, alone and joined with the residual addition before it.

    y = cast(x / sqrt(mean(x^2) + eps)) * weight          [num_tokens, hidden]
    residual' = x + residual;  y = rms_norm(residual')

Numerics: the mean and the division are in fp32, the quotient is cast to x.dtype and only then
multiplied by the weight, as transformers' LlamaRMSNorm does. The sum with the residual is rounded
to x.dtype before it is normed, because that rounded sum is what the next layer adds to.
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.triton_seam import tl, triton


def rms_norm_reference(
    x: torch.Tensor,  # [num_tokens, hidden]; any leading shape works
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> torch.Tensor:
    """Norm each row of x to unit root mean square and scale it by weight."""
    x_fp32 = x.float()
    inverse_rms = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (x_fp32 * inverse_rms).to(x.dtype)


def residual_rms_norm_reference(
    x: torch.Tensor,  # [num_tokens, hidden], what the layer before made
    residual: torch.Tensor,  # [num_tokens, hidden], the stream it is added to
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual stream and norm the sum; return (normed, new residual)."""
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps), new_residual


@triton.jit
def _norm_row(row, weight, hidden, eps, dtype: tl.constexpr) -> tl.tensor:
    """Norm one row held in fp32; rounded to dtype before the weight, as the reference."""
    inverse_rms = tl.rsqrt(tl.sum(row * row, axis=0) / hidden + eps)
    return (row * inverse_rms).to(dtype).to(tl.float32) * weight


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
    dtype = out_ptr.dtype.element_ty
    normed = _norm_row(row, weight, hidden, eps, dtype)
    tl.store(out_ptr + base + offsets, normed.to(dtype), mask=is_inside)


@triton.jit
def _residual_rms_norm_kernel(
    x_ptr,  # in: [num_tokens, hidden]
    residual_ptr,  # in: [num_tokens, hidden]
    weight_ptr,  # in: [hidden]
    out_ptr,  # out: [num_tokens, hidden]
    new_residual_ptr,  # out: [num_tokens, hidden]
    hidden,
    eps,
    BLOCK: tl.constexpr,  # hidden, up to the next power of two
) -> None:
    offsets = tl.arange(0, BLOCK)
    is_inside = offsets < hidden
    base = tl.program_id(0).to(tl.int64) * hidden
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + base + offsets, mask=is_inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + base + offsets, mask=is_inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
    new_residual = (x + residual).to(dtype)
    tl.store(new_residual_ptr + base + offsets, new_residual, mask=is_inside)
    normed = _norm_row(new_residual.to(tl.float32), weight, hidden, eps, dtype)
    tl.store(out_ptr + base + offsets, normed.to(dtype), mask=is_inside)


def _row_launch(hidden: int) -> dict[str, int]:
    """Size a program for one row: about eight values a thread."""
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm each row of x and scale it by weight.

    Args:
        x: [num_tokens, hidden], contiguous.
        weight: [hidden], dtype of x.
        eps: added to the mean square.
        out: like x; may be x itself. Allocated when None.
    """
    check_leading("x", x, 2)
    check_tensor("weight", weight, (x.shape[1],), x.dtype, x.device)
    if out is None:
        out = torch.empty_like(x)
    check_tensor("out", out, tuple(x.shape), x.dtype, x.device)
    if x.shape[0] > 0:
        _rms_norm_kernel[(x.shape[0],)](x, weight, out, x.shape[1], eps, **_row_launch(x.shape[1]))
    return out


def residual_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual and norm the sum; return (normed, new residual), both new.

    Args:
        x: [num_tokens, hidden], contiguous.
        residual: like x.
        weight: [hidden], dtype of x.
        eps: added to the mean square.
    """
    check_leading("x", x, 2)
    check_tensor("residual", residual, tuple(x.shape), x.dtype, x.device)
    check_tensor("weight", weight, (x.shape[1],), x.dtype, x.device)
    out, new_residual = torch.empty_like(x), torch.empty_like(x)
    if x.shape[0] > 0:
        _residual_rms_norm_kernel[(x.shape[0],)](
            x, residual, weight, out, new_residual, x.shape[1], eps, **_row_launch(x.shape[1])
        )
    return out, new_residual


#: Two roundings to the dtype (the quotient, the product), each up to one unit in the last place of
#: values below 8; Triton's interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
