"""What the GPU knows of the running sequences, and how the host tells it what has changed.

The device goes on from step to step by itself (kernels/step.py); the host sends only differences:
a sequence that got a slot, a block that a table got, the slots of a step when they are others than
before, a chunk of a prompt. All of it goes through pinned memory that is not written again before
the step that reads it has been collected.

Invariants:
 1. What is sent before a step is there when the step runs: one stream orders everything.
 2. In a step in which nothing changed nothing is sent.
 3. A slot given anew is written whole before its first step: nothing of the sequence before it
    is left that a kernel reads.

Owned by gpu_runner.py.
"""

from __future__ import annotations

import numpy as np
import torch

from headrace.kernels import step as layout
from headrace.kernels.penalise import count_prompt
from headrace.worker.engine.sampling import has_penalties, signed_seed
from headrace.worker.engine.sequence import Sequence

#: words sent at once; more go in several pieces. A new sequence is about 40, a block is one.
UPDATES = 1 << 15
#: what `num_updates` is rounded up to, so that the kernel is compiled for one kind of number.
UPDATE_STEP = 16
#: steps whose results the ring holds; more than can be in flight.
RING_STEPS = 8


class DeviceState:
    """Tables by slot, the inputs of a step, the ring of its results."""

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        max_rows: int,
        vocab_size: int,
        device: torch.device,
        depth: int,
    ) -> None:
        self.num_slots, self.max_rows, self.device = num_slots, max_rows, device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.words = zeros(num_slots, layout.state_width(max_blocks))
        self.counts = zeros(num_slots, vocab_size, dtype=torch.int16)
        self.counter = zeros(1)
        self.ring = _pinned((RING_STEPS, 2, num_slots), device)
        # Inputs of a mixed step, and the slots of a step of decodes alone, which stay.
        self.row_slots, self.row_tokens, self.row_positions = (zeros(max_rows) for _ in range(3))
        self.due_rows, self.due_slots, self.decode_slots = (zeros(num_slots) for _ in range(3))
        self.chunk_starts = zeros(num_slots + 1)  # cu_q_lens: rows where each chunk begins, the end
        self.chunk_lens, self.chunk_slots = zeros(num_slots), zeros(num_slots)
        # What prepare_step makes of them.
        self.tokens, self.positions, self.kv_slots = (zeros(max_rows) for _ in range(3))
        self.decode_lens = zeros(num_slots)
        self._updates = zeros(2, UPDATES)
        self._places: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._sent_decodes = np.empty(0, np.int32)
        words = 2 * UPDATES + 3 * max_rows + 6 * num_slots + 64
        self._staging = _Staging(words, depth + 2, device)

    def reset(self) -> None:
        """Forget everything: no slot lives, no row is computed."""
        for tensor in (self.words, self.counts, self.counter, self.ring, self.chunk_starts):
            tensor.zero_()
        for tensor in (self.chunk_lens, self.chunk_slots, self.row_positions):
            tensor.zero_()
        for tensor in (self.row_slots, self.row_tokens, self.due_rows, self.due_slots):
            tensor.fill_(-1)
        self.decode_slots.fill_(-1)
        self._sent_decodes = np.empty(0, np.int32)

    # -- columns, as the kernels of sampling want them ----------------------------------------

    def column(self, index: int) -> torch.Tensor:  # [num_slots] int32
        return self.words[:, index]

    def float_column(self, index: int) -> torch.Tensor:  # [num_slots] fp32
        return self.words.view(torch.float32)[:, index]

    @property
    def seeds(self) -> torch.Tensor:  # [num_slots, 2] int32, low and high words
        return self.words[:, layout.SEED : layout.SEED + 2]

    @property
    def bias_ids(self) -> torch.Tensor:  # [num_slots, MAX_BIAS] int32
        return self.words[:, layout.BIAS_IDS : layout.BIAS_IDS + layout.MAX_BIAS]

    @property
    def bias_values(self) -> torch.Tensor:  # [num_slots, MAX_BIAS] fp32
        start = layout.BIAS_VALUES
        return self.words.view(torch.float32)[:, start : start + layout.MAX_BIAS]

    @property
    def tables(self) -> torch.Tensor:  # [num_slots, max_blocks] int32
        return self.words[:, layout.TABLE :]

    # -- differences ----------------------------------------------------------------------------

    def start(self, seq: Sequence) -> None:
        """Write all of a sequence's slot but its table; all its tokens' values are known."""
        scalars, bias = _slot_words(seq)
        base = seq.slot * self.words.shape[1]
        self._places.append(np.arange(len(scalars)) + base)
        self._values.append(scalars)
        for start, values in zip((layout.BIAS_IDS, layout.BIAS_VALUES), bias, strict=True):
            self._places.append(np.arange(len(values)) + base + start)
            self._values.append(values)
        if has_penalties(seq.asked.params):
            known = torch.from_numpy(seq.tokens[: seq.num_received].astype(np.int64)).to(
                self.device
            )
            count_prompt(self.counts, seq.slot, known[: seq.num_prompt], known[seq.num_prompt :])

    def set_blocks(self, new_blocks: np.ndarray) -> None:
        """Put blocks into tables: [n, 3] int32 of slot, index in the table, block."""
        if not len(new_blocks):
            return
        slots, indexes, blocks = new_blocks.T.astype(np.int64)
        self._places.append(slots * self.words.shape[1] + layout.TABLE + indexes)
        self._values.append(blocks.astype(np.int32))

    def begin(self) -> None:
        """Turn to the next step's pinned memory, and send the differences gathered for it."""
        self._staging.turn()
        if not self._places:
            return
        places = np.concatenate(self._places).astype(np.int32)
        values = np.concatenate(self._values)
        if len(self._places) > 1:
            # A slot given twice between two steps: what was said last holds.
            places, last = np.unique(places[::-1], return_index=True)
            values = values[::-1][last]
        self._places, self._values = [], []
        for start in range(0, len(places), UPDATES):
            if start:
                self._staging.turn(wait=True)
            self._send_updates(places[start : start + UPDATES], values[start : start + UPDATES])

    def _send_updates(self, places: np.ndarray, values: np.ndarray) -> None:
        # Filled up with copies of the last word: it is only written again.
        rest = (0, -len(places) % UPDATE_STEP)
        for row, numbers in enumerate((places, values)):
            self.send(np.pad(numbers, rest, mode="edge"), self._updates[row])
        layout.write_words(self.words, self._updates, len(places) + rest[1])

    def send_decodes(self, slots: np.ndarray, bucket: int) -> None:
        """Name the slots of a step of decodes alone, unless they are those of the last one."""
        padded = _padded(slots, bucket)
        if not np.array_equal(padded, self._sent_decodes):
            self.send(padded, self.decode_slots)
            self._sent_decodes = padded

    def send(self, values: np.ndarray, to: torch.Tensor) -> None:
        """Copy int32 numbers to the head of one of the inputs."""
        self._staging.send(values, to[: len(values)])

    def send_padded(self, values: np.ndarray, to: torch.Tensor) -> None:
        """Copy int32 numbers to an input, and fill the rest of it with -1."""
        self.send(_padded(values, len(to)), to)


class _Staging:
    """Pinned memory in as many sets as steps may read at once, used in turn."""

    def __init__(self, words: int, num_sets: int, device: torch.device) -> None:
        self._sets = [_pinned((words,), device) for _ in range(num_sets)]
        self._device = device
        self._turn = self._used = 0

    def turn(self, *, wait: bool = False) -> None:
        """Go on to the next set. Within one step: once what was sent has arrived."""
        if wait and self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._turn = (self._turn + 1) % len(self._sets)
        self._used = 0

    def send(self, values: np.ndarray, to: torch.Tensor) -> None:
        pinned = self._sets[self._turn][self._used : self._used + len(values)]
        self._used += len(values)
        pinned.numpy()[:] = values
        to.copy_(pinned, non_blocking=True)


def _slot_words(seq: Sequence) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Lay a sequence's parameters out: the leading columns, and ids and values of its bias."""
    params = seq.asked.params
    words = np.zeros(layout.STOPS + layout.MAX_STOPS, np.int32)
    floats = words.view(np.float32)
    stops = seq.asked.stop_token_ids
    # Its first row without a chunk is that of the last token it starts with. (num_known may already
    # count one that its first step is going to make.)
    words[layout.TOKEN] = seq.tokens[seq.num_received - 1]
    words[layout.CONTEXT] = seq.num_received - 1
    words[layout.NUM_OUTPUT] = seq.num_received - seq.num_prompt
    words[layout.MAX_OUTPUT] = seq.asked.max_tokens
    words[layout.ALIVE] = 1
    words[layout.NUM_STOPS] = len(stops)
    words[layout.STOPS : layout.STOPS + len(stops)] = stops
    floats[layout.TEMPERATURE] = params.temperature
    words[layout.TOP_K] = params.top_k
    words[layout.SEED : layout.SEED + 2] = np.array([signed_seed(params.seed)]).view(np.int32)
    floats[layout.TOP_P], floats[layout.MIN_P] = params.top_p, params.min_p
    floats[layout.PRESENCE] = params.presence_penalty
    floats[layout.FREQUENCY] = params.frequency_penalty
    floats[layout.REPETITION] = params.repetition_penalty
    words[layout.NUM_BIAS] = len(params.logit_bias)
    words[layout.NUM_LOGPROBS] = -1 if params.logprobs is None else params.logprobs
    ids = np.array(list(params.logit_bias), np.int32)
    values = np.array(list(params.logit_bias.values()), np.float32).view(np.int32)
    return words, (ids, values)


def _padded(values: np.ndarray, length: int) -> np.ndarray:  # [length] int32
    padded = np.full(length, -1, np.int32)
    padded[: len(values)] = values
    return padded


def _pinned(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
