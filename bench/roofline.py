"""The least time a workload can take on one H200: bytes it must read, products it must form.

    decode step >= (weight bytes + sum over sequences of context * KV bytes a token) / 4.3 TB/s
    prefill     >= 2 * layer parameters * prompt tokens / 790 TFLOP/s

A whole workload in this model: a prompt costs its own prefill (only the last token of each goes
through lm_head, so lm_head's product is left out), and never delays a decode: the two times are
added as if run apart. All sequences that fit in `max_num_seqs` decode together, in order of
arrival, and the place of one that ends is taken at the next step. Prompt tokens after the same
tokens of another prompt are computed once (prefix cache). A request's first token comes from its
prefill, so it takes one decode step less than it has output tokens.

This reproduces all columns of the reference table within 3 % (tests/bench/test_roofline.py), with
"mixed" among them: its assumption is that all 256 prompts come first, then 256 sequences decode
together and the batch thins out as they end.

Called by: engine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

#: bytes a second, read + written, of a large copy on one H200.
HBM_BYTES_PER_S = 4.3e12
#: operations a second of an 8192-cube bf16 product on one H200; fp8 has twice the rate.
BF16_FLOP_PER_S = 790e12

Request = tuple[list[int], int]  # (prompt token ids, output tokens)


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What a token costs, from a model's shape."""

    layer_params: int  # in the matrices of all layers
    head_params: int  # in lm_head, which is read in full; the embedding table is not
    kv_elements: int  # keys and values a token over all layers

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelCost:
        """Read a config.json of the Llama family."""
        hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
        head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
        q = config["num_attention_heads"] * head_dim
        kv = config["num_key_value_heads"] * head_dim
        layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * config["intermediate_size"]
        return cls(num_layers * layer, config["vocab_size"] * hidden, 2 * kv * num_layers)


@dataclass(frozen=True, slots=True)
class Roofline:
    """A model's floor with given bytes an element; W8A8 halves the layers, never lm_head."""

    cost: ModelCost
    kv_bytes: int = 2  # an element of the cache
    layer_bytes: int = 2  # a parameter of the layers

    @property
    def weight_bytes(self) -> int:
        return self.cost.layer_params * self.layer_bytes + self.cost.head_params * 2

    @property
    def kv_bytes_per_token(self) -> int:
        return self.cost.kv_elements * self.kv_bytes

    def decode_s(self, num_context_tokens: int) -> float:
        """Return the least seconds of a decode step whose sequences have so many tokens in all."""
        return (self.weight_bytes + num_context_tokens * self.kv_bytes_per_token) / HBM_BYTES_PER_S

    def prefill_s(self, num_tokens: int) -> float:
        """Return the least seconds to compute prompt tokens; the weights are read once."""
        rate = BF16_FLOP_PER_S * (2 // self.layer_bytes)
        return max(2 * self.cost.layer_params * num_tokens / rate, self.decode_s(0))

    def workload_s(self, requests: Sequence[Request], max_num_seqs: int) -> float:
        """Return the least seconds of a whole workload."""
        prompts = np.array([len(prompt) for prompt, _ in requests])
        steps = np.array([num_output - 1 for _, num_output in requests])
        total_s = self.prefill_s(count_distinct_tokens([prompt for prompt, _ in requests]))
        made = np.zeros(len(requests), np.int64)
        waiting = np.flatnonzero(steps)
        running = waiting[:0]
        while len(waiting) + len(running):
            num_new = max_num_seqs - len(running)
            running = np.concatenate((running, waiting[:num_new]))
            waiting = waiting[num_new:]
            made[running] += 1
            total_s += self.decode_s(int((prompts[running] + made[running]).sum()))
            running = running[made[running] < steps[running]]
        return total_s


def count_distinct_tokens(prompts: Sequence[list[int]]) -> int:
    """Count the tokens to compute when none is computed twice behind the same tokens."""
    ordered = sorted(prompts)
    counted = len(ordered[0]) if ordered else 0
    for before, after in pairwise(ordered):
        pairs = enumerate(zip(before, after, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
        counted += len(after) - shared
    return counted
