"""slots.py: who has a slot, what moves in and out with it, and what a runner is told."""

import numpy as np
import pytest

from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.slots import NOT_RECEIVED, SlotTable


@pytest.fixture
def sequence(admit):
    def build(seq_id=1, output=(7,), **asked):
        return Sequence.from_admit(admit(seq_id, [5, 6], 6, output, **asked), seq_id)

    return build


def test_invariant_3_counters_and_values_move_in_and_out_with_the_sequence(sequence):
    table, seq = SlotTable(4, 40, 4), sequence()
    slot = table.give(seq)
    table.check()
    assert (seq.slot, seq.is_running, seq.num_known, seq.num_received) == (slot, True, 3, 3)
    assert table.tokens[slot, :8].tolist() == [5, 6, 7] + [NOT_RECEIVED] * 5
    table.num_known[slot] += 2
    table.tokens[slot, 3] = 8
    table.num_received[slot] += 1
    assert (seq.num_known, seq.num_received, seq.output.tolist()) == (5, 4, [7, 8])
    assert table.has_values_in_flight
    assert table.take_back(slot) == []
    table.check()
    table.tokens[slot] = 99  # another's now
    assert (seq.is_running, seq.num_known, seq.num_computed) == (False, 4, 0)
    assert seq.output.tolist() == [7, 8]
    assert not table.has_values_in_flight


def test_invariant_4_each_stay_in_a_slot_has_an_epoch_of_its_own(sequence):
    table, seen = SlotTable(2, 40, 4), set()
    for _ in range(5):
        seqs = [sequence(1), sequence(2)]
        for seq in seqs:
            slot = table.give(seq)
            seen.add((slot, int(table.epoch[slot])))
        for seq in seqs:
            table.take_back(seq.slot)
    assert len(seen) == 10


def test_invariant_5_tables_grow_and_a_runner_is_told_of_each_block_once(sequence):
    table = SlotTable(3, 40, 4)
    first, second = table.give(sequence(1)), table.give(sequence(2))
    table.add_blocks(first, [9, 8])
    table.add_blocks(second, [4])
    assert table.take_new_blocks().tolist() == [[first, 0, 9], [first, 1, 8], [second, 0, 4]]
    assert table.take_new_blocks().tolist() == []
    table.add_block_each(np.array([first, second]), [3, 2])
    table.add_blocks(first, [1])
    table.check()
    told = [[first, 2, 3], [first, 3, 1], [second, 1, 2]]
    assert table.take_new_blocks().tolist() == told
    assert (table.table(first), table.table(second)) == ([9, 8, 3, 1], [4, 2])
    assert table.take_back(first) == [9, 8, 3, 1]
    again = table.give(sequence(3))
    assert again == first
    table.add_blocks(again, [7])
    assert table.take_new_blocks().tolist() == [[again, 0, 7]]
    table.check()


def test_decodes_are_those_with_one_token_to_compute_and_more_to_make(sequence):
    table = SlotTable(4, 40, 4)
    slots = [table.give(sequence(seq_id)) for seq_id in (1, 2, 3)]
    table.num_computed[slots] = [2, 2, 0]
    assert table.decodes().tolist() == slots[:2]
    assert table.prefills().tolist() == slots[2:]
    table.num_known[slots[0]] = table.num_max[slots[0]]
    table.num_computed[slots[0]] = table.num_max[slots[0]] - 1
    assert table.decodes().tolist() == slots[1:2]
    assert table.decodes().dtype == np.int32


def test_seniority_is_interactive_first_and_then_by_arrival(sequence):
    table = SlotTable(4, 40, 4)
    kinds = [(4, True), (3, False), (1, True), (2, False)]
    slots = {seq_id: table.give(sequence(seq_id, is_batch=b)) for seq_id, b in kinds}
    assert table.by_seniority(table.used()) == [slots[i] for i in (2, 3, 1, 4)]
