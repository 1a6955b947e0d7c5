"""A sequence: the tokens of one attempt inside the engine, and how far they are computed.

Its tokens are the prompt followed by the output. `num_known` of them are known, `num_computed` have
keys and values in the pool; the engine does nothing but let the second catch up with the first.
When it has, the last token's logits give the next known token. So prompts, resumed outputs and
recomputation after a preemption are all the same: known tokens not yet computed.

    WAITING -> RUNNING  [scheduler.Scheduler.plan, which gives the first blocks]
    RUNNING -> WAITING  [scheduler.Scheduler.plan, preempting: its blocks are given up]
    WAITING | RUNNING -> ended, forgotten  [scheduler.Scheduler.retire]

Invariants:
 1. num_prompt <= num_known <= num_prompt + max_tokens, and num_computed < num_known between steps.
 2. Known tokens never change; they only get more.
 3. A waiting sequence holds no block; a running one holds blocks_for(num_computed) or more.
 4. `names` are those of leading full blocks of known tokens.

Called by: scheduler.py (owner of the bookkeeping), batch.py and sampling.py (readers), loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headrace.worker.engine.prefix import extend_names
from headrace.worker.frames import Admit, Reason


class SequenceError(ValueError):
    """A sequence that cannot be run as asked; it fails alone. `code` goes to the courier."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; owned by the scheduler from `add` to `retire`."""

    asked: Admit
    arrival: int  # counts admissions; smaller is older
    tokens: np.ndarray  # [num_prompt + max_tokens] int32, the first num_known are valid
    num_prompt: int
    num_known: int
    num_computed: int = 0
    table: list[int] = field(default_factory=list)  # blocks in order of position
    names: list[bytes] = field(default_factory=list)
    num_named: int = 0  # leading blocks of the table already offered to the prefix index
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when first run
    was_run: bool = False

    @classmethod
    def from_admit(cls, asked: Admit, arrival: int) -> Sequence:
        """Build a sequence with the resumed output, if any, already known."""
        prompt = np.frombuffer(asked.prompt, "<i4")
        output = np.frombuffer(asked.output, "<i4")
        num_known = len(prompt) + len(output)
        tokens = np.empty(max(len(prompt) + asked.max_tokens, num_known), np.int32)
        tokens[:num_known] = np.concatenate((prompt, output))
        return cls(asked, arrival, tokens, len(prompt), num_known)

    @property
    def num_output(self) -> int:
        return self.num_known - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens still to be computed; 1 is a decode."""
        return self.num_known - self.num_computed

    @property
    def max_tokens_left(self) -> int:
        return self.asked.max_tokens - self.num_output

    @property
    def output(self) -> np.ndarray:
        return self.tokens[self.num_prompt : self.num_known]

    def append(self, token: int) -> None:
        """Make one more token known."""
        self.tokens[self.num_known] = token
        self.num_known += 1

    def ending(self) -> Reason:
        """Say whether the tokens known so far end the sequence, and by what."""
        if self.num_output and int(self.tokens[self.num_known - 1]) in self.asked.stop_token_ids:
            return Reason.STOP_TOKEN
        return Reason.LENGTH if self.max_tokens_left <= 0 else Reason.GOING_ON

    def extend_names(self, block_size: int) -> None:
        """Bring `names` up to the known tokens."""
        extend_names(self.names, self.tokens[: self.num_known], block_size, self.asked.salt)


def check_asked(
    asked: Admit,
    vocab_size: int,
    max_seq_tokens: int,
) -> None:
    """Raise SequenceError for what the engine cannot run, whatever room there is."""
    num_prompt, rest = divmod(len(asked.prompt), 4)
    num_output, output_rest = divmod(len(asked.output), 4)
    if rest or output_rest or num_prompt == 0:
        raise SequenceError(
            "bad_tokens",
            f"prompt of {len(asked.prompt)} bytes and output of {len(asked.output)}: both must "
            "be whole int32 token ids and the prompt must have at least one",
        )
    tokens = np.frombuffer(asked.prompt + asked.output, "<i4")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise SequenceError(
            "bad_tokens",
            f"token ids from {tokens.min()} to {tokens.max()} in prompt and output; this model "
            f"has 0 to {vocab_size - 1}: tokenise with the model's own tokenizer",
        )
    if asked.max_tokens < 1 or num_output > asked.max_tokens:
        raise SequenceError(
            "bad_max_tokens",
            f"max_tokens is {asked.max_tokens} with {num_output} output tokens already there: "
            "ask for at least one token, and for no fewer than are there",
        )
    if num_prompt + asked.max_tokens > max_seq_tokens:
        raise SequenceError(
            "too_long",
            f"prompt has {num_prompt} tokens and max_tokens is {asked.max_tokens}; this worker "
            f"holds {max_seq_tokens} (max_seq_tokens): shorten one of them",
        )
