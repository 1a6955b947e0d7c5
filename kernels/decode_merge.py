"""The end of paged decode for a sequence cut in several shares: its partial results made one.

    out[s, h] = sum_i 2^(lse_i - m) mean_i / sum_i 2^(lse_i - m),    m = max_i lse_i

over the splits i of the sequence in the order of their shares, mean_i the weighted mean of V that
split i found and lse_i the log2 of its sum of weights. Partial results stand in DecodeWork, in the
slots that decode_work.py gives them.
Numerics: fp32, rounded once to the dtype of out. The order is fixed, so the result does not depend
on which program ended first.
`merge_splits_of` runs inside the attention kernel, by the last program of a sequence to arrive;
`merge_splits` is a launch of its own, for the measurement that compares the two.
"""

import torch

from headrace.kernels.decode_work import SEQUENCE_FIELDS, DecodeWork
from headrace.kernels.triton_seam import tl, triton

#: Splits that the merge holds in registers at once: 16 rows of a head are 8 KiB.
SPLITS_BLOCK = 16


def merge_splits_reference(
    partial: torch.Tensor,  # [num_splits, num_q_heads, head_dim] fp32, of one sequence
    partial_lse: torch.Tensor,  # [num_splits, num_q_heads] fp32
) -> torch.Tensor:
    """Return [num_q_heads, head_dim] fp32."""
    weights = torch.softmax(partial_lse * 0.6931471805599453, dim=0)
    return (weights[:, :, None] * partial).sum(0)


@triton.jit
def merge_splits_of(
    partial_ptr,
    partial_lse_ptr,
    first_share,
    last_share,
    head,
    num_q_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,  # splits held at once; more are taken in turns
) -> tl.tensor:
    """Return [DIM_BLOCK] fp32: the splits of one query head, weighted by their sums, in order."""
    splits, dims = tl.arange(0, SPLITS_BLOCK), tl.arange(0, DIM_BLOCK)
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([DIM_BLOCK], tl.float32)
    for chunk in range(first_share, last_share + 1, SPLITS_BLOCK):
        shares = chunk + splits
        rows = (2 * shares + (shares == first_share).to(tl.int32)) * num_q_heads + head
        is_live = shares <= last_share
        # Past the first cache level: other multiprocessors wrote these in this very launch.
        lse = tl.load(
            partial_lse_ptr + rows, mask=is_live, other=float("-inf"), cache_modifier=".cg"
        )
        partial = tl.load(
            partial_ptr + rows[:, None] * head_dim + dims[None, :],
            mask=is_live[:, None] & (dims < head_dim)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_best = tl.maximum(best, tl.max(lse, axis=0))
        weights = tl.exp2(lse - new_best)
        decay = tl.exp2(best - new_best)
        acc = acc * decay + tl.sum(partial * weights[:, None], axis=0)
        total = total * decay + tl.sum(weights, axis=0)
        best = new_best
    return acc / total


@triton.jit
def _merge_splits_kernel(
    sequences_ptr,  # in: [max_seqs, 8] int32, this and the next two as decode_work.py has them
    share_spans_ptr,  # in: [num_shares, 2] int32
    totals_ptr,  # in: [3] int32
    partial_ptr,  # in: [2 * num_shares, num_q_heads, head_dim] fp32
    partial_lse_ptr,  # in: [2 * num_shares, num_q_heads] fp32
    out_ptr,  # out: [num_tokens, num_q_heads, head_dim], rows of sequences in many shares
    num_q_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    FIELDS: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr,
) -> None:
    """One program: one query head of the sequence, if any, that ends in a share begun in another.

    The launch of its own that `_paged_decode_kernel` saves where it merges by itself.
    """
    share, head = tl.program_id(0), tl.program_id(1)
    first_item = tl.load(share_spans_ptr + 2 * share)
    if first_item >= tl.load(share_spans_ptr + 2 * share + 1):
        return
    quota = tl.load(totals_ptr)
    fields = sequences_ptr + FIELDS * first_item
    row = tl.load(fields).to(tl.int64)
    start = tl.load(fields + 1)
    first = tl.load(fields + 2)
    context_len = tl.load(fields + 3)
    first_share = start // quota
    last_share = (start + tl.cdiv(context_len - first // UNIT * UNIT, UNIT) - 1) // quota
    if first_share == share or last_share != share:
        return
    merged = merge_splits_of(
        partial_ptr, partial_lse_ptr, first_share, last_share, head,
        num_q_heads, head_dim, DIM_BLOCK, SPLITS_BLOCK,
    )  # fmt: skip
    dims = tl.arange(0, DIM_BLOCK)
    out_row = out_ptr + (row * num_q_heads + head) * head_dim
    tl.store(out_row + dims, merged.to(out_ptr.dtype.element_ty), mask=dims < head_dim)


def merge_splits(work: DecodeWork, out: torch.Tensor) -> None:
    """Merge every split sequence of the step.

    Args:
        work: planned, its partial results written by the attention launch before this one.
        out: [num_tokens, num_q_heads, head_dim], as that launch checked it.
    """
    num_q_heads, head_dim = out.shape[1:]
    _merge_splits_kernel[(work.num_shares, num_q_heads)](
        work.sequences, work.share_spans, work.totals, work.partial, work.partial_lse, out,
        num_q_heads=num_q_heads, head_dim=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim), UNIT=work.unit, FIELDS=SEQUENCE_FIELDS,
        SPLITS_BLOCK=SPLITS_BLOCK, num_warps=4,
    )  # fmt: skip


#: Sums of a few numbers in another order, rounded to the dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
