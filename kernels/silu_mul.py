"""The gated activation of a Llama MLP: silu(gate) * up.

    out[t, i] = silu(gate_up[t, i]) * gate_up[t, inter + i],   silu(z) = z / (1 + exp(-z))

`gate_up` is the output of one merged projection: the gate's half first, then up's.
Numerics: silu in fp32, cast to the input's dtype, then multiplied, as transformers does.
"""

import torch


def silu_mul_reference(
    gate_up: torch.Tensor,  # [num_tokens, 2 * inter], gate first
) -> torch.Tensor:
    """Return silu(gate) * up: [num_tokens, inter]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
