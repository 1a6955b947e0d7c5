"""cost.py: what it learns from steps, what outliers do to it, and how long a chunk may be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.cost import MIN_CHUNK_TOKENS, StepCost


def seconds(num_decodes, prefill_tokens, context_tokens):
    """Say what the test's machine takes."""
    return 4e-3 + 2e-6 * num_decodes + 30e-6 * prefill_tokens + 15e-9 * context_tokens


def taught(num_steps=300, noise=0.02, seed=0):
    cost, random = StepCost(), np.random.default_rng(seed)
    for _ in range(num_steps):
        num_decodes = int(random.integers(1, 256))
        prefill_tokens = int(random.integers(64, 1024)) if random.random() < 0.3 else 0
        step = (num_decodes, prefill_tokens, num_decodes * int(random.integers(100, 2000)))
        cost.learn(*step, seconds(*step) * (1 + noise * random.standard_normal()))
    return cost


@pytest.mark.parametrize("step", [(1, 0, 500), (128, 0, 100_000), (64, 512, 60_000), (0, 800, 800)])
def test_it_foretells_what_it_has_seen(step):
    assert taught().predict_s(*step) == pytest.approx(seconds(*step), rel=0.1)


@pytest.mark.parametrize("target_s", [0.015, 0.03])
def test_a_step_with_the_chunk_it_allows_takes_the_target(target_s):
    num_tokens = taught().chunk_tokens(100, 80_000, target_s)
    assert seconds(100, num_tokens, 80_000) == pytest.approx(target_s, rel=0.1)


def test_prefill_goes_on_where_decodes_alone_take_longer_than_the_target():
    assert taught().chunk_tokens(200, 300_000, 1e-3) == MIN_CHUNK_TOKENS


def test_it_begins_with_a_chunk_that_is_neither_tiny_nor_everything():
    assert 128 <= StepCost().chunk_tokens(32, 30_000, 0.03) <= 4096


def test_the_price_of_a_prompt_token_survives_hours_of_decodes():
    cost = taught()
    before = cost.chunk_tokens(100, 80_000, 0.02)
    for _ in range(20_000):
        cost.learn(100, 0, 80_000, seconds(100, 0, 80_000))
    assert cost.chunk_tokens(100, 80_000, 0.02) == pytest.approx(before, rel=0.1)


def test_a_stalled_step_changes_little_and_a_slower_machine_is_believed():
    cost = taught()
    step = (100, 0, 80_000)
    cost.learn(*step, 5.0)
    assert cost.predict_s(*step) == pytest.approx(seconds(*step), rel=0.1)
    for i in range(2000):
        slow = (100, 512 * (i % 2), 80_000)
        cost.learn(*slow, 10 * seconds(*slow))
    assert cost.predict_s(*step) == pytest.approx(10 * seconds(*step), rel=0.15)


STEPS = st.tuples(
    st.integers(0, 1024), st.integers(0, 8192), st.integers(0, 10**6), st.floats(0, 10)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=60), st.integers(0, 1024), st.integers(0, 10**6))
def test_invariant_1_more_work_never_takes_less_time(steps, num_decodes, context_tokens):
    cost = StepCost()
    for step in steps:
        cost.learn(*step)
    for less, more in (((0, 0, 0), (1, 0, 0)), ((0, 0, 0), (0, 9, 0)), ((0, 0, 0), (0, 0, 999))):
        assert 0 <= cost.predict_s(*less) <= cost.predict_s(*more)
    found = cost.chunk_tokens(num_decodes, context_tokens, 0.01)
    assert found >= MIN_CHUNK_TOKENS  # 2
    assert found >= cost.chunk_tokens(num_decodes, context_tokens, 0.005)
