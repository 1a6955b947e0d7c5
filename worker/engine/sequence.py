"""A sequence: the tokens of one attempt inside the engine, and how far they are computed.

Its tokens are the prompt followed by the output. Some are known and of these some have keys and
values in the pool; the engine does nothing but let the second catch up with the first. When it has,
the last token's logits give the next known token. So prompts, resumed outputs and recomputation
after a preemption are all the same: known tokens not yet computed.

    WAITING -> RUNNING  [scheduler.Scheduler.plan, which gives a slot and the first blocks]
    RUNNING -> WAITING  [scheduler.Scheduler.plan, preempting: slot and blocks are given up]
    WAITING | RUNNING -> ended, forgotten  [scheduler.Scheduler.retire]

A running sequence's counters and token values are in its slot (slots.py) and are read through the
properties here; a waiting or ended one has its own.

Invariants:
 1. num_prompt <= num_received <= num_known <= num_prompt + max_tokens.
 2. Known tokens never change; they only get more. A preempted sequence has received all of them.
 3. A waiting sequence holds no block and has nothing computed.
 4. `names` are those of leading full blocks of received tokens.

Called by: scheduler.py (owner of the bookkeeping), slots.py, flat.py and sampling.py (readers),
loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headrace.kernels.limits import MAX_STOPS
from headrace.worker.engine.prefix import extend_names
from headrace.worker.frames import Admit, Reason


class SequenceError(ValueError):
    """A sequence that cannot be run as asked; it fails alone. `code` goes to the courier."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Place:
    """A running sequence's slot, as views of the slot table's arrays: [1] int32 each."""

    slot: int
    num_known: np.ndarray
    num_received: np.ndarray
    num_computed: np.ndarray
    num_blocks: np.ndarray
    table: np.ndarray  # [max_blocks] int32


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; owned by the scheduler from `add` to `retire`."""

    asked: Admit
    arrival: int  # counts admissions; smaller is older
    tokens: np.ndarray  # [num_prompt + max_tokens] int32, the first num_received are valid
    num_prompt: int
    _num_received: int  # while it has no slot
    names: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when first run
    was_run: bool = False
    _place: Place | None = None  # None = waiting or ended

    @classmethod
    def from_admit(cls, asked: Admit, arrival: int) -> Sequence:
        """Build a sequence with the resumed output, if any, already known."""
        prompt = np.frombuffer(asked.prompt, "<i4")
        output = np.frombuffer(asked.output, "<i4")
        num_received = len(prompt) + len(output)
        tokens = np.empty(max(len(prompt) + asked.max_tokens, num_received), np.int32)
        tokens[:num_received] = np.concatenate((prompt, output))
        return cls(asked, arrival, tokens, len(prompt), num_received)

    @property
    def is_running(self) -> bool:
        return self._place is not None

    @property
    def slot(self) -> int:
        """Its slot; only while it runs."""
        assert self._place is not None, "a sequence that does not run has no slot"
        return self._place.slot

    @property
    def num_received(self) -> int:
        """Tokens whose values the host has."""
        return self._num_received if self._place is None else int(self._place.num_received[0])

    @property
    def num_known(self) -> int:
        """Tokens that exist; more than received while steps are in flight."""
        return self._num_received if self._place is None else int(self._place.num_known[0])

    @property
    def num_computed(self) -> int:
        return 0 if self._place is None else int(self._place.num_computed[0])

    @property
    def num_output(self) -> int:
        """Output tokens whose values the host has."""
        return self.num_received - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens still to be computed; 1 is a decode."""
        return self.num_known - self.num_computed

    @property
    def max_tokens_left(self) -> int:
        return self.asked.max_tokens - self.num_output

    @property
    def table(self) -> list[int]:
        """Blocks in order of position."""
        place = self._place
        return [] if place is None else place.table[: place.num_blocks[0]].tolist()

    @property
    def output(self) -> np.ndarray:
        return self.tokens[self.num_prompt : self.num_received]

    def move_in(self, place: Place, tokens: np.ndarray) -> None:
        """Have one's counters and values in a slot from now on; called by SlotTable.give."""
        self._place, self.tokens = place, tokens

    def move_out(self) -> None:
        """Take back what was received; called by SlotTable.take_back."""
        self._num_received, self.tokens = self.num_received, self.tokens.copy()
        self._place = None

    def ending(self) -> Reason:
        """Say whether the tokens of a resumed output end the sequence, and by what."""
        if self.num_output and int(self.tokens[self.num_received - 1]) in self.asked.stop_token_ids:
            return Reason.STOP_TOKEN
        return Reason.LENGTH if self.max_tokens_left <= 0 else Reason.GOING_ON

    def extend_names(self, block_size: int, num_tokens: int) -> None:
        """Bring `names` up to that many tokens, all of them received."""
        extend_names(self.names, self.tokens[:num_tokens], block_size, self.asked.salt)


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
    if len(asked.stop_token_ids) > MAX_STOPS:
        raise SequenceError(
            "bad_stop_tokens",
            f"{len(asked.stop_token_ids)} stop tokens asked; an engine tests for {MAX_STOPS}: name "
            "fewer in the request or in the model's generation_config.json",
        )
    if num_prompt + asked.max_tokens > max_seq_tokens:
        raise SequenceError(
            "too_long",
            f"prompt has {num_prompt} tokens and max_tokens is {asked.max_tokens}; this worker "
            f"holds {max_seq_tokens} (max_seq_tokens): shorten one of them",
        )
