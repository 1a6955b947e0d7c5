"""What the device is told of sequences: whole when a slot is given, otherwise only differences."""

import numpy as np
import pytest
import torch

from headrace.kernels import step as layout
from headrace.tests.worker.engine.conftest import make_admit
from headrace.worker.engine import gpu_state
from headrace.worker.engine.gpu_state import DeviceState
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.slots import SlotTable
from headrace.worker.frames import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS, MAX_BLOCKS, VOCAB, DEPTH = 4, 6, 50, 2
RICH = SamplingParams(
    temperature=0.7, top_k=9, top_p=0.6, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.25,
    repetition_penalty=1.5, logit_bias={3: 1.0, 4: -2.0, 49: 8.0}, logprobs=5, seed=2**63 + 12345,
)  # fmt: skip
PLAIN = SamplingParams(temperature=0.0)
COUNTED = SamplingParams(temperature=0.0, frequency_penalty=1.0)


def make_state():
    state = DeviceState(NUM_SLOTS, MAX_BLOCKS, 16, VOCAB, DEVICE, DEPTH)
    state.reset()
    return state


def running(slot, prompt, params, output=(), stops=(), max_tokens=9):
    """Return a sequence that has that slot."""
    table = SlotTable(NUM_SLOTS, MAX_BLOCKS * 16, 16)
    asked = make_admit(1, prompt, max_tokens, output, params=params, stop_token_ids=list(stops))
    for _ in range(slot):
        table.give(Sequence.from_admit(make_admit(0, [1], 1), 0))
    seq = Sequence.from_admit(asked, 1)
    assert table.give(seq) == slot
    return seq


def blocks(*rows):
    return np.array(rows, np.int32).reshape(-1, 3)


def sent(state, monkeypatch):
    """Return a list that gets the length of whatever is sent from now on."""
    lengths, send = [], state._staging.send

    def spy(values, to):
        lengths.append(len(values))
        send(values, to)

    monkeypatch.setattr(state._staging, "send", spy)
    return lengths


def test_a_new_slot_holds_all_its_parameters():
    state = make_state()
    state.start(running(2, [5, 6, 5], RICH, output=[7, 8], stops=[11, 12], max_tokens=9))
    state.set_blocks(blocks((2, 0, 31), (2, 1, 30)))
    state.begin()
    row = state.words[2].tolist()
    assert row[layout.TOKEN] == 8
    assert (row[layout.CONTEXT], row[layout.NUM_OUTPUT], row[layout.MAX_OUTPUT]) == (4, 2, 9)
    assert (row[layout.ALIVE], row[layout.TOP_K], row[layout.NUM_LOGPROBS]) == (1, 9, 5)
    assert row[layout.STOPS : layout.STOPS + row[layout.NUM_STOPS]] == [11, 12]
    assert state.seeds[2].cpu().numpy().view(np.uint64).item() == RICH.seed
    floats = {
        layout.TEMPERATURE: 0.7, layout.TOP_P: 0.6, layout.MIN_P: 0.1, layout.PRESENCE: 0.5,
        layout.FREQUENCY: 0.25, layout.REPETITION: 1.5,
    }  # fmt: skip
    for column, value in floats.items():
        assert state.float_column(column)[2].item() == pytest.approx(value)
    assert row[layout.NUM_BIAS] == 3
    assert state.bias_ids[2, :3].tolist() == [3, 4, 49]
    assert state.bias_values[2, :3].tolist() == [1.0, -2.0, 8.0]
    assert state.tables[2, :2].tolist() == [31, 30]
    counts = state.counts[2].tolist()  # 2 * times made + (1 if in the prompt)
    assert (counts[5], counts[6], counts[7], counts[8], sum(counts)) == (1, 1, 2, 2, 6)
    others = [0, 1, 3]
    assert not state.words[others].any()
    assert not state.counts[others].any()


@pytest.mark.parametrize("params", [PLAIN, COUNTED, RICH])
def test_invariant_3_nothing_of_the_sequence_before_is_left_that_a_kernel_reads(params):
    """Longer stops, biases, counts and table before; compare with a slot never used."""
    used, fresh = make_state(), make_state()
    before = running(1, [7] * 20, RICH, output=[9, 9, 9], stops=range(20, 36), max_tokens=40)
    used.start(before)
    used.set_blocks(blocks(*((1, i, 40 + i) for i in range(MAX_BLOCKS))))
    used.begin()
    used.words[1, layout.ALIVE] = 0  # it ended
    for state in (used, fresh):
        state.start(running(1, [3, 4], params, stops=[2]))
        state.set_blocks(blocks((1, 0, 5)))
        state.begin()
    (row, expected) = (state.words[1].tolist() for state in (used, fresh))
    end = layout.STOPS + layout.MAX_STOPS
    assert row[:end] == expected[:end]
    num_bias = row[layout.NUM_BIAS]
    for start in (layout.BIAS_IDS, layout.BIAS_VALUES):
        assert row[start : start + num_bias] == expected[start : start + num_bias]
    assert row[layout.TABLE] == expected[layout.TABLE] == 5
    if params is not PLAIN:  # without penalties counts are not read
        assert used.counts[1].tolist() == fresh.counts[1].tolist()


def test_of_a_slot_given_twice_between_steps_the_last_holds():
    state = make_state()
    state.start(running(0, [5] * 30, RICH, stops=[1, 2, 3]))
    state.set_blocks(blocks((0, 0, 7), (0, 1, 8), (0, 0, 9)))
    state.start(running(0, [6, 4], PLAIN, stops=[13]))
    state.set_blocks(blocks((0, 0, 11)))
    state.begin()
    row = state.words[0].tolist()
    assert (row[layout.TOKEN], row[layout.CONTEXT], row[layout.NUM_BIAS]) == (4, 1, 0)
    assert row[layout.STOPS : layout.STOPS + row[layout.NUM_STOPS]] == [13]
    assert row[layout.TABLE] == 11


def test_more_words_than_are_sent_at_once_all_arrive(monkeypatch):
    at_once, in_pieces = make_state(), None
    monkeypatch.setattr(gpu_state, "UPDATES", 32)
    in_pieces = make_state()
    lengths = sent(in_pieces, monkeypatch)
    for state in (at_once, in_pieces):
        with monkeypatch.context() as patch:
            patch.setattr(gpu_state, "UPDATES", state._updates.shape[1])
            for slot in range(NUM_SLOTS):
                state.start(running(slot, [slot + 1] * 9, RICH, stops=range(slot, slot + 7)))
                state.set_blocks(blocks((slot, 0, slot), (slot, 1, 9 - slot)))
            state.begin()
    assert len(lengths) > 2 * NUM_SLOTS
    assert max(lengths) == 32
    assert torch.equal(at_once.words, in_pieces.words)


def test_invariant_2_without_a_change_nothing_is_sent(monkeypatch):
    state = make_state()
    state.start(running(0, [5, 6], PLAIN))
    state.begin()
    state.send_decodes(np.array([0, 2], np.int32), 4)
    before = state.words.clone()
    lengths = sent(state, monkeypatch)
    for _ in range(DEPTH + 3):
        state.set_blocks(blocks())
        state.begin()
        state.send_decodes(np.array([0, 2], np.int32), 4)
    assert lengths == []
    assert torch.equal(state.words, before)


def test_the_slots_of_decodes_are_sent_when_they_change(monkeypatch):
    state = make_state()
    lengths = sent(state, monkeypatch)
    steps = [((0, 2), 4), ((0, 2), 4), ((2, 0), 4), ((0,), 1), ((0, 2, 1), 4), ((0, 2, 1), 4)]
    for slots, bucket in steps:
        state.begin()
        state.send_decodes(np.array(slots, np.int32), bucket)
        padded = [*slots] + [-1] * (bucket - len(slots))
        assert state.decode_slots[:bucket].tolist() == padded
    assert lengths == [4, 4, 1, 4]
    state.reset()
    assert state.decode_slots.tolist() == [-1] * NUM_SLOTS
    state.begin()
    state.send_decodes(np.array([0, 2, 1], np.int32), 4)
    assert state.decode_slots.tolist() == [0, 2, 1, -1]


def test_pinned_memory_is_not_written_again_while_its_step_may_be_in_flight(monkeypatch):
    """At most depth + 1 steps are in flight: so many successive ones use different memory."""
    state = make_state()
    places = []

    def spy(values, to):
        places.append(state._staging._sets[state._staging._turn].data_ptr())

    monkeypatch.setattr(state._staging, "send", spy)
    for step in range(12):
        state.begin()
        state.send_decodes(np.array([step % NUM_SLOTS], np.int32), 1)
    for at in range(12 - DEPTH):
        assert len(set(places[at : at + DEPTH + 1])) == DEPTH + 1


def test_what_is_sent_padded_leaves_nothing_of_before():
    state = make_state()
    state.send_padded(np.array([4, 3, 2, 1], np.int32), state.due_rows)
    state.begin()
    state.send_padded(np.array([7], np.int32), state.due_rows)
    assert state.due_rows.tolist() == [7, -1, -1, -1]
