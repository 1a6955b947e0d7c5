"""sharing.py: prefixes are computed once, joined at once, and counted once."""

import numpy as np
import pytest

from headrace.worker.engine.batch import Plan


def distinct_blocks(scheduler):
    tables = [scheduler.table.table(slot) for slot in scheduler.table.used().tolist()]
    return len({block for table in tables for block in table})


def test_invariant_1_a_block_is_not_named_before_its_tokens_have_come(played):
    engine = played(block_size=4, depth=2)
    seq = engine.add(7, 9)
    for computed, named in ((7, 1), (8, 1), (9, 1), (10, 2)):
        engine.step()
        assert (seq.num_computed, engine.scheduler.table.num_named[seq.slot]) == (computed, named)


def test_invariant_1_the_last_block_of_a_stopped_sequence_is_not_named(played):
    # Its stop token is at the block's last place; the row that computes it is dead on a device.
    engine = played(block_size=4, depth=2, max_step_tokens=32)
    engine.add(7, 9)
    while engine.scheduler.has_work:
        engine.step(stop=lambda num_output: num_output == 1)
    again = engine.add(7, 9)
    assert engine.scheduler.pool.num_cached == 1
    engine.step()
    assert again.cached_tokens == 4


def test_a_prefix_is_computed_once_though_all_who_want_it_come_in_one_step(played):
    engine = played(block_size=4, max_step_tokens=64)
    seqs = [engine.add(9, 3, num_own=2) for _ in range(3)]
    other = engine.add(9, 3, salt=b"another tenant's")
    assert engine.step() == [(seqs[0], 11), (seqs[1], 3), (seqs[2], 3), (other, 9)]
    assert [seq.cached_tokens for seq in seqs] == [0, 8, 8]
    assert engine.scheduler.prefix_hit_tokens_total == 16
    engine.finish()


def test_a_whole_prompt_that_another_computes_in_the_same_step_leaves_a_decode(played):
    engine = played(block_size=4, max_step_tokens=64)
    first, second = engine.add(9, 3), engine.add(9, 3)
    assert engine.step() == [(second, 1), (first, 9)]
    assert second.table[:2] == first.table[:2]
    engine.finish()


def test_of_a_prompt_cut_by_the_budget_the_part_is_joined_that_is_there_after_the_step(played):
    engine = played(block_size=4, max_step_tokens=16, num_blocks=32)
    first, second = engine.add(30, 3), engine.add(30, 3, num_own=3)
    assert [engine.step() for _ in range(2)] == [[(first, 16)], [(first, 14), (second, 2)]]
    assert second.cached_tokens == 28
    engine.finish()


def test_who_comes_together_gets_the_tokens_of_who_comes_alone(harness):
    rng = np.random.default_rng(5)
    shared, tails = rng.integers(10, 300, 13).tolist(), rng.integers(10, 300, (4, 3)).tolist()
    prompts = [shared + tail for tail in tails] + [shared]
    together = harness()
    seqs = [together.add(prompt, 6) for prompt in prompts]
    together.step()
    assert [seq.cached_tokens for seq in seqs] == [0, 12, 12, 12, 12]
    together.finish()
    for seq, prompt in zip(seqs, prompts, strict=True):
        alone = harness()
        expected = alone.add(prompt, 6)
        alone.finish()
        assert seq.output.tolist() == expected.output.tolist()


def test_invariant_1_nothing_leaves_a_plan_that_others_rely_on(played):
    engine = played(num_blocks=11, block_size=4, max_step_tokens=16)
    batch = engine.add(21, 3, is_batch=True)
    engine.step()
    joins, urgent = engine.add(20, 3, num_own=1), engine.add(8, 12, first_token=900)
    # There is room for the urgent one if the batch one goes, but the other reads what it computes.
    assert engine.step() == [(joins, 1), (batch, 5)]
    assert joins.cached_tokens == 20
    assert engine.scheduler.num_preempted_total == 0
    assert (urgent, 8) in engine.step()
    assert engine.scheduler.num_preempted_total == 1
    assert not batch.is_running
    engine.finish()
    firm = Plan(np.empty(0, np.int32), 8, is_firm=True)
    with pytest.raises(AssertionError, match="may rely on"):
        firm.drop(0)


def test_what_was_taken_out_of_a_plan_is_joined_by_nobody(played):
    engine = played(num_blocks=18, block_size=4, max_step_tokens=32)
    batch = engine.add(37, 24, is_batch=True)
    engine.step()
    urgent, similar = engine.add(12, 12, first_token=900), engine.add(37, 1, num_own=1)
    # The batch one's last chunk is planned, looked at for the urgent one, and dropped for it.
    assert engine.step() == [(urgent, 12), (similar, 6)]
    assert (batch.is_running, similar.cached_tokens) == (False, 32)
    engine.finish()


def test_invariant_2_blocks_count_as_shared_from_the_second_owner_to_the_last_but_one(played):
    engine = played(num_blocks=64, block_size=4, max_step_tokens=64)
    scheduler = engine.scheduler
    long, short = engine.add(17, 9), engine.add(9, 9, num_own=1)
    engine.step()
    late = engine.add(13, 9, num_own=1)
    engine.step()
    slots = [long.slot, short.slot, late.slot]
    assert scheduler.table.num_shared[slots].tolist() == [3, 2, 3]
    assert scheduler.pool.num_shared == 3
    scheduler.retire(long, is_finished=False)
    scheduler.check()
    assert scheduler.table.num_shared[slots[1:]].tolist() == [2, 2]
    scheduler.retire(short, is_finished=False)
    scheduler.check()
    assert (scheduler.table.num_shared.sum(), scheduler.pool.num_shared) == (0, 0)
    engine.in_flight.clear()


def test_sequences_that_share_are_admitted_by_the_blocks_they_hold_together(played):
    """The benchmark's workload `shared`, scaled down: a quarter of the room for its tables."""
    num_seqs, num_prefixes, num_output, budget = 64, 4, 16, 256
    engine = played(num_blocks=300, block_size=8, max_num_seqs=128, max_step_tokens=budget)
    for i in range(num_seqs):
        engine.add(128, num_output, first_token=200 * (i % num_prefixes + 1), num_own=4)
    needed = num_prefixes * 16 + num_seqs * 3
    assert needed < 300 < num_seqs * 19 / 4
    steps, num_held = [], 0
    while engine.scheduler.has_work:
        steps.append(sum(num_tokens for _, num_tokens in engine.step()))
        num_held = max(num_held, distinct_blocks(engine.scheduler))
    first_decodes = num_seqs * (num_output - 1)
    assert sum(steps) == num_prefixes * 128 + num_seqs * 4 + first_decodes  # nothing twice
    assert num_held <= needed
    assert engine.scheduler.num_preempted_total == 0
    # All are admitted as fast as the budget allows, so no step before the last one with a prompt
    # is less than full; then all decode.
    assert steps[:3] == [budget] * 3
    assert len(steps) <= 20


def test_the_room_left_counts_shared_blocks_once(played):
    def room_tokens(first_tokens):
        engine = played(num_blocks=128, block_size=4, max_step_tokens=256)
        for first_token in first_tokens:
            engine.add(40, 30, num_own=1, first_token=first_token)
        engine.step()
        return engine.scheduler.room_tokens()

    assert room_tokens([100] * 4) == room_tokens([100, 200, 300, 400]) + 3 * 40


def test_with_lengths_expected_a_prefix_counts_until_its_last_owner_is_to_end(played):
    """Three prompts of 16 blocks that share 15, in a pool that holds them so and not more."""
    engine = played(num_blocks=26, block_size=4, max_step_tokens=128)
    for _ in range(20):
        engine.scheduler.lengths.add(4)
    for _ in range(3):
        engine.add(60, 40, num_own=2)
    stranger = engine.add(30, 8, first_token=700)
    engine.step()
    assert engine.scheduler.num_running == 3
    assert not stranger.is_running
    engine.finish()
