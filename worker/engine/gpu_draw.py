"""Drawing tokens from logits on a GPU, for the steps in which some row needs them.

    lm_head -> log-probabilities of the raw logits -> penalties and bias -> filters and draw

A step does what its neediest row needs; within it each kernel returns at once for rows that ask for
nothing of it. Log-probabilities of a step are copied to pinned memory behind it.

Invariants:
 1. A row's token depends on its own logits, tokens and parameters only.
 2. Entry k of the pinned log-probabilities is that of the k-th step, modulo the ring's length.

Owned by gpu_model.py.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

from headrace.kernels import step as layout
from headrace.kernels.logprobs import (
    MAX_LOGPROBS,
    chosen_logprobs,
    logprobs_rows,
    logprobs_work,
)
from headrace.kernels.penalise import penalise_rows
from headrace.kernels.sample import sample, sample_work
from headrace.worker.engine.gpu_state import RING_STEPS, DeviceState


class Need(IntEnum):
    """What a sequence's sampling needs of a step."""

    DRAW = 0  # greedy or drawn from the whole vocabulary: logits are never written
    LOGITS = 1  # filters, penalties or a bias
    LOGPROBS = 2  # the same, and log-probabilities told


class LogprobBuffers:
    """What the last step found, and pinned copies of the last steps'."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        shape = (num_rows, MAX_LOGPROBS)
        is_pinned = device.type == "cuda"
        self.chosen = torch.zeros(num_rows, device=device)
        self.ids = torch.zeros(shape, dtype=torch.int32, device=device)
        self.values = torch.zeros(shape, device=device)
        self._kept = [
            [torch.zeros(x.shape, dtype=x.dtype, pin_memory=is_pinned) for x in self._made]
            for _ in range(RING_STEPS)
        ]

    @property
    def _made(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.chosen, self.ids, self.values

    def keep(self, step: int) -> None:
        """Copy what the last step found to the host, behind it."""
        for kept, made in zip(self._kept[step % RING_STEPS], self._made, strict=True):
            kept.copy_(made, non_blocking=True)

    def of(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a collected step's (chosen: [num_rows], ids and values: [num_rows, most])."""
        chosen, ids, values = (kept.numpy() for kept in self._kept[step % RING_STEPS])
        return chosen, ids, values


class LogitsDraw:
    """lm_head's product in full, and everything that reads it."""

    def __init__(self, lm_head: torch.Tensor, state: DeviceState) -> None:
        self._lm_head, self._state = lm_head, state
        num_rows, vocab, device = state.num_slots, lm_head.shape[0], state.device
        self.logprobs = LogprobBuffers(num_rows, device)
        self._logprobs_work = logprobs_work(num_rows, vocab, device)
        self._sample_work = sample_work(num_rows, vocab, device)

    def draw(
        self,
        hidden: torch.Tensor,  # [num_due, hidden]
        slots: torch.Tensor,  # [num_due] int32, -1 = padding
        need: Need,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # tokens and is_finite: [num_due] int32
        """Draw a token a row."""
        state, num_due = self._state, hidden.shape[0]
        logits = self.logits(hidden)
        column, number = state.column, state.float_column
        found = self.logprobs
        listed = (found.ids[:num_due], found.values[:num_due])
        num_logprobs = column(layout.NUM_LOGPROBS)
        if need is Need.LOGPROBS:
            logprobs_rows(logits, slots, num_logprobs, self._logprobs_work, *listed)
        penalise_rows(
            logits, slots, number(layout.PRESENCE), number(layout.FREQUENCY),
            number(layout.REPETITION), state.counts, column(layout.NUM_BIAS), state.bias_ids,
            state.bias_values,
        )  # fmt: skip
        tokens, is_finite = sample(
            logits, slots, number(layout.TEMPERATURE), column(layout.TOP_K), number(layout.TOP_P),
            number(layout.MIN_P), state.seeds, column(layout.NUM_OUTPUT), self._sample_work,
        )  # fmt: skip
        if need is Need.LOGPROBS:
            chosen_logprobs(
                hidden, self._lm_head, slots, num_logprobs, tokens, self._logprobs_work, *listed,
                found.chosen[:num_due],
            )  # fmt: skip
        return tokens, is_finite

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:  # [num_due, vocab] fp32
        """Multiply, keeping fp32: bf16 has steps of 0.125 where logits are, and so makes ties."""
        if hidden.dtype is torch.float32 or not hidden.is_cuda:
            return torch.mm(hidden.float(), self._lm_head.t().float())
        return torch.mm(hidden, self._lm_head.t(), out_dtype=torch.float32)
