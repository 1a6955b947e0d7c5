"""The state of running sequences on the device, and the two ends of a step that move it on.

Every running sequence owns a slot: one row of `state: [num_slots, width] int32`, laid out by the
constants below (fp32 columns by their bits, block table last). The host writes single words of it
when something changes; between that the device goes on by itself:

    prepare_step   slot, token, position -> cache slot of each row, context length of each decode
    (the model)
    commit_step    drawn token -> state, stop and length test, results in a ring the host reads

A decode row's token and position are taken from `state`, so that a step follows the one before it
without the host. A row of a prompt chunk brings its own.

    kv_slot = table[position // block_size] * block_size + position % block_size
    ended   = token in stop tokens, or num_output + 1 >= max_output, or logits not finite
    counts  of the drawn token + 1, as penalise.py keeps them, for sequences with penalties only

Invariants:
1. A row of slot -1 (padding) or of a sequence that has ended computes nothing and writes nothing:
   token -1, kv_slot -1, context 0.
2. A sequence that ended is dead on the device from that step on, before the host knows of it.
3. Result row i of a step is that of `due_slots[i]`; `flags` say whether its sequence lived.
4. The ring's entry k holds the results of the k-th step since the start, modulo its length.

Called by: worker/engine/gpu_model.py and gpu_state.py.
"""

import torch

from headrace.kernels.checks import check_tensor
from headrace.kernels.limits import MAX_BIAS, MAX_STOPS
from headrace.kernels.penalise import count_token_at
from headrace.kernels.triton_seam import tl, triton

# Columns of `state`. SEED takes two: the low word and the high one.
TOKEN, CONTEXT, NUM_OUTPUT, MAX_OUTPUT, ALIVE, NUM_STOPS = range(6)
TEMPERATURE, TOP_K, SEED, _, TOP_P, MIN_P = range(6, 12)
PRESENCE, FREQUENCY, REPETITION, NUM_BIAS, NUM_LOGPROBS, NUM_SCALARS = range(12, 18)
STOPS = NUM_SCALARS
BIAS_IDS = STOPS + MAX_STOPS
BIAS_VALUES = BIAS_IDS + MAX_BIAS
#: First column of the block table; a multiple of 16, as compiled kernels know it.
TABLE = -(-(BIAS_VALUES + MAX_BIAS) // 16) * 16

#: Bits of a result's flags.
LIVED, FINITE, STOPPED = 1, 2, 4


def state_width(max_blocks: int) -> int:
    """Return the columns of a state whose tables hold that many blocks."""
    # One divisibility for every model, or the kernels would be compiled for each.
    return -(-(TABLE + max_blocks) // 16) * 16


def prepare_step_reference(
    state: torch.Tensor,  # [num_slots, width] int32
    row_slots: torch.Tensor,  # [num_rows] int32, -1 = padding
    row_tokens: torch.Tensor,  # [num_rows] int32, -1 = a decode: the state's
    row_positions: torch.Tensor,  # [num_rows] int32, read where row_tokens is not -1
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens, positions, kv_slots, decode_lens), each [num_rows] int32."""
    at = state[row_slots.clamp(min=0).long()]
    lives = (row_slots >= 0) & (at[:, ALIVE] != 0)
    is_decode = row_tokens < 0
    tokens = torch.where(is_decode, at[:, TOKEN], row_tokens)
    positions = torch.where(is_decode, at[:, CONTEXT], row_positions)
    positions = torch.where(lives, positions, 0)
    blocks = at.gather(1, TABLE + positions[:, None].long() // block_size).squeeze(1)
    kv_slots = blocks * block_size + positions % block_size
    return (
        torch.where(lives, tokens, -1),
        positions,
        torch.where(lives, kv_slots, -1),
        torch.where(lives & is_decode, positions + 1, 0),
    )


@triton.jit
def _prepare_step_kernel(
    state_ptr,  # in: [num_slots, width] int32
    row_slots_ptr,  # in: [num_rows] int32, -1 = padding
    row_tokens_ptr,  # in: [num_rows] int32, -1 = a decode
    row_positions_ptr,  # in: [num_rows] int32
    tokens_ptr,  # out: [num_rows] int32, -1 = nothing to compute
    positions_ptr,  # out: [num_rows] int32
    kv_slots_ptr,  # out: [num_rows] int32, -1 = not written
    decode_lens_ptr,  # out: [min(num_rows, num_lens)] int32, 0 = no decode
    num_rows,
    num_lens,
    width,
    TOKEN: tl.constexpr,
    CONTEXT: tl.constexpr,
    ALIVE: tl.constexpr,
    TABLE: tl.constexpr,
    block_size: tl.constexpr,
    ONLY_DECODES: tl.constexpr,  # row_tokens and row_positions are not read
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = rows < num_rows
    slots = tl.load(row_slots_ptr + rows, mask=is_row, other=-1)
    at = state_ptr + slots.to(tl.int64) * width
    is_slot = slots >= 0
    lives = is_slot & (tl.load(at + ALIVE, mask=is_slot, other=0) != 0)
    tokens = tl.load(at + TOKEN, mask=lives, other=-1)
    positions = tl.load(at + CONTEXT, mask=lives, other=0)
    is_decode = lives
    if not ONLY_DECODES:
        given = tl.load(row_tokens_ptr + rows, mask=is_row, other=-1)
        given_positions = tl.load(row_positions_ptr + rows, mask=is_row, other=0)
        is_decode = lives & (given < 0)
        tokens = tl.where(lives & (given >= 0), given, tokens)
        positions = tl.where(lives & (given >= 0), given_positions, positions)
    blocks = tl.load(at + TABLE + positions // block_size, mask=lives, other=0)
    kv_slots = tl.where(lives, blocks * block_size + positions % block_size, -1)
    tl.store(tokens_ptr + rows, tokens, mask=is_row)
    tl.store(positions_ptr + rows, positions, mask=is_row)
    tl.store(kv_slots_ptr + rows, kv_slots, mask=is_row)
    lens = tl.where(is_decode, positions + 1, 0)
    tl.store(decode_lens_ptr + rows, lens, mask=is_row & (rows < num_lens))


def prepare_step(
    state: torch.Tensor,
    row_slots: torch.Tensor,
    row_tokens: torch.Tensor | None,
    row_positions: torch.Tensor | None,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    decode_lens: torch.Tensor,
    block_size: int,
) -> None:
    """Fill the step's row arrays from the state and what the host sent.

    Args:
        state: [num_slots, width] int32.
        row_slots: [num_rows] int32, -1 = padding.
        row_tokens: [num_rows] int32, -1 = a decode. None: every row is one.
        row_positions: like row_tokens.
        tokens: [num_rows] int32, written.
        positions: like tokens.
        kv_slots: like tokens.
        decode_lens: [num_lens] int32, written up to num_rows; rows beyond num_lens are no decodes.
        block_size: of the cache.
    """
    if (row_tokens is None) != (row_positions is None):
        raise ValueError(
            "row_tokens and row_positions must come together; found only "
            f"{'row_positions' if row_tokens is None else 'row_tokens'}: pass both or neither"
        )
    num_rows = row_slots.shape[0]
    check_tensor("state", state, tuple(state.shape), torch.int32, state.device)
    given = row_slots if row_tokens is None else row_tokens
    given_positions = row_slots if row_positions is None else row_positions
    for name, tensor in (
        ("row_slots", row_slots), ("row_tokens", given), ("row_positions", given_positions),
        ("tokens", tokens), ("positions", positions), ("kv_slots", kv_slots),
    ):  # fmt: skip
        check_tensor(name, tensor, (num_rows,), torch.int32, state.device)
    check_tensor("decode_lens", decode_lens, (decode_lens.shape[0],), torch.int32, state.device)
    block = 128
    _prepare_step_kernel[(triton.cdiv(num_rows, block),)](
        state, row_slots, given, given_positions, tokens, positions, kv_slots, decode_lens,
        num_rows, decode_lens.shape[0], state.shape[1], TOKEN, CONTEXT, ALIVE, TABLE, block_size,
        ONLY_DECODES=row_tokens is None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def commit_step_reference(
    state: torch.Tensor,  # [num_slots, width] int32, changed in place
    due_slots: torch.Tensor,  # [num_due] int32, -1 = padding
    drawn: torch.Tensor,  # [num_due] int32
    is_finite: torch.Tensor,  # [num_due] int32, 0 = the row's logits are no numbers
    contexts: torch.Tensor,  # [num_due] int32, positions computed once this step is
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, flags), each [num_due] int32; 0 flags where nothing was done."""
    tokens, flags = torch.full_like(drawn, -1), torch.zeros_like(drawn)
    for i, slot in enumerate(due_slots.tolist()):
        if slot < 0 or not state[slot, ALIVE]:
            continue
        token = int(drawn[i])
        num_stops = int(state[slot, NUM_STOPS])
        stopped = token in state[slot, STOPS : STOPS + num_stops].tolist()
        finite = bool(is_finite[i])
        tokens[i] = token
        flags[i] = LIVED + FINITE * finite + STOPPED * (stopped and finite)
        state[slot, TOKEN] = token
        state[slot, CONTEXT] = contexts[i]
        state[slot, NUM_OUTPUT] += 1
        ended = stopped or not finite or state[slot, NUM_OUTPUT] >= state[slot, MAX_OUTPUT]
        state[slot, ALIVE] = 0 if ended else 1
    return tokens, flags


@triton.jit
def _commit_step_kernel(
    state_ptr,  # in, out: [num_slots, width] int32
    due_slots_ptr,  # in: [num_due] int32, -1 = padding
    drawn_ptr,  # in: [num_due] int32
    is_finite_ptr,  # in: [num_due] int32
    contexts_ptr,  # in: [num_due] int32
    counts_ptr,  # in, out: [num_slots, vocab] int16, 2 * times made + (1 if in the prompt)
    counter_ptr,  # in, out: [1] int32, steps committed
    ring_ptr,  # out: [ring_steps, 2, num_slots] int32, tokens and flags
    num_due,
    num_slots,
    width,
    vocab,
    ring_steps: tl.constexpr,
    TOKEN: tl.constexpr,
    CONTEXT: tl.constexpr,
    NUM_OUTPUT: tl.constexpr,
    MAX_OUTPUT: tl.constexpr,
    ALIVE: tl.constexpr,
    NUM_STOPS: tl.constexpr,
    PRESENCE: tl.constexpr,
    FREQUENCY: tl.constexpr,
    REPETITION: tl.constexpr,
    STOPS: tl.constexpr,
    MAX_STOPS: tl.constexpr,
    LIVED: tl.constexpr,
    FINITE: tl.constexpr,
    STOPPED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program does it all: the counter moves only after every row has read it."""
    step = tl.load(counter_ptr)
    ring = ring_ptr + (step % ring_steps) * 2 * num_slots
    for start in range(0, num_due, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        is_row = rows < num_due
        slots = tl.load(due_slots_ptr + rows, mask=is_row, other=-1)
        is_slot = slots >= 0
        at = state_ptr + slots.to(tl.int64) * width
        lives = is_slot & (tl.load(at + ALIVE, mask=is_slot, other=0) != 0)
        token = tl.load(drawn_ptr + rows, mask=lives, other=-1)
        finite = tl.load(is_finite_ptr + rows, mask=lives, other=0) != 0
        num_stops = tl.load(at + NUM_STOPS, mask=lives, other=0)
        stopped = tl.zeros([BLOCK], tl.int32)
        for i in range(MAX_STOPS):
            stop = tl.load(at + STOPS + i, mask=lives & (i < num_stops), other=-1)
            stopped |= ((stop == token) & (i < num_stops)).to(tl.int32)
        is_stop = (stopped != 0) & lives
        num_output = tl.load(at + NUM_OUTPUT, mask=lives, other=0) + 1
        max_output = tl.load(at + MAX_OUTPUT, mask=lives, other=0)
        ended = is_stop | (finite == 0) | (num_output >= max_output)
        context = tl.load(contexts_ptr + rows, mask=lives, other=0)
        tl.store(at + TOKEN, token, mask=lives)
        tl.store(at + CONTEXT, context, mask=lives)
        tl.store(at + NUM_OUTPUT, num_output, mask=lives)
        tl.store(at + ALIVE, tl.where(ended, 0, 1), mask=lives)
        # Neutral are presence 0, frequency 0 and repetition 1.0, by their bits.
        has_penalties = tl.load(at + PRESENCE, mask=lives, other=0) != 0
        has_penalties |= tl.load(at + FREQUENCY, mask=lives, other=0) != 0
        has_penalties |= tl.load(at + REPETITION, mask=lives, other=0x3F800000) != 0x3F800000
        is_counted = lives & finite & (token >= 0) & has_penalties
        count_token_at(counts_ptr, vocab, slots, token, is_counted)
        flags = tl.where(lives, LIVED, 0) + tl.where(lives & finite, FINITE, 0)
        flags += tl.where(is_stop & finite, STOPPED, 0)
        tl.store(ring + rows, tl.where(lives, token, -1), mask=is_row)
        tl.store(ring + num_slots + rows, flags, mask=is_row)
    tl.debug_barrier()
    tl.store(counter_ptr, step + 1)


def commit_step(
    state: torch.Tensor,
    due_slots: torch.Tensor,
    drawn: torch.Tensor,
    is_finite: torch.Tensor,
    contexts: torch.Tensor,
    counts: torch.Tensor,
    counter: torch.Tensor,
    ring: torch.Tensor,
) -> None:
    """Move the due sequences on by the tokens drawn for them, and tell the host.

    Args:
        state: [num_slots, width] int32, changed in place.
        due_slots: [num_due] int32, each slot at most once, -1 = padding.
        drawn: [num_due] int32.
        is_finite: [num_due] int32, 0 = the row's logits are no numbers.
        contexts: [num_due] int32, positions of the sequence computed once this step is.
        counts: [num_slots, vocab] int16, 2 * times made + (1 if in the prompt); kept for the
            sequences with penalties only.
        counter: [1] int32, steps committed; one more afterwards.
        ring: [ring_steps, 2, num_slots] int32, pinned host memory on a GPU.
    """
    num_due, device = due_slots.shape[0], state.device
    num_slots, width = state.shape
    check_tensor("state", state, (num_slots, width), torch.int32, device)
    for name, tensor in (
        ("due_slots", due_slots), ("drawn", drawn), ("is_finite", is_finite),
        ("contexts", contexts),
    ):  # fmt: skip
        check_tensor(name, tensor, (num_due,), torch.int32, device)
    check_tensor("counts", counts, (num_slots, counts.shape[1]), torch.int16, device)
    check_tensor("counter", counter, (1,), torch.int32, device)
    if ring.shape[1:] != (2, num_slots) or ring.dtype != torch.int32 or num_due > num_slots:
        raise ValueError(
            f"ring must be [steps, 2, {num_slots}] int32 and hold {num_due} results; found "
            f"{list(ring.shape)} {ring.dtype}: allocate it with the state"
        )
    _commit_step_kernel[(1,)](
        state, due_slots, drawn, is_finite, contexts, counts, counter, ring,
        num_due, num_slots, width, counts.shape[1], ring.shape[0], TOKEN, CONTEXT, NUM_OUTPUT,
        MAX_OUTPUT, ALIVE, NUM_STOPS, PRESENCE, FREQUENCY, REPETITION, STOPS, MAX_STOPS, LIVED,
        FINITE, STOPPED, BLOCK=min(1024, max(32, triton.next_power_of_2(num_due))),
        num_warps=8 if num_due > 256 else 4,
    )  # fmt: skip


@triton.jit
def _write_words_kernel(
    state_ptr,  # in, out: [words] int32
    updates_ptr,  # in: [2, capacity] int32, places and values
    capacity,
    num_updates,
    BLOCK: tl.constexpr,
) -> None:
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_update = lanes < num_updates
    places = tl.load(updates_ptr + lanes, mask=is_update, other=0)
    values = tl.load(updates_ptr + capacity + lanes, mask=is_update, other=0)
    tl.store(state_ptr + places, values, mask=is_update)


def write_words(state: torch.Tensor, updates: torch.Tensor, num_updates: int) -> None:
    """Write single words of the state: what of the host's bookkeeping has changed.

    Args:
        state: [num_slots, width] int32, changed in place.
        updates: [2, capacity] int32: places in the flat state, and the values; a place that
            stands there twice has the same value each time.
        num_updates: leading columns of updates that count.
    """
    check_tensor("state", state, tuple(state.shape), torch.int32, state.device)
    check_tensor("updates", updates, (2, updates.shape[1]), torch.int32, state.device)
    if not 0 <= num_updates <= updates.shape[1]:
        raise ValueError(
            f"num_updates must be from 0 to the capacity {updates.shape[1]}; found {num_updates}: "
            "write them in several calls"
        )
    if num_updates:
        grid = (triton.cdiv(num_updates, 256),)
        _write_words_kernel[grid](state, updates, updates.shape[1], num_updates, BLOCK=256)
