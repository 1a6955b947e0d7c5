import pytest
import torch

from headrace.kernels import step as layout
from headrace.kernels.penalise import MAX_COUNT
from headrace.kernels.step import (
    commit_step,
    commit_step_reference,
    prepare_step,
    prepare_step_reference,
    write_words,
)

pytestmark = pytest.mark.gpu

#: The bits of 1.0, a neutral repetition penalty.
ONE = torch.tensor(1.0).view(torch.int32).item()
BLOCK_SIZE, MAX_BLOCKS, VOCAB = 16, 5, 50


def make_state(num_slots, device):
    """Return a state of sequences that live, with random words where nothing else is said."""
    state = torch.randint(2**31, (num_slots, layout.state_width(MAX_BLOCKS)), dtype=torch.int32)
    state[:, layout.TOKEN] = torch.randint(VOCAB, (num_slots,))
    state[:, layout.CONTEXT] = torch.randint(BLOCK_SIZE * MAX_BLOCKS, (num_slots,))
    state[:, layout.NUM_OUTPUT], state[:, layout.MAX_OUTPUT] = 3, 1000
    state[:, layout.ALIVE], state[:, layout.NUM_STOPS] = 1, 0
    state[:, layout.PRESENCE : layout.NUM_BIAS] = torch.tensor([0, 0, ONE])
    state[:, layout.TABLE :] = torch.randperm(state[:, layout.TABLE :].numel()).view(num_slots, -1)
    return state.to(device)


def ints(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


# -- prepare_step ----------------------------------------------------------------------------


def prepare(state, row_slots, given=(None, None), num_lens=None):
    """Run prepare_step on poisoned outputs; return what it wrote."""
    num_rows = len(row_slots)
    num_lens = num_rows if num_lens is None else num_lens
    made = [torch.full_like(row_slots, -77) for _ in range(3)]
    lens = ints([-77] * num_lens, state.device)
    prepare_step(state, row_slots, *given, *made, lens, BLOCK_SIZE)
    return (*made, lens)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 300])
def test_decode_rows_are_taken_from_the_state(num_rows, device):
    state = make_state(num_rows + 3, device)
    row_slots = torch.randperm(num_rows + 3)[:num_rows].to(torch.int32).to(device)
    row_slots[num_rows // 2] = -1
    state[torch.rand(num_rows + 3, device=device) < 0.2, layout.ALIVE] = 0
    before = state.clone()
    made = prepare(state, row_slots)
    all_decodes = torch.full_like(row_slots, -1)
    expected = prepare_step_reference(state, row_slots, all_decodes, all_decodes, BLOCK_SIZE)
    for found, wanted in zip(made, expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(state, before)


@pytest.mark.parametrize("num_rows", [9, 200])
def test_rows_of_chunks_bring_their_own_token_and_position(num_rows, device):
    """A third of the rows are padding or of the dead, of the rest a half decodes."""
    state = make_state(num_rows, device)
    row_slots = torch.randint(num_rows, (num_rows,), dtype=torch.int32).to(device)
    row_slots[::5] = -1
    state[::6, layout.ALIVE] = 0
    tokens = torch.randint(VOCAB, (num_rows,), dtype=torch.int32).to(device)
    tokens[torch.rand(num_rows, device=device) < 0.5] = -1
    positions = torch.randint(BLOCK_SIZE * MAX_BLOCKS, (num_rows,), dtype=torch.int32).to(device)
    made = prepare(state, row_slots, (tokens, positions))
    expected = prepare_step_reference(state, row_slots, tokens, positions, BLOCK_SIZE)
    for found, wanted in zip(made, expected, strict=True):
        assert torch.equal(found, wanted)


def test_each_kind_of_row_by_hand(device):
    """Rows: a decode, a token of a chunk, padding, a decode of the dead, a chunk of the dead."""
    state = make_state(4, device)
    state[1, layout.TOKEN], state[1, layout.CONTEXT] = 7, 2 * BLOCK_SIZE + 3
    state[1, layout.TABLE + 2], state[2, layout.TABLE] = 40, 9
    state[3, layout.ALIVE] = 0
    row_slots = ints([1, 2, -1, 3, 3], device)
    given = ints([-1, 21, -1, -1, 5], device), ints([0, 15, 0, 0, 6], device)
    tokens, positions, kv_slots, lens = prepare(state, row_slots, given)
    assert tokens.tolist() == [7, 21, -1, -1, -1]
    assert positions.tolist() == [35, 15, 0, 0, 0]
    assert kv_slots.tolist() == [40 * BLOCK_SIZE + 3, 9 * BLOCK_SIZE + 15, -1, -1, -1]
    assert lens.tolist() == [36, 0, 0, 0, 0]


def test_lengths_are_written_for_the_rows_there_are_and_no_further(device):
    state = make_state(4, device)
    row_slots = ints([2, 0, 1], device)
    longer = prepare(state, row_slots, num_lens=5)[3]
    assert longer.tolist() == [*(state[[2, 0, 1], layout.CONTEXT] + 1).tolist(), -77, -77]
    given = ints([-1, 4, 4], device), ints([0, 8, 9], device)
    assert prepare(state, row_slots, given, num_lens=1)[3].tolist() == longer[:1].tolist()


# -- commit_step -----------------------------------------------------------------------------


class Commit:
    """The tensors of commit_step, kept over several steps."""

    def __init__(self, state, ring_steps=3):
        self.state, num_slots = state, state.shape[0]
        self.counts = torch.zeros(num_slots, VOCAB, dtype=torch.int16, device=state.device)
        self.counter = ints([0], state.device)
        self.ring = torch.full((ring_steps, 2, num_slots), -77, dtype=torch.int32)
        if state.device.type == "cuda":
            self.ring = self.ring.pin_memory()

    def __call__(self, due_slots, drawn, is_finite, contexts):
        """Commit one step; return the ring's entry for it."""
        entry = self.counter.item() % len(self.ring)
        inputs = (due_slots, drawn, is_finite, contexts)
        commit_step(self.state, *inputs, self.counts, self.counter, self.ring)
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()
        return self.ring[entry]


@pytest.mark.parametrize("num_due", [1, 31, 33, 300])
def test_commit_equals_its_reference(num_due, device):
    """Several steps of sequences that stop, end, fail or go on; the dead stay in the batch."""
    num_slots = num_due + 2
    state = make_state(num_slots, device)
    state[:, layout.NUM_STOPS] = torch.randint(layout.MAX_STOPS + 1, (num_slots,)).to(device)
    stops = torch.randint(VOCAB, (num_slots, layout.MAX_STOPS), dtype=torch.int32)
    state[:, layout.STOPS : layout.BIAS_IDS] = stops.to(device)
    state[:, layout.MAX_OUTPUT] = torch.randint(4, 9, (num_slots,)).to(device)
    expected_state, commit = state.clone(), Commit(state)
    for step in range(5):
        due_slots = torch.randperm(num_slots)[:num_due].to(torch.int32).to(device)
        due_slots[torch.rand(num_due, device=device) < 0.1] = -1
        drawn, contexts = (torch.randint(VOCAB, (num_due,), dtype=torch.int32) for _ in range(2))
        finite = (torch.rand(num_due) < 0.9).to(torch.int32)
        inputs = (due_slots, drawn.to(device), finite.to(device), contexts.to(device))
        tokens, flags = commit(*inputs)
        expected = commit_step_reference(expected_state, *inputs)
        assert torch.equal(tokens[:num_due], expected[0].cpu()), step
        assert torch.equal(flags[:num_due], expected[1].cpu()), step
        assert torch.equal(state, expected_state), step
    assert commit.counter.item() == 5
    assert not commit.counts.any()


def test_each_way_to_end_by_hand(device):
    """Rows: goes on, last stop of 16, a token beyond the stops, length, not finite, dead, padding.

    The word after a row's stops holds the token too, and must not stop it.
    """
    state = make_state(7, device)
    state[1, layout.NUM_STOPS] = layout.MAX_STOPS
    state[1, layout.STOPS : layout.BIAS_IDS] = torch.arange(30, 30 + layout.MAX_STOPS)
    state[2, layout.NUM_STOPS] = 1
    state[2, layout.STOPS : layout.STOPS + 2] = torch.tensor([8, 9])
    state[3, layout.MAX_OUTPUT] = 4
    state[4, layout.NUM_STOPS], state[4, layout.STOPS] = 1, 11
    state[5, layout.ALIVE] = 0
    before = state.clone()
    due_slots = ints([0, 1, 2, 3, 4, 5, -1], device)
    drawn = ints([5, 45, 9, 10, 11, 12, 13], device)
    tokens, flags = Commit(state)(due_slots, drawn, ints([1, 1, 1, 1, 0, 1, 1], device), drawn + 60)
    lived = layout.LIVED
    good = lived + layout.FINITE
    assert tokens.tolist() == [5, 45, 9, 10, 11, -1, -1]
    assert flags.tolist() == [good, good + layout.STOPPED, good, good, lived, 0, 0]
    assert state[:, layout.ALIVE].tolist() == [1, 0, 1, 0, 0, 0, 1]
    assert state[:5, layout.TOKEN].tolist() == [5, 45, 9, 10, 11]
    assert state[:5, layout.CONTEXT].tolist() == [65, 105, 69, 70, 71]
    assert state[:5, layout.NUM_OUTPUT].tolist() == [4] * 5
    assert torch.equal(state[5:], before[5:])
    assert torch.equal(state[:, layout.NUM_STOPS :], before[:, layout.NUM_STOPS :])


def test_the_ring_goes_round_and_keeps_the_steps_before(device):
    state = make_state(2, device)
    commit = Commit(state, ring_steps=3)
    one = ints([1], device)
    for step in range(5):
        commit(one, ints([step], device), one, ints([9], device))
    # Entries hold steps 3, 4 and 2; the second slot of a step of one row is not written.
    assert commit.ring[:, 0].tolist() == [[3, -77], [4, -77], [2, -77]]
    assert commit.ring[:, 1, 0].tolist() == [layout.LIVED + layout.FINITE] * 3
    assert commit.counter.item() == 5


def test_tokens_are_counted_for_rows_with_penalties_only(device):
    """Slots: presence, frequency, repetition, none; then not finite, dead, padding, no token."""
    state = make_state(9, device)
    words = state.view(torch.float32)
    words[0, layout.PRESENCE] = words[1, layout.FREQUENCY] = 0.5
    words[2, layout.REPETITION] = 1.1
    words[4:, layout.PRESENCE] = -0.5
    state[5, layout.ALIVE] = 0
    commit = Commit(state)
    commit.counts.random_(100)
    expected = commit.counts.clone()
    expected[[0, 1, 2, 8], [49, 0, 7, 7]] += 2
    due_slots = ints([0, 1, 2, 3, 4, 5, -1, 7, 8], device)
    drawn = ints([49, 0, 7, 7, 7, 7, 7, -1, 7], device)
    is_finite = ints([1, 1, 1, 1, 0, 1, 1, 1, 1], device)
    commit(due_slots, drawn, is_finite, drawn)
    assert torch.equal(commit.counts, expected)


def test_counts_saturate_and_keep_their_prompt_bit(device):
    state = make_state(2, device)
    state.view(torch.float32)[:, layout.FREQUENCY] = 1.0
    commit = Commit(state)
    commit.counts[0, 1], commit.counts[1, 1] = 2 * MAX_COUNT - 2, 2 * MAX_COUNT - 1
    ones = ints([1, 1], device)
    for _ in range(3):
        commit(ints([0, 1], device), ones, ones, ones)
    assert commit.counts[:, 1].tolist() == [2 * MAX_COUNT, 2 * MAX_COUNT + 1] == [32766, 32767]


# -- write_words -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_updates", [0, 1, 256, 300])
def test_words_are_written_at_their_places_and_nowhere_else(num_updates, device):
    state = make_state(3, device)
    expected = state.clone()
    updates = torch.full((2, 320), -1, dtype=torch.int32, device=device)
    updates[0, :num_updates] = torch.randperm(state.numel())[:num_updates].to(torch.int32)
    updates[1, :num_updates] = torch.randint(-(2**31), 2**31, (num_updates,)).to(torch.int32)
    write_words(state, updates, num_updates)
    places = updates[0, :num_updates].long()
    expected.view(-1)[places] = updates[1, :num_updates]
    assert torch.equal(state, expected)


# -- bad input -------------------------------------------------------------------------------


def test_bad_rows_are_told_apart(device):
    rows = [torch.zeros(4, dtype=torch.int32, device=device) for _ in range(7)]
    names = ("row_slots", "row_tokens", "row_positions", "tokens", "positions", "kv_slots")
    good = dict(zip((*names, "decode_lens"), rows, strict=True))
    good |= {"state": make_state(3, device), "block_size": BLOCK_SIZE}
    for changed, text in (
        ({"row_tokens": None}, r"must come together; found only row_positions: "),
        ({"row_positions": None}, r"must come together; found only row_tokens: "),
        ({"tokens": rows[0][:3]}, r"tokens must have shape \[4\]; found \[3\]: "),
        ({"kv_slots": rows[0].long()}, r"kv_slots must be torch.int32; found torch.int64: "),
        ({"decode_lens": rows[0].float()}, r"decode_lens must be torch.int32; found torch.flo"),
        ({"state": good["state"][:, ::2]}, r"state must be contiguous; found strides"),
    ):
        with pytest.raises(ValueError, match=text):
            prepare_step(**(good | changed))


def test_bad_results_and_updates_are_told_apart(device):
    state, due = make_state(3, device), ints([0, 1], device)
    commit = Commit(state)
    good = {
        **{name: due for name in ("due_slots", "drawn", "is_finite", "contexts")},
        **{name: getattr(commit, name) for name in ("state", "counts", "counter", "ring")},
    }
    for changed, text in (
        ({"drawn": due[:1]}, r"drawn must have shape \[2\]; found \[1\]: "),
        ({"is_finite": due.bool()}, r"is_finite must be torch.int32; found torch.bool: "),
        ({"counts": commit.counts[:2]}, r"counts must have shape \[3, 50\]; found \[2, 50\]: "),
        ({"counter": due}, r"counter must have shape \[1\]; found \[2\]: "),
        ({"ring": commit.ring[:, :1]}, r"ring must be \[steps, 2, 3\] int32 .*; found \[3, 1, 3\]"),
    ):
        with pytest.raises(ValueError, match=text):
            commit_step(**(good | changed))
    updates = torch.zeros(2, 8, dtype=torch.int32, device=device)
    for arguments, text in (
        ((state, updates, 9), r"num_updates must be from 0 to the capacity 8; found 9: "),
        ((state, updates[:1], 3), r"updates must have shape \[2, 8\]; found \[1, 8\]: "),
        ((state.long(), updates, 3), r"state must be torch.int32; found torch.int64: "),
    ):
        with pytest.raises(ValueError, match=text):
            write_words(*arguments)
