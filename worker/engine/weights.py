"""Weights of a `transformers` folder, merged the way the decoder multiplies by them.

q, k and v are one matrix, gate and up another: one GEMM instead of three and two. Every tensor of
the checkpoint is used exactly once, and every one the model needs is there; otherwise the load is
refused with the names, because a model with a missing tensor still talks, only nonsense.

Called by: runner.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headrace.worker.engine.architecture import Architecture, UnsupportedModel

CPU = torch.device("cpu")
#: A linear layer's [num_outputs, width]: a tensor, or what a runner keeps instead of one.
Matrix = Any


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: torch.Tensor  # [hidden]
    qkv: Matrix  # [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    qk_norm: tuple[torch.Tensor, torch.Tensor] | None  # [head_dim] each
    o: Matrix  # [hidden, num_q_heads * head_dim]
    o_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: Matrix  # [2 * inter, hidden], gate first
    gate_up_bias: torch.Tensor | None
    down: Matrix  # [hidden, inter]
    down_bias: torch.Tensor | None


#: The fields of a layer that hold a Matrix.
MATRICES = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [vocab, hidden]; the embedding itself where tied
    lm_head_rows: torch.Tensor  # the same, left plain where a runner lays lm_head out otherwise


#: What a runner makes of a layer as it is loaded, before the next one takes memory.
Keep = Callable[[LayerWeights], LayerWeights]
#: Where a tensor of the checkpoint goes: (name, as it was read) -> on its device, in its dtype.
Place = Callable[[str, torch.Tensor], torch.Tensor]

#: standard deviation of random weights, as transformers initialises these models.
RANDOM_STD = 0.02


def count_weight_bytes(arch: Architecture, itemsize: int, linear_itemsize: int) -> int:
    """Return the bytes of all weights; the layers' matrices may be narrower than the rest."""
    return sum(
        math.prod(shape) * (linear_itemsize if name.endswith("_proj.weight") else itemsize)
        for name, shape in expected_shapes(arch).items()
    )


def as_it_is(layer: LayerWeights) -> LayerWeights:
    return layer


def obtain_weights(
    folder: Path,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device = CPU,
    *,
    is_random: bool,
    keep: Keep = as_it_is,
) -> Weights:
    """Read the folder's weights, or make random ones, for which its config.json is enough."""
    if is_random:
        return random_weights(arch, dtype, device, keep)
    return load_weights(folder, arch, dtype, device, keep)


def load_weights(
    folder: Path,
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device = CPU,
    keep: Keep = as_it_is,
) -> Weights:
    """Read, check and merge; raise UnsupportedModel with the names that are wrong.

    The files are mapped, so a tensor takes memory when it is placed: a layer at a time.
    """

    def place(_: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype)

    return merge_weights(dict(_read(folder)), arch, place, keep)


def random_weights(
    arch: Architecture,
    dtype: torch.dtype,
    device: torch.device = CPU,
    keep: Keep = as_it_is,
    seed: int = 0,
) -> Weights:
    """Make weights of the model's shapes, for benchmarks: norms of 1, biases of 0."""
    generator = torch.Generator(device).manual_seed(seed)

    def place(name: str, shape_of: torch.Tensor) -> torch.Tensor:
        drawn = torch.empty(shape_of.shape, dtype=dtype, device=device)
        if name.endswith("norm.weight"):
            return drawn.fill_(1)
        if name.endswith(".bias"):
            return drawn.fill_(0)
        return drawn.normal_(0, RANDOM_STD, generator=generator)

    shapes = expected_shapes(arch)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return merge_weights(tensors, arch, place, keep)


def merge_weights(
    tensors: dict[str, torch.Tensor], arch: Architecture, place: Place, keep: Keep = as_it_is
) -> Weights:
    """Place and merge tensors under their names in the checkpoint; empties the dict on the way."""
    shapes = expected_shapes(arch)
    if arch.has_tied_embeddings:
        tensors.pop("lm_head.weight", None)  # some tools save the tied copy too
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # old checkpoints carry this table; it follows from the config
    _refuse("lacks", shapes.keys() - tensors.keys())
    _refuse("has unknown", tensors.keys() - shapes.keys())
    _refuse(
        "has wrong shapes in",
        [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if tuple(tensors[name].shape) != shape
        ],
    )

    def take(name: str) -> torch.Tensor:
        return place(name, tensors.pop(name))

    embedding = take("model.embed_tokens.weight")
    has = frozenset(tensors).__contains__
    layers = tuple(
        keep(_merge_layer(take, has, f"model.layers.{i}.")) for i in range(arch.num_layers)
    )
    norm = take("model.norm.weight")
    lm_head = embedding if arch.has_tied_embeddings else take("lm_head.weight")
    return Weights(embedding, layers, norm, lm_head, lm_head)


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the checkpoint."""
    q, kv = arch.num_q_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    biases = {name: arch.has_qkv_bias for name in ("q_proj", "k_proj", "v_proj")}
    biases |= {"o_proj": arch.has_o_bias}
    biases |= {name: arch.has_mlp_bias for name in ("gate_proj", "up_proj", "down_proj")}
    linears = {
        "self_attn.q_proj": (q, arch.hidden),
        "self_attn.k_proj": (kv, arch.hidden),
        "self_attn.v_proj": (kv, arch.hidden),
        "self_attn.o_proj": (arch.hidden, q),
        "mlp.gate_proj": (arch.inter, arch.hidden),
        "mlp.up_proj": (arch.inter, arch.hidden),
        "mlp.down_proj": (arch.hidden, arch.inter),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (arch.vocab_size, arch.hidden),
        "model.norm.weight": (arch.hidden,),
    }
    if not arch.has_tied_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, arch.hidden)
    for prefix in (f"model.layers.{i}." for i in range(arch.num_layers)):
        shapes[prefix + "input_layernorm.weight"] = (arch.hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (arch.hidden,)
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if biases[name.split(".")[1]]:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        if arch.has_qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (arch.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (arch.head_dim,)
    return shapes


def _merge_layer(
    take: Callable[[str], torch.Tensor], has: Callable[[str], bool], prefix: str
) -> LayerWeights:
    def merged(kind: str, *names: str) -> torch.Tensor | None:
        if not has(f"{prefix}{names[0]}.{kind}"):
            return None
        return torch.cat([take(f"{prefix}{name}.{kind}") for name in names])

    def need(name: str) -> torch.Tensor:
        return take(f"{prefix}{name}.weight")

    has_qk_norm = has(f"{prefix}self_attn.q_norm.weight")
    qkv_names = [f"self_attn.{name}_proj" for name in "qkv"]
    gate_up_names = ["mlp.gate_proj", "mlp.up_proj"]
    return LayerWeights(
        attention_norm=need("input_layernorm"),
        qkv_bias=merged("bias", *qkv_names),
        qkv=torch.cat([need(name) for name in qkv_names]),
        qk_norm=(need("self_attn.q_norm"), need("self_attn.k_norm")) if has_qk_norm else None,
        o_bias=merged("bias", "self_attn.o_proj"),
        o=need("self_attn.o_proj"),
        mlp_norm=need("post_attention_layernorm"),
        gate_up_bias=merged("bias", *gate_up_names),
        gate_up=torch.cat([need(name) for name in gate_up_names]),
        down_bias=merged("bias", "mlp.down_proj"),
        down=need("mlp.down_proj"),
    )


def _read(folder: Path) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield every tensor of the folder's one file, or of all files that its index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    try:
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise UnsupportedModel(f"{index} names {name!r}: files must lie in the folder")
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open has no iterator)
                    yield key, file.get_tensor(key)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise UnsupportedModel(
            f"weights asked from {folder}; {error}: the folder must hold model.safetensors, or "
            "model.safetensors.index.json and all files it names"
        ) from error


def _refuse(what: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise UnsupportedModel(f"the checkpoint {what} {shown}: config.json and weights disagree")
