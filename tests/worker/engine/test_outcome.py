"""outcome.py: which rows of a step count, what they write, and what is told of them."""

import numpy as np
import pytest

from headrace.worker.engine.batch import build_batch
from headrace.worker.engine.outcome import end_entries, take_results
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.slots import SlotTable
from headrace.worker.frames import Reason


@pytest.fixture
def table(admit):
    """Four sequences with a decode each in flight; the last one has one token left to make."""
    table = SlotTable(4, 40, 4)
    for seq_id, max_tokens in ((11, 9), (12, 9), (13, 9), (14, 2)):
        seq = Sequence.from_admit(admit(seq_id, [5, 6], max_tokens, [7]), seq_id)
        slot = table.give(seq)
        table.add_blocks(slot, [slot])
        table.num_computed[slot] = 2
    return table


def submitted(table):
    batch = build_batch(table, table.decodes(), [], [])
    table.num_computed[batch.decode_slots] += 1
    table.num_known[batch.due_slots] += 1
    return batch


def sampled(tokens, failed=(), stopped=(), logprobs=None):
    rows = np.arange(len(tokens))
    is_finite, is_stop = ~np.isin(rows, failed), np.isin(rows, stopped)
    return Sampled(np.array(tokens), is_finite, is_stop, logprobs or {})


def test_values_are_written_and_told_with_their_reasons(table):
    outcome = take_results(submitted(table), sampled([50, 51, 52, 53], failed=[1], stopped=[0]))
    reasons = [Reason.STOP_TOKEN, Reason.FAILED, Reason.GOING_ON, Reason.LENGTH]
    assert outcome.entries["reason"].tolist() == reasons
    assert outcome.entries["token"].tolist() == [50, -1, 52, 53]
    assert outcome.entries["seq_id"].tolist() == [11, 12, 13, 14]
    assert outcome.entries["index"].tolist() == [1, 1, 1, 1]
    assert outcome.ended == [(0, reasons[0]), (1, reasons[1]), (3, reasons[3])]
    assert outcome.sound.tolist() == [0, 2, 3]
    found = [table.sequence(slot).output.tolist() for slot in range(4)]
    assert found == [[7, 50], [7], [7, 52], [7, 53]]
    table.check()


def test_the_last_token_ends_by_its_stop_id_rather_than_by_length(table):
    outcome = take_results(submitted(table), sampled([50, 51, 52, 53], stopped=[3]))
    assert outcome.entries["reason"][3] == Reason.STOP_TOKEN


def test_rows_of_a_stay_that_has_ended_are_dropped_though_the_slot_is_used_again(table, admit):
    batch = submitted(table)
    table.take_back(0)
    table.take_back(2)
    again = Sequence.from_admit(admit(20, [8], 9), 20)
    assert table.give(again) == 2
    outcome = take_results(batch, sampled([50, 51, 52, 53]))
    assert outcome.entries["seq_id"].tolist() == [12, 14]
    assert outcome.entries["token"].tolist() == [51, 53]
    assert again.output.tolist() == []
    table.check()


def test_logprobs_stay_with_their_rows_when_others_are_dropped(table):
    batch = submitted(table)
    table.take_back(0)
    values = {row: (-float(row), np.arange(row), np.zeros(row)) for row in range(4)}
    outcome = take_results(batch, sampled([50, 51, 52, 53], failed=[1], logprobs=values))
    assert outcome.entries["num_logprobs"].tolist() == [-1, 2, 3]
    assert [chosen for chosen, _, _ in outcome.logprobs] == [-2.0, -3.0]


def test_an_end_without_a_token_says_where_the_output_stood(table):
    seq = table.sequence(1)
    table.take_back(1)
    seq.cached_tokens = 4
    (entry,) = end_entries([(seq, Reason.CANCELED)])
    assert entry.tolist() == (12, -1, 1, 4, Reason.CANCELED, -1, 0)
