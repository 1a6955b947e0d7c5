"""admission.py: the predicted peak against a simulation of what it predicts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.engine.admission import HISTORY, LengthHistory, predict_peak_tokens

SEQS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12)


def simulate_peak(seqs, block_size):
    """Let every sequence grow by a token a step, and end when its tokens are made."""
    return max(
        sum(-(-(context + t) // block_size) * block_size for context, left in seqs if left >= t)
        for t in range(max(left for _, left in seqs) + 1)
    )


@given(SEQS, st.integers(1, 16))
def test_the_peak_is_that_of_a_simulation_up_to_rounding_of_blocks(seqs, block_size):
    contexts, remaining = np.array(seqs).T
    peak = predict_peak_tokens(contexts, remaining, block_size)
    simulated = simulate_peak(seqs, block_size)
    assert simulated <= peak <= simulated + len(seqs) * (block_size - 1)
    if block_size == 1:
        assert peak == simulated


@given(SEQS, st.tuples(st.integers(1, 60), st.integers(1, 60)))
def test_invariant_2_one_more_sequence_never_lowers_the_peak(seqs, more):
    def peak(rows):
        return predict_peak_tokens(*np.array(rows).T, 8)

    assert peak([*seqs, more]) >= peak(seqs)


#: of a sequence: the prompt it begins with, blocks of that, tokens of its own, tokens left.
SHARERS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 30), st.integers(1, 60)),
    min_size=1,
    max_size=12,
)


def held_tokens(seqs, t, block_size):
    """Return what those alive after t steps hold when a block stands in the pool once."""
    alive = [seq for seq in seqs if seq[3] >= t]
    prefixes = {(group, i) for group, num_blocks, _, _ in alive for i in range(num_blocks)}
    own_blocks = sum(-(-(own + t) // block_size) for _, _, own, _ in alive)
    return (len(prefixes) + own_blocks) * block_size


@given(SHARERS, st.integers(1, 16))
def test_invariant_1_shared_blocks_count_once_until_the_last_owner_ends(seqs, block_size):
    owners = Counter((group, i) for group, num_blocks, _, _ in seqs for i in range(num_blocks))
    is_shared = {block for block, count in owners.items() if count > 1}
    shared = [sum((group, i) in is_shared for i in range(n)) for group, n, _, _ in seqs]
    contexts = np.array([num_blocks * block_size + own for _, num_blocks, own, _ in seqs])
    remaining = np.array([left for *_, left in seqs])
    alone = predict_peak_tokens(contexts, remaining, block_size)
    peak = predict_peak_tokens(contexts, remaining, block_size, np.array(shared), len(is_shared))
    simulated = max(held_tokens(seqs, t, block_size) for t in range(remaining.max() + 1))
    assert simulated <= peak <= alone
    if len(set(remaining.tolist())) == 1:  # all end together: nothing is on the safe side
        assert peak <= simulated + len(seqs) * (block_size - 1)


def test_nothing_needs_nothing():
    assert predict_peak_tokens(np.array([]), np.array([]), 8) == 0


def test_while_nothing_is_known_everything_allowed_is_expected():
    lengths = LengthHistory()
    left = lengths.predict_remaining(np.array([0, 5]), np.array([100, 7]))
    assert left.tolist() == [100, 7]
    assert lengths.mean is None


def test_the_expected_rest_is_the_mean_of_those_that_got_further():
    lengths = LengthHistory()
    for length in (10, 20, 60):
        lengths.add(length)
    made = np.array([0, 10, 19, 20, 59, 60, 0])
    allowed = np.array([500, 500, 500, 500, 500, 500, 3])
    # Beyond 60 nothing is known, so all that is allowed; never more than allowed.
    assert lengths.predict_remaining(made, allowed).tolist() == [30, 30, 21, 40, 1, 500, 3]
    assert lengths.mean == 30


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(0, 60), st.integers(1, 60))
def test_invariant_1_what_is_left_is_at_least_one_and_at_most_what_is_allowed(known, made, left):
    lengths = LengthHistory()
    for length in known:
        lengths.add(length)
    assert 1 <= lengths.predict_remaining(np.array([made]), np.array([left]))[0] <= left


def test_old_lengths_are_forgotten():
    lengths = LengthHistory()
    for _ in range(HISTORY):
        lengths.add(1000)
    for _ in range(HISTORY):
        lengths.add(10)
    assert lengths.mean == pytest.approx(10)
