"""Totals of the beat: growing over engines, means of exactly the frames since the beat before."""

import numpy as np
import pytest

from headrace.worker.frames import ENTRY, StepFrame, StepStats
from headrace.worker.totals import EngineTotals


def frame(*tokens: int, **stats: int) -> StepFrame:
    entries = np.zeros(len(tokens), ENTRY)
    entries["token"] = tokens
    return StepFrame(StepStats(**stats), entries, [])


def test_invariant_2_means_are_of_the_frames_since_the_beat_before():
    totals = EngineTotals()
    totals.step(frame(5, 6, step_us=1_000, num_decodes=2))
    totals.step(frame(5, -1, step_us=3_000, num_decodes=1))  # -1: an end without a token
    first = totals.since_last()
    assert (first.step_us, first.batch, first.tokens_total) == (2_000, 1.5, 3)
    assert first.tokens_per_s > 0
    second = totals.since_last()
    assert (second.step_us, second.batch, second.tokens_per_s) == (0, 0.0, 0.0)
    assert second.tokens_total == 3


def test_a_frame_of_ends_alone_is_no_step():
    totals = EngineTotals()
    totals.step(frame(5, step_us=4_000, num_decodes=1))
    totals.step(frame(-1))
    assert totals.since_last().step_us == 4_000


def test_invariant_1_counts_of_a_dead_engine_are_kept():
    totals = EngineTotals()
    totals.opened()
    totals.step(frame(prefill_tokens=30, prefix_hit_tokens_total=10, num_preempted_total=2))
    totals.step(frame(prefill_tokens=10, prefix_hit_tokens_total=15, num_preempted_total=3))
    totals.opened()  # the next engine counts from zero
    now = totals.since_last()
    assert (now.prefix_hit_tokens_total, now.prompt_tokens_total) == (15, 55)
    totals.step(frame(prefill_tokens=5, prefix_hit_tokens_total=1, num_preempted_total=1))
    now = totals.since_last()
    assert (now.prefix_hit_tokens_total, now.prompt_tokens_total) == (16, 61)
    assert now.num_preempted == 4
    assert now.prefix_hit_tokens_total / now.prompt_tokens_total == pytest.approx(0.262, abs=1e-3)
