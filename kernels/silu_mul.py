"""The gated activation of a Llama MLP: silu(gate) * up.

    out[t, i] = silu(gate_up[t, i]) * gate_up[t, inter + i],   silu(z) = z / (1 + exp(-z))

`gate_up` is the output of one merged projection: the gate's half first, then up's.
Numerics: silu in fp32, cast to the input's dtype, then multiplied, as transformers does. The fp8
sibling writes what `quantise_rows` makes of out (fp8.py, invariant 3); it must see a whole row
before it writes any of it, so a row is one program there and many programs here.
On one H200, 8192 rows: 97 % of 4.3 TB/s; the fp8 sibling 70 %.
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.fp8 import fp8_outputs, quantise_row, wide_row_launch
from headrace.kernels.triton_seam import tl, triton


def silu_mul_reference(
    gate_up: torch.Tensor,  # [num_tokens, 2 * inter], gate first
) -> torch.Tensor:
    """Return silu(gate) * up: [num_tokens, inter]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@triton.jit
def _gate(gate_ptr, inter, is_inside) -> tl.tensor:
    """Load some gates and the ups beside them; return silu(gate) * up in their dtype."""
    dtype = gate_ptr.dtype.element_ty
    gate = tl.load(gate_ptr, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inter, mask=is_inside, other=0.0).to(tl.float32)
    # exp(88) is the last below fp32's largest; what a gate of -88 lets through rounds to nothing.
    activated = gate / (1.0 + tl.exp(tl.minimum(-gate, 88.0)))
    return (activated.to(dtype).to(tl.float32) * up).to(dtype)


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,  # in: [num_tokens, 2 * inter]
    out_ptr,  # out: [num_tokens, inter]
    inter,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < inter
    gated = _gate(gate_up_ptr + token * 2 * inter + offsets, inter, is_inside)
    tl.store(out_ptr + token * inter + offsets, gated, mask=is_inside)


@triton.jit
def _silu_mul_fp8_kernel(
    gate_up_ptr,  # in: [num_tokens, 2 * inter]
    out_ptr,  # out: [num_tokens, inter] e4m3
    scale_ptr,  # out: [num_tokens] fp32
    inter,
    BLOCK: tl.constexpr,  # inter, up to the next power of two
) -> None:
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    is_inside = offsets < inter
    gated = _gate(gate_up_ptr + token * 2 * inter + offsets, inter, is_inside)
    codes, scale = quantise_row(gated.to(tl.float32))
    tl.store(out_ptr + token * inter + offsets, codes, mask=is_inside)
    tl.store(scale_ptr + token, scale)


def _inter_of(gate_up: torch.Tensor) -> int:
    """Check the input and return inter."""
    check_leading("gate_up", gate_up, 2)
    width = gate_up.shape[1]
    if width % 2:
        raise ValueError(
            f"gate_up must have an even width, a half each for gate and up; found {width}: "
            "pass the merged projection's whole output"
        )
    return width // 2


def silu_mul(
    gate_up: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    launch: dict[str, int] | None = None,
) -> torch.Tensor:
    """Return silu(gate) * up.

    Args:
        gate_up: [num_tokens, 2 * inter], gate first, contiguous.
        out: [num_tokens, inter], dtype of gate_up. Allocated when None.
        launch: BLOCK and num_warps, to measure others than the default.
    """
    inter, num_tokens = _inter_of(gate_up), gate_up.shape[0]
    if out is None:
        out = gate_up.new_empty((num_tokens, inter))
    check_tensor("out", out, (num_tokens, inter), gate_up.dtype, gate_up.device)
    if out.numel() > 0:
        block = min(1024, triton.next_power_of_2(inter))
        tile = launch or {"BLOCK": block, "num_warps": 4}
        grid = (num_tokens, triton.cdiv(inter, tile["BLOCK"]))
        _silu_mul_kernel[grid](gate_up, out, inter, **tile)
    return out


def silu_mul_fp8(
    gate_up: torch.Tensor,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(gate) * up quantised by rows: (out, scale).

    Args:
        gate_up: [num_tokens, 2 * inter], gate first, contiguous.
        out: [num_tokens, inter] e4m3. Allocated when None.
        scale: [num_tokens, 1] fp32. Allocated when None.
        num_warps: of a program, to measure others than the default.
    """
    inter, num_tokens = _inter_of(gate_up), gate_up.shape[0]
    out, scale = fp8_outputs("out", (num_tokens, inter), out, scale, gate_up.device)
    if out.numel() > 0:
        tile = wide_row_launch(inter, num_warps)
        _silu_mul_fp8_kernel[(num_tokens,)](gate_up, out, scale, inter, **tile)
    return out, scale


#: Two roundings to the dtype (silu, the product); Triton's interpreter truncates, a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
