"""Presence, frequency and repetition penalties, and logit bias, on the logits of a step.

    repetition r, for tokens in the prompt or the output:   x = x / r if x > 0 else x * r
    frequency f and presence p, for tokens in the output:   x = x - f * count - p * [count > 0]
    bias, for the tokens of a short list:                   x = x + bias

Repetition first, as vLLM does; repetition as in transformers (prompt and output), frequency and
presence as OpenAI defines them (output only). Which tokens a slot holds is one number a token:

    counts[slot, token] = 2 * times generated + (1 if in the prompt)              int16, saturating

Invariants:
1. 1, 0, 0 and no bias leave a row exactly as it was, and unread; so does padding.
2. A count stops at MAX_COUNT and keeps its prompt bit.
3. No token is written twice by different programs, so nothing depends on their order.

A prompt is counted by count_prompt, what is drawn by count_token_at inside the kernel of step.py
that commits it.

Numerics: fp32 throughout.
"""

import torch

from headrace.kernels.checks import check_logits, check_rows, check_table
from headrace.kernels.limits import MAX_BIAS
from headrace.kernels.triton_seam import tl, triton

#: Most times generated that a count can tell: 2 * 16383 + 1 is the largest int16.
MAX_COUNT = 16383
_MAX_COUNT = tl.constexpr(MAX_COUNT)  # pyright: ignore[reportCallIssue]


def penalise_reference(
    logits: torch.Tensor,  # [num_seqs, vocab] fp32
    output_counts: torch.Tensor,  # [num_seqs, vocab] int32, times each token was generated
    in_prompt: torch.Tensor,  # [num_seqs, vocab] bool
    presence: torch.Tensor,  # [num_seqs] fp32, 0 = off
    frequency: torch.Tensor,  # [num_seqs] fp32, 0 = off
    repetition: torch.Tensor,  # [num_seqs] fp32, 1 = off
) -> torch.Tensor:
    """Return penalised logits: [num_seqs, vocab] fp32; the argument is left alone."""
    in_output = output_counts > 0
    factor = torch.where(in_output | in_prompt, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency[:, None] * output_counts - presence[:, None] * in_output


@triton.jit
def count_token_at(counts_ptr, counts_stride, slots, tokens, is_drawn) -> None:
    """Count one more generated token for each of some slots, all different; tokens int32."""
    at = counts_ptr + slots.to(tl.int64) * counts_stride + tokens
    count = tl.load(at, mask=is_drawn, other=0).to(tl.int32)
    count = tl.where((count >> 1) < _MAX_COUNT, count + 2, count)
    tl.store(at, count.to(tl.int16), mask=is_drawn)


@triton.jit
def _penalise_rows_kernel(
    logits_ptr,  # in, out: [num_rows, vocab] fp32
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    presence_ptr,  # in: [num_slots] fp32
    frequency_ptr,  # in: [num_slots] fp32
    repetition_ptr,  # in: [num_slots] fp32
    counts_ptr,  # in: [num_slots, vocab] int16
    num_bias_ptr,  # in: [num_slots] int32
    bias_ids_ptr,  # in: [num_slots, max_bias] int32, -1 = unused
    bias_values_ptr,  # in: [num_slots, max_bias] fp32
    logits_stride,
    presence_stride,
    frequency_stride,
    repetition_stride,
    counts_stride,
    num_bias_stride,
    bias_ids_stride,
    bias_values_stride,
    vocab,
    BLOCK: tl.constexpr,
    MAX_BIAS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        row_ptr = logits_ptr + row * logits_stride
        presence = tl.load(presence_ptr + slot * presence_stride)
        frequency = tl.load(frequency_ptr + slot * frequency_stride)
        repetition = tl.load(repetition_ptr + slot * repetition_stride)
        if (presence != 0) | (frequency != 0) | (repetition != 1):
            ids = start + tl.arange(0, BLOCK)
            is_inside = ids < vocab
            x = tl.load(row_ptr + ids, mask=is_inside, other=0.0)
            held = tl.load(counts_ptr + slot * counts_stride + ids, mask=is_inside, other=0)
            held = held.to(tl.int32)
            count = held >> 1
            factor = tl.where(held > 0, repetition, 1.0)
            x = tl.where(x > 0, x / factor, x * factor)
            x -= frequency * count.to(tl.float32)
            x -= tl.where(count > 0, presence, 0.0)
            tl.store(row_ptr + ids, x, mask=is_inside)
        num_bias = tl.load(num_bias_ptr + slot * num_bias_stride)
        if num_bias > 0:
            # Each program adds the biases of its own tile, after all its threads have stored it.
            tl.debug_barrier()
            places = tl.arange(0, MAX_BIAS)
            biased = tl.load(
                bias_ids_ptr + slot * bias_ids_stride + places, mask=places < num_bias, other=-1
            )
            is_ours = (biased >= start) & (biased < start + BLOCK) & (biased < vocab)
            bias_at = bias_values_ptr + slot * bias_values_stride + places
            y = tl.load(row_ptr + biased, mask=is_ours, other=0.0)
            y += tl.load(bias_at, mask=is_ours, other=0.0)
            tl.store(row_ptr + biased, y, mask=is_ours)


def penalise_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
    repetition: torch.Tensor,
    counts: torch.Tensor,
    num_bias: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
) -> torch.Tensor:
    """Penalise in place the rows that ask for it, then add their logit bias; return logits.

    Args:
        logits: [num_rows, vocab] fp32; rows dense, at any stride.
        rows: [num_rows] int32, the slot of each row, -1 = padding.
        presence: [num_slots] fp32, 0 = off; like all tables with any stride of slots.
        frequency: [num_slots] fp32, 0 = off.
        repetition: [num_slots] fp32, above 0, 1 = off.
        counts: [num_slots, vocab] int16, of count_prompt and count_token_at.
        num_bias: [num_slots] int32, 0 = off.
        bias_ids: [num_slots, max_bias] int32, no token twice; the first num_bias count, and of
            these -1 or what is outside the vocabulary is passed over.
        bias_values: [num_slots, max_bias] fp32.
    """
    check_logits(logits)
    (num_rows, vocab), device = logits.shape, logits.device
    check_rows(rows, num_rows, device)
    num_slots = presence.shape[0] if presence.dim() == 1 else -1
    for name, table in (
        ("presence", presence),
        ("frequency", frequency),
        ("repetition", repetition),
    ):
        check_table(name, table, torch.float32, num_slots, device)
    check_table("counts", counts, torch.int16, num_slots, device, width=vocab)
    check_table("num_bias", num_bias, torch.int32, num_slots, device)
    max_bias = bias_ids.shape[1] if bias_ids.dim() == 2 else 0
    if not 1 <= max_bias <= MAX_BIAS:
        raise ValueError(
            f"bias_ids must be [num_slots, 1 to {MAX_BIAS}]; found {list(bias_ids.shape)}: "
            "refuse longer lists at the request"
        )
    check_table("bias_ids", bias_ids, torch.int32, num_slots, device, width=max_bias)
    check_table("bias_values", bias_values, torch.float32, num_slots, device, width=max_bias)
    if num_rows > 0:
        tables = (presence, frequency, repetition, counts, num_bias, bias_ids, bias_values)
        _penalise_rows_kernel[(num_rows, triton.cdiv(vocab, 4096))](
            logits, rows, *tables, logits.stride(0), *(table.stride(0) for table in tables), vocab,
            BLOCK=4096, MAX_BIAS=triton.next_power_of_2(max_bias), num_warps=4,
        )  # fmt: skip
    return logits


def count_prompt(
    counts: torch.Tensor,
    slot: int,
    prompt_ids: torch.Tensor,
    output_ids: torch.Tensor | None = None,
) -> None:
    """Start a slot anew: what its prompt holds, and how often it generated what, if resumed.

    Once a sequence, outside of graphs, hence plain torch; no value is read back.

    Args:
        counts: [num_slots, vocab] int16.
        slot: of the sequence.
        prompt_ids: [num_prompt] int64, on the device of counts.
        output_ids: [num_output] int64, tokens generated before a restart; None = none.
    """
    _check_counts(counts)
    times = torch.zeros(counts.shape[1], dtype=torch.int32, device=counts.device)
    if output_ids is not None:
        times.scatter_add_(0, output_ids, torch.ones_like(output_ids, dtype=torch.int32))
    held = times.clamp_(max=MAX_COUNT).mul_(2)
    held[prompt_ids] += 1
    counts[slot] = held.to(torch.int16)


def _check_counts(counts: torch.Tensor) -> None:
    if counts.dim() != 2 or counts.dtype != torch.int16 or counts.stride(1) != 1:
        raise ValueError(
            "counts must be [num_slots, vocab] int16 with dense rows; found "
            f"{counts.dtype} {list(counts.shape)}, strides {list(counts.stride())}: "
            "pass the engine's own table"
        )


#: A division and two subtractions in fp32; a GPU contracts multiply-subtract into one rounding.
TOLERANCE = {torch.float32: 1e-5}
