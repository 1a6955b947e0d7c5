"""The converter of the embedded model, held to transformers and to the text it writes."""

import json
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.fleet import smollm2
from headrace.fleet.failure import FleetError
from headrace.fleet.smollm2 import ensure_model


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder):
    return AutoTokenizer.from_pretrained(smollm2_folder)


def test_it_says_paris(smollm2_folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder)
    assert model.dtype == torch.bfloat16
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
    answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_the_chat_template_and_the_ends_are_the_models_own(smollm2_folder, tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    config = json.loads((smollm2_folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "In 1984, 12345 days",
        "naïve café 漢字 🙂\u200d🙂",
        "  def f(x):\n\treturn x\n",
        "\r\n\x00 ",
        "",
    ],
)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_numbers_are_split_into_digits_and_control_tokens_are_one(tokenizer):
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "1984"]
    assert tokenizer("1984").input_ids == digits
    assert tokenizer("1984<|im_end|>").input_ids == [*digits, tokenizer.eos_token_id]


def test_weights_keep_their_shapes_and_the_head_is_tied(smollm2_folder):
    with (smollm2_folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__")
    assert len(header) == 272
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert header["model.layers.29.self_attn.k_proj.weight"]["shape"] == [192, 576]
    assert "lm_head.weight" not in header


def test_a_folder_that_is_there_is_not_made_again(smollm2_folder, monkeypatch):
    monkeypatch.setattr(smollm2, "wheel_file", None)  # would fail
    assert ensure_model(smollm2_folder) == smollm2_folder


def test_a_changed_file_is_refused_and_leaves_no_folder(tmp_path, monkeypatch):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "wheel_file", lambda *names: tmp_path / "other.gguf")
    with pytest.raises(FleetError, match=f"expected is {smollm2.SHA256}"):
        ensure_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_missing_wheel_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "WHEEL", "no-such-wheel")
    with pytest.raises(FleetError, match=r"no-such-wheel.*HEADRACE_MODEL"):
        ensure_model(tmp_path / "model")


def test_a_conversion_that_was_killed_is_done_again(tmp_path, monkeypatch):
    draft = tmp_path / ".model.making" / "model"
    draft.mkdir(parents=True)
    (draft / "config.json").write_text("{")
    monkeypatch.setattr(
        smollm2, "_convert", lambda source, folder: (folder / "made").write_text("")
    )
    folder = ensure_model(tmp_path / "model")
    assert [path.name for path in folder.iterdir()] == ["made"]
