"""What a model is, read from the config.json of a `transformers` folder, and what is refused.

One decoder serves the Llama family: grouped-query attention with rotary positions, RMSNorm before
attention and MLP, a SiLU-gated MLP. Members differ in a few switches, all of them here. Anything
that would change the result and is not known here is refused by name: a model that answers almost
right is worse than one that does not load.

Called by: weights.py, model.py, runner.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a stub reads configs too, and starts without torch
    import torch

#: model_type -> (has bias on q, k and v; has QK-norm), where config.json does not say.
FAMILIES = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}
#: dtype in config.json -> that computed in; fp16 is widened, as a CPU has no fast fp16 GEMM.
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}


class UnsupportedModel(ValueError):
    """The folder is no model, or one that this engine does not run; the text names the reason."""


@dataclass(frozen=True, slots=True)
class Architecture:
    vocab_size: int
    hidden: int
    inter: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # None, or of rope_type "linear" or "llama3"
    windows: tuple[int | None, ...]  # by layer; None = full attention
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    has_tied_embeddings: bool
    dtype: str  # to compute in unless the worker says otherwise

    @classmethod
    def from_folder(cls, folder: Path) -> Architecture:
        """Read config.json; raise UnsupportedModel with the name of what is not supported."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UnsupportedModel(
                f"{path} asked as a model's config; {error}: name a folder that transformers' "
                "save_pretrained wrote"
            ) from error
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Any) -> Architecture:
        """Build from the fields of a config.json."""
        if not isinstance(config, dict):
            raise UnsupportedModel(f"config.json holds a {type(config).__name__}, no object")
        family = config.get("model_type")
        if family not in FAMILIES:
            raise _unsupported("model_type", family, sorted(FAMILIES))
        has_bias, has_qk_norm = FAMILIES[family]
        if family == "llama":
            has_bias = bool(config.get("attention_bias"))
        elif config.get("attention_bias") and not has_bias:
            raise _unsupported("attention_bias", True, [False])
        if config.get("hidden_act", "silu") != "silu":
            raise _unsupported("hidden_act", config["hidden_act"], ["silu"])
        if config.get("quantization_config"):
            raise _unsupported("quantization_config", config["quantization_config"], [None])
        if config.get("partial_rotary_factor", 1.0) != 1.0:
            raise _unsupported("partial_rotary_factor", config["partial_rotary_factor"], [1.0])
        num_q_heads = _need(config, "num_attention_heads")
        hidden = _need(config, "hidden_size")
        theta, scaling = _rope(config)
        num_kv_heads = config.get("num_key_value_heads") or num_q_heads
        if num_q_heads % num_kv_heads:
            raise _unsupported("num_key_value_heads", num_kv_heads, [f"divisors of {num_q_heads}"])
        return cls(
            vocab_size=_need(config, "vocab_size"),
            hidden=hidden,
            inter=_need(config, "intermediate_size"),
            num_layers=_need(config, "num_hidden_layers"),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=config.get("head_dim") or hidden // num_q_heads,
            rms_eps=config.get("rms_norm_eps", 1e-6),
            max_positions=_need(config, "max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            windows=_windows(config),
            has_qkv_bias=has_bias,
            has_o_bias=family == "llama" and has_bias,
            has_mlp_bias=bool(config.get("mlp_bias")),
            has_qk_norm=has_qk_norm,
            has_tied_embeddings=bool(config.get("tie_word_embeddings")),
            dtype=_dtype(config),
        )

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values over all layers, for one byte an element."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def rope_cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tables of [max_positions, head_dim // 2] fp32."""
        import torch

        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        frequencies = _scale(1.0 / self.rope_theta**exponents, self.rope_scaling)
        angles = torch.outer(torch.arange(self.max_positions, dtype=torch.float32), frequencies)
        return angles.cos(), angles.sin()


def _scale(frequencies: torch.Tensor, scaling: dict[str, Any] | None) -> torch.Tensor:
    """Stretch rotations as the config says: all of them, or (llama3) only the slow ones."""
    if scaling is None:
        return frequencies
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    # 0 where a rotation makes few turns over the original length (stretched), 1 where many (kept).
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def _rope(config: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Read base and scaling, in the form of transformers 5 (rope_parameters) or 4."""
    fields = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = fields.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return float(theta), None
    needed = {
        "linear": {"factor"},
        "llama3": {
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        },
    }
    if kind not in needed:
        raise _unsupported("rope_type", kind, ["default", *needed])
    if missing := needed[kind] - fields.keys():
        raise UnsupportedModel(
            f"rope_type {kind!r} without {', '.join(sorted(missing))} in config.json: add them"
        )
    return float(theta), {**fields, "rope_type": kind}


def _windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Return each layer's sliding window, as the family's own config class means it."""
    num_layers = _need(config, "num_hidden_layers")
    # MistralConfig's default, for the early checkpoints whose config.json does not say.
    unsaid = 4096 if config["model_type"] == "mistral" else None
    window = config.get("sliding_window", unsaid)
    if config["model_type"] in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    if window is None or config["model_type"] == "llama":
        return (None,) * num_layers
    if config["model_type"] == "mistral":
        return (window,) * num_layers
    first = config.get("max_window_layers", 28)
    default = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    kinds = config.get("layer_types") or default
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise _unsupported("layer_types", sorted(unknown), ["full_attention", "sliding_attention"])
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _dtype(config: dict[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise _unsupported("dtype", name, sorted(DTYPES))
    return DTYPES[name]


def _need(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(
            f"{name} in config.json is {value!r}; a positive integer is needed: the folder is "
            "no complete model"
        )
    return value


def _unsupported(name: str, found: object, supported: list[Any]) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name} in config.json is {found!r}; this engine runs {supported}: use another model"
    )
