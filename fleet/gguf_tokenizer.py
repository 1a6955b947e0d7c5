"""A `tokenizers` tokenizer and a chat template out of a GGUF file's metadata.

Only the pre-tokenizer `smollm` is known: GPT-2's byte-level BPE after a split of numbers into
single digits. transformers' own GGUF path leaves that split out and takes the wrong token for the
end (5.17): 124 of 5,150 texts came out differently from llama.cpp, here 0 did.

Called by `smollm2`.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from headrace.fleet.failure import FleetError

#: tokenizer.ggml.token_type of tokens that text never encodes to by chance.
CONTROL = 3


def read_tokenizer(fields: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer and the contents of its tokenizer_config.json."""
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise FleetError(
            f"the GGUF file has a tokenizer of kind {kind}; this converter knows ('gpt2', 'smollm')"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer, _config(fields, tokens)


def _config(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    def named(role: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{role}_token_id"]]

    return {
        # The class that takes tokenizer.json as it is: GPT2Tokenizer would build its own
        # pre-tokenizer and lose the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": named("bos"),
        "eos_token": named("eos"),
        "unk_token": named("unknown"),
        "pad_token": named("padding"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }
