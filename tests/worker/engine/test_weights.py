"""architecture.py and weights.py: what is read, and what is refused with its name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.worker.engine.architecture import Architecture, UnsupportedModel
from headrace.worker.engine.gpu_layers import Fp8Matrix, in_fp8
from headrace.worker.engine.weights import (
    MATRICES,
    as_it_is,
    count_weight_bytes,
    expected_shapes,
    load_weights,
    merge_weights,
)


@pytest.fixture
def folder(model_folder, tmp_path):
    """Return a function that copies a model's folder, with changed config fields or tensors."""

    def copy(name="smollm2", config=None, change=lambda tensors: None):
        source = model_folder(name)
        fields = json.loads((source / "config.json").read_text()) | (config or {})
        (tmp_path / "config.json").write_text(json.dumps(fields))
        tensors = load_file(source / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return copy


def load(folder, dtype=torch.float32):
    return load_weights(folder, Architecture.from_folder(folder), dtype)


def test_q_k_v_and_gate_up_are_merged_in_order(model_folder):
    source = load_file(model_folder("qwen2") / "model.safetensors")
    layer = load(model_folder("qwen2")).layers[1]
    prefix = "model.layers.1."
    for merged, names, kind in (
        (layer.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "weight"),
        (layer.qkv_bias, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "bias"),
        (layer.gate_up, ("mlp.gate_proj", "mlp.up_proj"), "weight"),
    ):
        expected = torch.cat([source[f"{prefix}{name}.{kind}"] for name in names])
        torch.testing.assert_close(merged, expected, atol=0, rtol=0)


def test_tied_embeddings_are_one_tensor_and_others_are_two(model_folder):
    tied, separate = load(model_folder("smollm2")), load(model_folder("qwen2"))
    assert tied.lm_head is tied.embedding
    assert separate.lm_head is not separate.embedding


def test_weights_are_read_in_the_dtype_asked_for(model_folder):
    weights = load(model_folder("qwen3"), torch.bfloat16)
    assert weights.layers[0].qkv.dtype == weights.embedding.dtype == torch.bfloat16


def test_shards_named_by_an_index_are_read(model_folder, tmp_path):
    source = model_folder("qwen3")
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    torch.testing.assert_close(load(tmp_path).layers[0].qkv, load(source).layers[0].qkv)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=r"part-1\.safetensors"):
        load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(UnsupportedModel, match="must lie in the folder"):
        load(tmp_path)


def test_a_missing_tensor_is_refused_by_name(folder):
    path = folder(change=lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(UnsupportedModel, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        load(path)


def test_an_unknown_tensor_is_refused_by_name(folder):
    path = folder(change=lambda tensors: tensors.update(extra=torch.zeros(3)))
    with pytest.raises(UnsupportedModel, match="has unknown extra"):
        load(path)


def test_a_wrong_shape_is_refused_by_name(folder):
    path = folder(config={"intermediate_size": 64})
    with pytest.raises(UnsupportedModel, match=r"down_proj\.weight \[48, 80\] instead of \[48, 64"):
        load(path)


def test_old_rotary_tables_and_a_saved_tied_head_are_passed_over(folder):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert len(load(folder(change=change)).layers) == 3


def test_weights_that_are_no_safetensors_are_refused(folder):
    path = folder()
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UnsupportedModel, match="weights asked from"):
        load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="weights asked from"):
        load(path)


UNSUPPORTED = [
    ({"model_type": "gpt2"}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"dtype": "float8_e4m3fn"}, "dtype"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "chunked_attention", "full_attention"],
        },
        "layer_types",
    ),
]


@pytest.mark.parametrize(("config", "name"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_what_would_change_the_result_unnoticed_is_refused_by_name(config, name, folder):
    with pytest.raises(UnsupportedModel, match=name):
        Architecture.from_folder(folder(config=config))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": 3}'])
def test_a_config_that_is_no_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel):
        Architecture.from_folder(tmp_path)


def test_the_rope_of_transformers_4_configs_is_understood(folder):
    path = folder(
        config={
            "rope_parameters": None,
            "rope_theta": 5000.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        }
    )
    arch = Architecture.from_folder(path)
    assert (arch.rope_theta, arch.rope_scaling["factor"]) == (5000.0, 2.0)


def test_fp16_checkpoints_are_computed_in_fp32(folder):
    path = folder(config={"dtype": "float16"})
    assert Architecture.from_folder(path).dtype == "float32"


def test_windows_are_those_of_each_family(folder):
    mistral = {"model_type": "mistral", "sliding_window": 7}
    qwen = {"model_type": "qwen2", "sliding_window": 7, "max_window_layers": 2}
    for config, windows in (
        (mistral, (7, 7, 7)),
        ({**mistral, "sliding_window": None}, (None,) * 3),
        ({**qwen, "use_sliding_window": False}, (None,) * 3),
        ({**qwen, "use_sliding_window": True}, (None, None, 7)),
        ({"model_type": "llama", "sliding_window": 7}, (None,) * 3),
    ):
        assert Architecture.from_folder(folder(config=config)).windows == windows


def test_each_layer_is_kept_in_its_form_before_the_next_is_read(model_folder):
    """So a model loads whose plain weights would not fit beside those it runs with."""
    folder = model_folder("qwen2")
    arch = Architecture.from_folder(folder)
    tensors = {name: torch.ones(shape) for name, shape in expected_shapes(arch).items()}
    said = []

    def place(name, tensor):
        said.append(name.split(".")[2] if name.startswith("model.layers.") else name)
        return tensor

    def keep(layer):
        said.append("kept")
        return in_fp8(layer)

    weights = merge_weights(tensors, arch, place, keep)
    assert tensors == {}
    inside = [name for name in said if name == "kept" or name.isdigit()]
    for layer in range(arch.num_layers):
        at = inside.index("kept")
        assert set(inside[:at]) == {str(layer)}
        inside = inside[at + 1 :]
    assert inside == []
    for layer in weights.layers:
        for name in MATRICES:
            matrix = getattr(layer, name)
            assert matrix.values.dtype is torch.float8_e4m3fn
            torch.testing.assert_close(
                matrix.values.float() * matrix.scale, torch.ones(matrix.values.shape)
            )


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_bytes_of_weights_are_those_that_a_start_keeps(name, model_folder):
    folder = model_folder(name)
    arch = Architecture.from_folder(folder)
    for keep, linear_itemsize in ((as_it_is, 2), (in_fp8, 1)):
        weights = load_weights(folder, arch, torch.bfloat16, keep=keep)
        found = {weights.embedding, weights.norm, weights.lm_head}
        for layer in weights.layers:
            for value in (getattr(layer, field) for field in layer.__slots__):
                value = value.values if isinstance(value, Fp8Matrix) else value
                parts = value if isinstance(value, tuple) else (value,)
                found |= {part for part in parts if isinstance(part, torch.Tensor)}
        assert sum(t.numel() * t.itemsize for t in found) == count_weight_bytes(
            arch, 2, linear_itemsize
        )
