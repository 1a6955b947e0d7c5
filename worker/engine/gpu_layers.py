"""A decoder layer's linear products on a GPU, each in the form that suits the number of rows.

    qkv = linear(norm(residual));  residual += o(attention(qkv))
    gate_up = linear(norm(residual));  residual += down(silu(gate) * up)

With few rows a product is the reading of its weights: kernels/skinny_linear.py does it with the
norm, SiLU or addition inside, where the shipped table (kernels/tuning.py) says that this is faster.
Elsewhere it is cuBLAS; what it has made is then added in the same launch as the next norm. With
fp8 (W8A8) activations are quantised by row as they are made, weights by output channel at the load,
layer by layer: the matrices they were made of are not kept.

Invariants:
 1. What a call leaves `pending` is added to the residual by the next one, before all else.
 2. The choice depends on the device's name and on shapes only, never on a measurement at start.

Called by: gpu_model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from headrace.kernels import tuning
from headrace.kernels.fp8 import fp8_linear, quantise_rows, quantise_weight
from headrace.kernels.rms_norm import residual_rms_norm, residual_rms_norm_fp8, rms_norm
from headrace.kernels.silu_mul import silu_mul, silu_mul_fp8
from headrace.kernels.skinny_linear import SkinnyWorkspace, skinny_linear
from headrace.worker.engine.weights import MATRICES, LayerWeights

#: attention of a layer: [num_rows, qkv width] -> [num_rows, num_q_heads * head_dim]
Attend = Callable[[torch.Tensor], torch.Tensor]


class Layers:
    """All layers, in the model's own dtype."""

    def __init__(self, layers: tuple[LayerWeights, ...], eps: float, device_name: str) -> None:
        self._layers, self._eps, self._device_name = layers, eps, device_name
        self._workspace = SkinnyWorkspace.allocate(layers[0].attention_norm.device)

    def run(
        self,
        index: int,
        normed: torch.Tensor | None,  # [num_rows, hidden], of the first layer: `embed` makes it
        pending: torch.Tensor | None,  # [num_rows, hidden] what the layer before left
        residual: torch.Tensor,  # [num_rows, hidden] fp32, changed in place
        attend: Attend,
    ) -> torch.Tensor | None:  # [num_rows, hidden] yet to be added to the residual; None: it is
        """Compute one layer."""
        layer = self._layers[index]
        norm = layer.attention_norm
        # The bias of qkv is added with the rotation.
        qkv = self._norm_linear(normed, pending, residual, norm, layer.qkv, None)
        pending = self._add_linear(attend(qkv), layer.o, layer.o_bias, residual)
        gate_up = self._norm_linear(
            None, pending, residual, layer.mlp_norm, layer.gate_up, layer.gate_up_bias
        )
        return self._add_silu_linear(gate_up, layer.down, layer.down_bias, residual)

    def finish(
        self,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        norm: torch.Tensor,  # [hidden] the model's last
        rows: torch.Tensor | None,  # [num_due] int32, -1 = none; None = all rows
    ) -> torch.Tensor:  # [num_due or num_rows, hidden]
        """Return what lm_head multiplies."""
        if pending is not None:
            return residual_rms_norm(pending, residual, norm, self._eps, rows=rows)[0]
        normed = rms_norm(residual, norm, self._eps)
        # Few rows: picking the due ones afterwards costs less than a kernel of its own.
        return normed if rows is None else normed[rows.clamp(min=0).long()]

    def _norm_linear(
        self,
        normed: torch.Tensor | None,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        norm: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        choice = self._choose("rms_norm", residual, weight)
        if choice == "cublas":
            if pending is not None:
                normed = residual_rms_norm(pending, residual, norm, self._eps, pending)[0]
            elif normed is None:
                normed = rms_norm(residual, norm, self._eps)
            return _linear(normed, weight, bias)
        if pending is not None:
            residual += pending
        return skinny_linear(
            residual, weight, bias=bias, prologue="rms_norm", norm_weight=norm, eps=self._eps,
            config=choice, workspace=self._workspace,
        )  # fmt: skip

    def _add_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        choice = self._choose("add", x, weight)
        if choice == "cublas":
            return _linear(x, weight, bias)
        skinny_linear(
            x, weight, bias=bias, residual=residual, config=choice, workspace=self._workspace
        )
        return None

    def _add_silu_linear(
        self,
        gate_up: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        choice = self._choose("silu_mul_add", gate_up, weight)
        if choice == "cublas":
            return _linear(silu_mul(gate_up), weight, bias)
        skinny_linear(
            gate_up, weight, bias=bias, prologue="silu_mul", residual=residual, config=choice,
            workspace=self._workspace,
        )  # fmt: skip
        return None

    def _choose(self, op: str, x: torch.Tensor, weight: torch.Tensor) -> tuning.Choice:
        if weight.dtype is torch.float32:
            return "cublas"  # fp32 is there to be compared with, not to be fast
        return tuning.choose(self._device_name, op, x.shape[0], *weight.shape)


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A linear layer's matrix in e4m3; the one it was made of is not kept."""

    values: torch.Tensor  # [num_outputs, width] e4m3
    scale: torch.Tensor  # [num_outputs, 1] fp32


def in_fp8(layer: LayerWeights) -> LayerWeights:
    """Return the layer with its matrices as Fp8Matrix: what a W8A8 engine keeps of it."""
    made = {name: Fp8Matrix(*quantise_weight(getattr(layer, name))) for name in MATRICES}
    return replace(layer, **made)


def make_layers(layers: tuple[LayerWeights, ...], eps: float, device_name: str) -> Layers:
    """Return the products of layers in the form these are kept in."""
    kind = Fp8Layers if isinstance(layers[0].qkv, Fp8Matrix) else Layers
    return kind(layers, eps, device_name)


class Fp8Layers(Layers):
    """W8A8: e4m3 products with a scale a row and a scale an output channel."""

    def run(
        self,
        index: int,
        normed: torch.Tensor | None,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        attend: Attend,
    ) -> torch.Tensor | None:
        """Compute one layer; there is always something pending."""
        layer = self._layers[index]
        if pending is not None:
            x = residual_rms_norm_fp8(pending, residual, layer.attention_norm, self._eps)[:2]
        else:
            assert normed is not None, "the first layer's input comes normed"
            x = quantise_rows(normed)
        mixed = attend(_product(x, layer.qkv))
        out = _biased(_product(quantise_rows(mixed), layer.o), layer.o_bias)
        x = residual_rms_norm_fp8(out, residual, layer.mlp_norm, self._eps)[:2]
        gated = silu_mul_fp8(_biased(_product(x, layer.gate_up), layer.gate_up_bias))
        return _biased(_product(gated, layer.down), layer.down_bias)


def _product(
    x: tuple[torch.Tensor, torch.Tensor],  # ([num_rows, width] e4m3, [num_rows, 1] fp32)
    weight: Fp8Matrix,
) -> torch.Tensor:  # [num_rows, num_outputs]
    return fp8_linear(*x, weight.values, weight.scale)


def _linear(
    x: torch.Tensor,  # [num_rows, k]
    weight: torch.Tensor,  # [n, k]
    bias: torch.Tensor | None,  # [n]
) -> torch.Tensor:  # [num_rows, n]
    return torch.nn.functional.linear(x, weight, bias)


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x.add_(bias)
