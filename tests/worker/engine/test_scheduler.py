"""scheduler.py: order, budget, admission and preemption; the model is played by the test."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from headrace.tests.worker.engine.played import Played
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence import SequenceError


def expect_lengths(scheduler, length):
    """Make the scheduler expect outputs of this length."""
    for _ in range(20):
        scheduler.lengths.add(length)


def test_a_prompt_is_cut_into_chunks_of_the_budget(played):
    engine = played(max_step_tokens=16)
    seq = engine.add(40, 2)
    assert [engine.step() for _ in range(4)] == [[(seq, 16)], [(seq, 16)], [(seq, 8)], [(seq, 1)]]
    assert engine.ended == [seq]


def test_decodes_go_first_and_chunks_fill_what_is_left(played):
    engine = played(max_step_tokens=16, num_blocks=64)
    short = [engine.add(3, 9) for _ in range(3)]
    engine.step()
    long = engine.add(30, 2)
    assert engine.step() == [*((seq, 1) for seq in short), (long, 13)]
    assert engine.step() == [*((seq, 1) for seq in short), (long, 13)]
    assert engine.step() == [*((seq, 1) for seq in short), (long, 4)]


def test_interactive_goes_before_batch_and_each_class_by_arrival(played):
    engine = played(max_num_seqs=1, num_blocks=64)
    batch = [engine.add(3, 1, is_batch=True) for _ in range(2)]
    interactive = [engine.add(3, 1) for _ in range(2)]
    engine.finish()
    assert engine.ended == [*interactive, *batch]


def test_a_waiting_sequence_is_not_overtaken_by_one_that_would_fit(played):
    engine = played(num_blocks=8, block_size=4)
    running = engine.add(8, 12)
    engine.step()
    large, small = engine.add(20, 8), engine.add(2, 1, first_token=500)
    started = []
    while engine.scheduler.has_work:
        started += [seq for seq, _ in engine.step() if seq not in started]
    assert started == [running, large, small]


def test_what_is_expected_to_end_early_is_admitted_though_it_might_not_fit(played):
    pessimist, optimist = played(num_blocks=8), played(num_blocks=8)
    expect_lengths(optimist.scheduler, 2)
    for engine in (pessimist, optimist):
        for i in range(3):
            engine.add(4, 20, first_token=100 * i)
        engine.step()
    assert pessimist.scheduler.num_running == 1
    assert optimist.scheduler.num_running == 3
    assert optimist.scheduler.room_tokens() > pessimist.scheduler.room_tokens()
    assert pessimist.scheduler.room_tokens() < 0  # those that wait are counted


def test_when_blocks_run_out_batch_gives_way_first_then_the_youngest(played):
    engine = played(num_blocks=8)
    expect_lengths(engine.scheduler, 1)
    old, batch, young = (
        engine.add(4, 24, first_token=100),
        engine.add(4, 24, first_token=200, is_batch=True),
        engine.add(4, 24, first_token=300),
    )
    order = []
    while engine.scheduler.has_work:
        before = [seq for seq in (old, batch, young) if seq.is_running]
        engine.step()
        for seq in (old, batch, young):
            if seq in before and not seq.is_running and seq not in engine.ended:
                order.append(seq)
    assert order[:2] == [batch, young]
    assert old not in order
    assert engine.scheduler.num_preempted_total == len(order)
    assert all(seq.output.tolist() == list(range(1, 25)) for seq in (old, batch, young))


def test_interactive_work_that_does_not_fit_makes_batch_wait_again(played):
    engine = played(num_blocks=8, max_num_seqs=4)
    batch = [engine.add(4, 8, first_token=100 * i, is_batch=True) for i in range(2)]
    engine.step()
    assert engine.scheduler.num_running == 2
    urgent = engine.add(9, 10, first_token=700)
    assert urgent in [seq for seq, _ in engine.step()]
    assert engine.scheduler.num_preempted_total >= 1
    engine.finish()
    assert {id(seq) for seq in engine.ended} == {id(seq) for seq in (*batch, urgent)}


def test_interactive_work_takes_the_place_of_batch_when_all_places_are_taken(played):
    engine = played(num_blocks=64, max_num_seqs=2)
    for i in range(2):
        engine.add(4, 8, first_token=100 * i, is_batch=True)
    engine.step()
    urgent = engine.add(4, 8)
    assert urgent in [seq for seq, _ in engine.step()]
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 1)


def test_batch_is_not_preempted_where_it_would_not_help(played):
    engine = played(num_blocks=8)
    running = engine.add(8, 16)
    batch = engine.add(4, 1, first_token=400, is_batch=True)
    engine.step()
    engine.add(12, 16, first_token=700)
    engine.step()
    assert engine.scheduler.num_preempted_total == 0
    assert running.is_running
    assert batch in engine.ended or batch.is_running


def test_what_the_whole_pool_cannot_hold_is_refused_alone(played):
    engine = played(num_blocks=4, block_size=4)
    kept = engine.add(8, 8)
    with pytest.raises(SequenceError, match="whole KV pool holds 16") as refused:
        engine.add(9, 8)
    assert refused.value.code == "never_fits"
    engine.finish()
    assert engine.ended == [kept]


def test_a_shared_prefix_is_computed_once_and_only_within_a_tenant(played):
    engine = played(num_blocks=32, block_size=4, max_step_tokens=64)
    for salt, cached in ((b"one", 0), (b"one", 8), (b"two", 0)):
        seq = engine.add(11, 1, salt=salt)
        assert engine.step() == [(seq, 11 - cached)]
        assert seq.cached_tokens == cached
    assert engine.scheduler.prefix_hit_tokens_total == 8


def test_a_retired_sequence_leaves_its_place_running_or_waiting(played):
    engine = played(max_num_seqs=1)
    running, waiting = engine.add(4, 4), engine.add(4, 4)
    engine.step()
    for seq in (waiting, running):
        assert engine.scheduler.find(seq.asked.seq_id) is seq
        engine.scheduler.retire(seq, is_finished=False)
        assert engine.scheduler.find(seq.asked.seq_id) is None
    assert not engine.scheduler.has_work
    assert engine.scheduler.lengths.mean is None
    engine.scheduler.check()


def test_a_step_without_room_for_every_sequence_is_refused():
    with pytest.raises(ValueError, match="raise max_step_tokens"):
        Scheduler(KVPool(4, 4), max_num_seqs=8, max_step_tokens=7)
    with pytest.raises(ValueError, match="target of 0 or more"):
        Scheduler(KVPool(4, 4), max_num_seqs=8, max_step_tokens=8, target_step_s=-1.0)


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_are_planned_before_the_tokens_of_the_last_ones_are_there(depth, played):
    engine = played(depth=depth)
    seq = engine.add(5, 9)
    for i in range(1 + depth):
        assert engine.step() == [(seq, 5 if i == 0 else 1)]
    assert (seq.num_known, seq.num_received, seq.num_computed) == (6 + depth, 6, 5 + depth)
    engine.finish()
    assert seq.output.tolist() == list(range(1, 10))


def test_an_end_by_length_is_known_at_submit_and_one_by_a_stop_when_it_comes(played):
    engine = played(depth=2)
    by_length, by_stop = engine.add(5, 2), engine.add(5, 9, first_token=300)
    planned = [engine.step(stop=lambda num_output: num_output == 3) for _ in range(7)]
    counts = {seq: sum(seq is s for step in planned for s, _ in step) for seq in engine.ended}
    assert counts == {by_length: 2, by_stop: 5}  # a prompt, a decode; two rows too many
    assert by_stop.output.tolist() == [1, 2, 3]
    assert by_length.output.tolist() == [1, 2]


def test_a_slot_is_given_again_while_rows_of_its_last_stay_are_in_flight(played):
    engine = played(depth=2, max_num_seqs=1)
    first, second = engine.add(5, 9), engine.add(5, 3, first_token=300)
    stop = {first: 2}
    while not second.is_running:
        engine.step(stop=lambda num_output: num_output == stop.get(first))
    assert len(engine.in_flight) == 2
    stop.clear()
    engine.finish()
    assert (first.output.tolist(), second.output.tolist()) == ([1, 2], [1, 2, 3])


def test_a_preemption_waits_for_the_values_in_flight(played):
    engine = played(num_blocks=8, depth=2)
    expect_lengths(engine.scheduler, 1)
    seqs = [engine.add(4, 24, first_token=100 * i) for i in range(1, 4)]
    num_waits = 0
    while engine.scheduler.has_work:
        plan = engine.scheduler.plan()
        if plan is None:
            num_waits += 1
            assert engine.scheduler.table.has_values_in_flight
        engine.step()
    assert num_waits > 0
    assert engine.scheduler.num_preempted_total > 0
    assert all(seq.output.tolist() == list(range(1, 25)) for seq in seqs)


def test_chunks_are_as_long_as_the_target_of_interactive_streams_allows(played, admit):
    def chunk_beside(is_batch):
        engine = played(num_blocks=1000, max_step_tokens=2000)
        engine.scheduler = Scheduler(engine.scheduler.pool, 8, 2000, target_step_s=0.02)
        for i in range(200):  # 10 ms a step and 50 us a prompt token
            engine.scheduler.cost.learn(1, 100 * (i % 3), 20, 0.01 + 100 * (i % 3) * 50e-6)
        engine.add(3, 9, is_batch=is_batch)
        engine.step()
        engine.add(1500, 3, first_token=500, is_batch=is_batch)
        return engine.step()[1][1]

    assert 180 <= chunk_beside(is_batch=False) <= 220
    assert chunk_beside(is_batch=True) == 1500


class SchedulerMachine(RuleBasedStateMachine):
    """Any mix of sequences, cancels and early ends: checked after each, and all finish."""

    make_admit = None

    @initialize(
        num_blocks=st.integers(2, 14),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 20),
        expected=st.integers(0, 6),
        depth=st.integers(0, 2),
    )
    def start(self, num_blocks, max_num_seqs, budget, expected, depth):
        limits = {"max_num_seqs": max_num_seqs, "max_step_tokens": budget, "depth": depth}
        self.engine = Played(type(self).make_admit, num_blocks, 4, **limits)
        self.live = []
        for _ in range(expected):
            self.engine.scheduler.lengths.add(expected)

    @rule(
        num_prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        num_own=st.integers(0, 3),
        num_logged=st.sampled_from([0, 0, 1, 6]),
        first_token=st.sampled_from([100, 200]),
        salt=st.sampled_from([b"", b"", b"other"]),
        is_batch=st.booleans(),
    )
    def add(self, num_prompt, max_tokens, num_logged, **asked):
        num_logged = min(num_logged, max_tokens - 1)
        try:
            self.live.append(
                self.engine.add(num_prompt, max_tokens, num_logged=num_logged, **asked)
            )
        except SequenceError:
            fits = self.engine.scheduler.pool.num_tokens
            assert num_prompt + asked["num_own"] + max_tokens > fits

    @rule(stop_at=st.integers(1, 25))
    def step(self, stop_at):
        self.engine.step(stop=lambda num_output: num_output >= stop_at)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), is_spoiled=st.booleans())
    def remove(self, data, is_spoiled):
        seq = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        if seq in self.engine.ended:
            return
        if is_spoiled:
            self.engine.clear(self.engine.scheduler.retire_spoiled(seq))
        else:
            self.engine.scheduler.retire(seq, is_finished=False)

    @invariant()
    def holds(self):
        if hasattr(self, "engine"):
            self.engine.scheduler.check()

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.finish()
            assert all(seq in self.engine.ended for seq in self.live)
            pool = self.engine.scheduler.pool
            assert pool.num_free + pool.num_cached == pool.num_blocks
            for seq in self.live:
                assert seq.output.tolist() == list(range(1, seq.num_output + 1))


def test_any_mix_of_operations_keeps_the_invariants_and_finishes(admit):
    SchedulerMachine.make_admit = staticmethod(admit)
    run_state_machine_as_test(
        SchedulerMachine, settings=settings(max_examples=60, deadline=None, stateful_step_count=40)
    )
