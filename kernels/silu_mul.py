"""The gated activation of a Llama MLP: silu(gate) * up.

    out[t, i] = silu(gate_up[t, i]) * gate_up[t, inter + i],   silu(z) = z / (1 + exp(-z))

`gate_up` is the output of one merged projection: the gate's half first, then up's.
Numerics: silu in fp32, cast to the input's dtype, then multiplied, as transformers does.
"""

import torch

from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.triton_seam import tl, triton


def silu_mul_reference(
    gate_up: torch.Tensor,  # [num_tokens, 2 * inter], gate first
) -> torch.Tensor:
    """Return silu(gate) * up: [num_tokens, inter]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


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
    gate_ptr = gate_up_ptr + token * 2 * inter + offsets
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + inter, mask=is_inside, other=0.0).to(tl.float32)
    # exp of minus the magnitude cannot overflow, whichever way the gate points.
    decay = tl.exp(-tl.abs(gate))
    sigmoid = tl.where(gate >= 0, 1.0, decay) / (1.0 + decay)
    activated = (gate * sigmoid).to(dtype).to(tl.float32)
    tl.store(out_ptr + token * inter + offsets, (activated * up).to(dtype), mask=is_inside)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return silu(gate) * up.

    Args:
        gate_up: [num_tokens, 2 * inter], gate first, contiguous.
        out: [num_tokens, inter], dtype of gate_up. Allocated when None.
    """
    check_leading("gate_up", gate_up, 2)
    num_tokens, width = gate_up.shape
    if width % 2:
        raise ValueError(
            f"gate_up must have an even width, a half each for gate and up; found {width}: "
            "pass the merged projection's whole output"
        )
    inter = width // 2
    if out is None:
        out = gate_up.new_empty((num_tokens, inter))
    check_tensor("out", out, (num_tokens, inter), gate_up.dtype, gate_up.device)
    block = min(1024, triton.next_power_of_2(max(inter, 1)))
    if out.numel() > 0:
        grid = (num_tokens, triton.cdiv(inter, block))
        _silu_mul_kernel[grid](gate_up, out, inter, BLOCK=block, num_warps=4)
    return out


#: Two roundings to the dtype (silu, the product); Triton's interpreter truncates, a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
