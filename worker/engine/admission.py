"""How many tokens the pool will have to hold at its worst, if what is here goes on as expected.

A pool sized by the sum of all max_tokens runs nearly empty, as most outputs end early; one sized by
what is there now runs full in mid-decode and preempts. In between: predict each sequence's length,
and take the largest sum of contexts over all moments at which one of them is about to end.

    remaining_i = E[length | length > so far] - so far, of recently finished outputs; at most
                  max_tokens - so far, and exactly that while nothing is known
    peak        = max over i of  sum over j with remaining_j >= remaining_i of
                  (context_j + remaining_i), each rounded up to whole blocks

(Between two endings every context only grows, so the peak lies right before an ending.)
Blocks that several sequences share are there once, until the last of these ends. Of those alive at
a moment sum(shared_j) table entries are shared blocks, of which there are no more than `num_shared`
in all: the entries above that are counted twice at least, and taken off.

Invariants:
 1. The peak is at least what is held at present and at most the sum at max_tokens.
 2. One more sequence never lowers the peak.

Called by: scheduler.py.
"""

from __future__ import annotations

from collections import deque

import numpy as np

#: finished outputs remembered: enough for a mean, few enough to follow a change of workload.
HISTORY = 512


class LengthHistory:
    """Output lengths of recently finished sequences."""

    def __init__(self) -> None:
        self._lengths: deque[int] = deque(maxlen=HISTORY)
        self._is_stale = False  # the arrays below are of earlier lengths
        self._sorted = np.empty(0, np.int64)
        self._mean_from = np.empty(0)  # mean of the sorted lengths from each on

    def add(self, num_output: int) -> None:
        """Remember the length of an output that ended by itself or by its limit."""
        self._lengths.append(num_output)
        self._is_stale = True

    @property
    def mean(self) -> float | None:
        self._refresh()
        return float(self._mean_from[0]) if len(self._mean_from) else None

    def _refresh(self) -> None:
        """Sort once for all outputs that ended since: a batch may end in one step."""
        if not self._is_stale:
            return
        self._is_stale = False
        self._sorted = np.sort(np.fromiter(self._lengths, np.int64, len(self._lengths)))
        sums = np.cumsum(self._sorted[::-1])[::-1]
        self._mean_from = sums / np.arange(len(sums), 0, -1)

    def predict_remaining(
        self,
        num_output: np.ndarray,  # [num_seqs] tokens made so far
        max_left: np.ndarray,  # [num_seqs] tokens still allowed
    ) -> np.ndarray:  # [num_seqs] tokens still expected; 1 or more where any are allowed
        """Return the conditional mean of what is left, capped by what is allowed."""
        self._refresh()
        longer = np.searchsorted(self._sorted, num_output, side="right")
        is_known = longer < len(self._sorted)
        if not is_known.any():
            return max_left
        mean = self._mean_from[np.minimum(longer, len(self._sorted) - 1)]
        left = np.ceil(np.where(is_known, mean - num_output, max_left)).astype(np.int64)
        return np.minimum(left, max_left)


def predict_peak_tokens(
    contexts: np.ndarray,  # [num_seqs] tokens known
    remaining: np.ndarray,  # [num_seqs] tokens expected yet
    block_size: int,
    shared: np.ndarray | None = None,  # [num_seqs] blocks of each that others hold as well
    num_shared: int = 0,  # different ones among them, at most
) -> int:
    """Return the largest number of pool tokens held at once."""
    if not len(contexts):
        return 0
    order = np.argsort(-remaining)  # among equals any order gives the same maximum
    contexts, remaining = contexts[order], remaining[order]
    alive = np.arange(1, len(contexts) + 1)
    # Each may stand anywhere within its last block: a whole one less a token is the most it wastes.
    waste = alive * (block_size - 1)
    tokens = np.cumsum(contexts) + alive * remaining + waste
    if shared is not None:
        tokens -= np.maximum(np.cumsum(shared[order]) - num_shared, 0) * block_size
    return int(tokens.max())
