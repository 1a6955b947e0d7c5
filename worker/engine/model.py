"""The decoder of the Llama family: Llama, Mistral, Qwen2 and 2.5, Qwen3, SmolLM2.

    x = embed(tokens)
    each layer:  x += o(attention(rope(qkv(norm(x)))));   x += down(silu(gate) * up of norm(x))
    logits = lm_head(norm(x)) of the rows asked for

Rows are tokens of all sequences alike: only attention knows to whom a row belongs, and it sees the
paged cache. The sum with the residual is carried into the next norm, as the kernels fuse it.

Called by: runner.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from headrace.worker.engine import cpu_ops as ops
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.weights import LayerWeights, Weights

#: leading logits computed in fp32 for a bf16 model; 64 rows of the head are 0.1 % of it.
NUM_EXACT_LOGITS = 64


def forward(
    arch: Architecture,
    weights: Weights,
    k_cache: torch.Tensor,  # [num_layers, num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # like k_cache; both are written in place
    tokens: torch.Tensor,  # [num_tokens] int
    step: ops.CpuStep,
    rows: torch.Tensor,  # [num_rows] int64, those whose logits are wanted
) -> torch.Tensor:  # [num_rows, vocab] fp32
    """Compute one step's rows: their keys and values into the cache, and logits of some."""
    residual = F.embedding(tokens, weights.embedding).float()
    x = ops.rms_norm(residual, weights.layers[0].attention_norm, arch.rms_eps)
    next_norms = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
    for i, layer in enumerate(weights.layers):
        x = _attention(arch, layer, x, step, k_cache[i], v_cache[i], arch.windows[i])
        x, residual = ops.residual_rms_norm(x, residual, layer.mlp_norm, arch.rms_eps)
        x = ops.silu_mul(ops.linear(x, layer.gate_up, layer.gate_up_bias))
        x = ops.linear(x, layer.down, layer.down_bias)
        if i == arch.num_layers - 1:  # what is left to do concerns only the rows asked for
            x, residual = x[rows], residual[rows]
        x, residual = ops.residual_rms_norm(x, residual, next_norms[i], arch.rms_eps)
    return _head(weights, x)


def _head(weights: Weights, x: torch.Tensor) -> torch.Tensor:  # [num_rows, hidden]
    """Return logits: [num_rows, vocab] fp32, the leading ones exact.

    A bf16 GEMM rounds its result: by steps of 0.125 where logits are above 16, which makes ties of
    what is not equal. Among the leaders the token is chosen, so those are computed again.
    """
    logits = ops.linear(x, weights.lm_head, None).float()
    if x.dtype is torch.float32:
        return logits
    leaders = logits.topk(min(NUM_EXACT_LOGITS, logits.shape[1]), dim=-1).indices
    exact = weights.lm_head_rows[leaders].float() @ x.float().unsqueeze(-1)
    return logits.scatter_(1, leaders, exact.squeeze(-1))


def _attention(
    arch: Architecture,
    layer: LayerWeights,
    x: torch.Tensor,  # [num_tokens, hidden]
    step: ops.CpuStep,
    k_cache: torch.Tensor,  # of this layer
    v_cache: torch.Tensor,
    window: int | None,
) -> torch.Tensor:  # [num_tokens, hidden]
    qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
    q = ops.qkv_rope_write(
        qkv, step, k_cache, v_cache, arch.num_q_heads, layer.qk_norm, arch.rms_eps
    )
    mixed = ops.paged_attention(q, step, k_cache, v_cache, arch.head_dim**-0.5, window)
    return ops.linear(mixed, layer.o, layer.o_bias)
