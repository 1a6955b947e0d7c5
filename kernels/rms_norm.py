"""RMSNorm, alone and joined with the residual addition before it.

    y = cast(x / sqrt(mean(x^2) + eps)) * weight          [num_tokens, hidden]
    residual' = x + residual;  y = rms_norm(residual')

Numerics: the mean and the division are in fp32, the quotient is cast to x.dtype and only then
multiplied by the weight, as transformers' LlamaRMSNorm does. The sum with the residual is rounded
to x.dtype before it is normed, because that rounded sum is what the next layer adds to.
"""

import torch


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
