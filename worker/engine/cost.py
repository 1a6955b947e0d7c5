"""What a step costs, learnt from the steps that have come back, and how long a chunk may be.

    seconds(step) = c0 + c1 * decodes + c2 * prefill tokens + c3 * context tokens read,   c >= 0

The coefficients are those of least squares over past steps, older ones weighing less, under the
condition that none is negative: more work never counts as less time, however alike the steps were.
A prior of little weight stands for what has not been seen yet.

Steps with and without prefill are forgotten separately: an hour of decodes alone must not wipe out
what a prompt token costs. A step that took much longer than foreseen counts as `MAX_SURPRISE` times
the forecast: a stalled machine says nothing of the model, and a slower one is believed within a few
steps.

Invariants:
 1. `predict_s` never falls when any of its arguments grows.
 2. `chunk_tokens` is at least `MIN_CHUNK_TOKENS`: prefill always goes on.

Called by: scheduler.py (chunk_tokens), loop.py (learn).
"""

from __future__ import annotations

import numpy as np

#: tokens of prefill that a step may always take: fewer are hardly cheaper, weights are read once.
MIN_CHUNK_TOKENS = 64
#: weight that a step keeps with each later one of its kind: half of it is left after 140.
DECAY = 0.995
#: a step counts at most as this many times its forecast.
MAX_SURPRISE = 3.0
#: steps believed as they are, before there is a forecast to speak of.
NUM_BELIEVED = 4
#: steps after which the forecast is brought up to date though nobody asks for it.
SOLVE_STEPS = 16
#: units of the features: all are of the order of 1, and the solver converges in a few turns.
_SCALE = np.array([1.0, 128.0, 512.0, 65536.0])
#: seconds a unit before anything is known: a mid-size model on a GPU (20 us a prompt token).
_PRIOR = np.array([5e-3, 1e-3, 1e-2, 3e-3])
#: steps that the prior is worth.
PRIOR_WEIGHT = 0.01
#: turns of coordinate descent for one solution; it starts from the last one.
_NUM_TURNS = 24


class StepCost:
    """Predicts the seconds of a step."""

    def __init__(self) -> None:
        # Of each kind of step, without and with prefill: sums of x x' and of x * seconds.
        self._squares = np.zeros((2, 4, 4))
        self._products = np.zeros((2, 4))
        self._coefs = _PRIOR.copy()
        self._is_stale = False
        self._num_learnt = 0

    def learn(
        self, num_decodes: int, prefill_tokens: int, context_tokens: int, seconds: float
    ) -> None:
        """Take in what a step took."""
        features = np.array([1.0, num_decodes, prefill_tokens, context_tokens]) / _SCALE
        if self._num_learnt >= NUM_BELIEVED:
            if self._num_learnt % SOLVE_STEPS == NUM_BELIEVED:
                self._solve()
            seconds = min(seconds, MAX_SURPRISE * float(features @ self._coefs))
        kind = int(prefill_tokens > 0)
        # As if the variance grew with the time: long steps do not outweigh all others, nor fast
        # ones of before a machine that has become slow.
        weight = 1.0 / max(seconds, 1e-6)
        self._squares[kind] = DECAY * self._squares[kind] + weight * np.outer(features, features)
        self._products[kind] = DECAY * self._products[kind] + weight * seconds * features
        self._num_learnt += 1
        self._is_stale = True

    def predict_s(self, num_decodes: int, prefill_tokens: int, context_tokens: int) -> float:
        """Return the seconds that a step is expected to take."""
        features = np.array([1.0, num_decodes, prefill_tokens, context_tokens]) / _SCALE
        return float(features @ self._solve())

    def chunk_tokens(self, num_decodes: int, context_tokens: int, target_s: float) -> int:
        """Return how many prefill tokens a step with these decodes may have to meet the target."""
        left_s = target_s - self.predict_s(num_decodes, 0, context_tokens)
        token_s = float(self._solve()[2]) / _SCALE[2]
        # Where tokens seem to be free, the ceiling of the step is the only one.
        affordable = left_s / token_s if token_s > 1e-12 else np.inf
        return int(min(max(affordable, MIN_CHUNK_TOKENS), 1 << 30))

    def _solve(self) -> np.ndarray:  # [4] seconds a unit
        """Bring the coefficients up to date by coordinate descent within c >= 0."""
        if not self._is_stale:
            return self._coefs
        self._is_stale = False
        squares, products = self._squares.sum(0), self._products.sum(0)
        # The prior: an observation of each coefficient alone, of little weight.
        ridge = np.diag(PRIOR_WEIGHT / _PRIOR)
        squares, products = squares + ridge, products + ridge @ _PRIOR
        coefs, rows = self._coefs.tolist(), squares.tolist()
        for _ in range(_NUM_TURNS):
            for i, row in enumerate(rows):
                others = sum(row[j] * coefs[j] for j in range(4) if j != i)
                coefs[i] = max(0.0, (float(products[i]) - others) / row[i])
        self._coefs = np.array(coefs)
        return self._coefs
