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

from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence import Sequence, SequenceError


class Played:
    """A scheduler whose sequences get the token 1 + their index whenever one is due."""

    def __init__(self, make_admit, num_blocks=16, block_size=4, max_num_seqs=8, max_step_tokens=16):
        self.make_admit = make_admit
        self.scheduler = Scheduler(KVPool(num_blocks, block_size), max_num_seqs, max_step_tokens)
        self.num_added = 0
        self.ended = []

    def add(self, num_prompt, max_tokens, first_token=100, **asked):
        self.num_added += 1
        prompt = range(first_token, first_token + num_prompt)
        seq = Sequence.from_admit(
            self.make_admit(self.num_added, prompt, max_tokens, **asked), self.num_added
        )
        self.scheduler.add(seq)
        return seq

    def step(self, stop=lambda seq: False):
        plan = self.scheduler.plan()
        self.scheduler.check(plan)
        planned = list(plan)
        self.scheduler.advance(plan)
        for seq, _ in planned:
            if seq.num_pending == 0:
                seq.append(1 + seq.num_output)
                if seq.max_tokens_left == 0 or stop(seq):
                    self.scheduler.retire(seq, is_finished=True)
                    self.ended.append(seq)
        self.scheduler.check()
        return planned

    def finish(self):
        for _ in range(5000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


@pytest.fixture
def played(admit):
    def build(**limits):
        return Played(admit, **limits)

    return build


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
        before = {id(s) for s in engine.scheduler._running.values()}
        engine.step()
        for seq in (old, batch, young):
            is_running = seq in engine.scheduler._running.values()
            if id(seq) in before and not is_running and seq not in engine.ended:
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
    assert running in engine.scheduler._running.values()
    assert batch in engine.ended or batch in engine.scheduler._running.values()


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


class SchedulerMachine(RuleBasedStateMachine):
    """Any mix of sequences, cancels and early ends: checked after each, and all finish."""

    make_admit = None

    @initialize(
        num_blocks=st.integers(2, 14),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 20),
        expected=st.integers(0, 6),
    )
    def start(self, num_blocks, max_num_seqs, budget, expected):
        limits = {"max_num_seqs": max_num_seqs, "max_step_tokens": budget}
        self.engine = Played(type(self).make_admit, num_blocks, 4, **limits)
        self.live = []
        for _ in range(expected):
            self.engine.scheduler.lengths.add(expected)

    @rule(
        num_prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        first_token=st.sampled_from([100, 200]),
        is_batch=st.booleans(),
    )
    def add(self, **asked):
        try:
            self.live.append(self.engine.add(**asked))
        except SequenceError:
            fits = self.engine.scheduler.pool.num_tokens
            assert asked["num_prompt"] + asked["max_tokens"] > fits

    @rule(stop_at=st.integers(1, 25))
    def step(self, stop_at):
        self.engine.step(stop=lambda seq: seq.num_output >= stop_at)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), is_spoiled=st.booleans())
    def remove(self, data, is_spoiled):
        seq = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        if seq in self.engine.ended:
            return
        if is_spoiled:
            self.engine.scheduler.retire_spoiled(seq)
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
