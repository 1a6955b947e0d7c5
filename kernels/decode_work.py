"""The work list of paged decode: a step's KV cut into equal shares, on the device, once a step.

The seen positions of all sequences are laid end to end on one line, counted in units of `unit`
positions, each sequence followed by `overhead` empty units (what starting on a sequence costs).
The line is cut every `quota` units, quota = ceil(total / num_shares): share i is [i * quota,
(i + 1) * quota), and one program a KV head attends over all that falls into it. So every program
moves the same bytes whatever the lengths are; a sequence that crosses a cut is split there.

    unit u of a sequence that starts at `start` on the line lies in share (start + u) // quota
    its positions are [origin + u * unit, origin + (u + 1) * unit), origin = first // unit * unit,
    without those before `first`, the first that the window shows, and from context_len on

Invariants:
1. Every seen position of every sequence lies in exactly one share; padding rows lie in none.
2. The list is a pure function of the lengths, made without the host: fixed grid, fixed order.
3. At most one sequence ends in a share in which it did not begin, and at most one goes on from it
   into the next: so two partial results a share are enough, slot 2 * share for the continued one
   and 2 * share + 1 for the one begun, and a split sequence is named by the share it ends in.
4. `arrivals` is all zero between launches: the last program to arrive puts its zero back.

Numerics: integers, so the kernel equals its reference exactly.
Called by the engine (one work list for each distinct window) and by `paged_decode`.
"""

from dataclasses import dataclass

import torch

from headrace.kernels.checks import check_tensor
from headrace.kernels.triton_seam import tl, triton

#: A window that hides nothing: beyond any context, and far from where int32 positions overflow.
NO_WINDOW = 1 << 30

#: Int32 fields of a sequence in the list, and how far apart two sequences lie (one memory sector):
#: row, start on the line, first seen position, context_len, row of the block tables.
SEQUENCE_FIELDS = 8


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """Fixed device buffers for one window: written by plan_decode, read by every layer's launch."""

    window: int | None  # positions seen, the token's own included; None = all
    unit: int  # positions; cuts lie at its multiples
    overhead: int  # units that a sequence costs beside its positions
    min_share: int  # units a share has at least, so that short steps are not cut to crumbs
    sequences: torch.Tensor  # [max_seqs, 8] int32, in row order: live ones, then padding rows
    share_spans: torch.Tensor  # [num_shares, 2] int32, first sequence of the share and end
    totals: torch.Tensor  # [3] int32: quota (units a share), live sequences, num_seqs
    arrivals: torch.Tensor  # [num_shares, num_kv_heads] int32, see invariant 4
    partial: torch.Tensor  # [2 * num_shares, num_q_heads, head_dim] fp32
    partial_lse: torch.Tensor  # [2 * num_shares, num_q_heads] fp32, log2 of the sum of weights

    @property
    def num_shares(self) -> int:
        return self.share_spans.shape[0]

    @classmethod
    def allocate(
        cls,
        max_seqs: int,
        heads: tuple[int, int, int],  # (num_q_heads, num_kv_heads, head_dim)
        device: torch.device,
        window: int | None = None,
        *,
        num_shares: int | None = None,  # None = choose_num_shares
        unit: int = 16,
        overhead: int = 2,
        min_share: int = 4,
    ) -> "DecodeWork":
        num_q_heads, num_kv_heads, head_dim = heads
        num_shares = choose_num_shares(num_kv_heads, device) if num_shares is None else num_shares
        if min(max_seqs, num_shares, unit, min_share) < 1 or overhead < 0:
            raise ValueError(
                "max_seqs, num_shares, unit and min_share must be at least 1 and overhead at least "
                f"0; found {max_seqs}, {num_shares}, {unit}, {min_share} and {overhead}: leave out "
                "all but max_seqs to have them chosen"
            )
        if window is not None and window < 1:
            raise ValueError(
                f"window must be at least 1 (the token itself) or None; found {window}: "
                "pass None for full attention"
            )

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def fp32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return cls(
            window, unit, overhead, min_share, int32(max_seqs, SEQUENCE_FIELDS),
            int32(num_shares, 2), int32(3), int32(num_shares, num_kv_heads),
            fp32(2 * num_shares, num_q_heads, head_dim), fp32(2 * num_shares, num_q_heads),
        )  # fmt: skip


def choose_num_shares(num_kv_heads: int, device: torch.device, programs_per_sm: int = 2) -> int:
    """Return how many shares fill the device: as many programs as are resident at once."""
    if device.type != "cuda":
        return 4
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(programs_per_sm * num_sms // num_kv_heads, 1)


def plan_decode_reference(
    context_lens: list[int],  # [num_seqs], 0 = padding row
    work: DecodeWork,  # its numbers, not its buffers
) -> list[tuple[int, int, int, int]]:
    """Return the items in order: (share, row, first position, end)."""
    lines, total = [], 0
    for row, context_len in enumerate(context_lens):
        first = max(context_len - (work.window or NO_WINDOW), 0)
        origin = first // work.unit * work.unit
        if context_len > 0:
            lines.append((row, total, first, context_len, origin))
            total += -(-(context_len - origin) // work.unit) + work.overhead
    quota = max(-(-total // work.num_shares), work.min_share)
    items = []
    for share in range(work.num_shares):
        for row, start, first, context_len, origin in lines:
            begin = max(origin + (share * quota - start) * work.unit, first)
            end = min(origin + ((share + 1) * quota - start) * work.unit, context_len)
            if begin < end:
                items.append((share, row, begin, end))
    return items


@triton.jit
def _plan_decode_kernel(
    context_lens_ptr,  # in: [num_seqs] int32
    table_rows_ptr,  # in: [num_seqs] int32, or None
    sequences_ptr,  # out: [max_seqs, 8] int32, the first num_seqs
    share_spans_ptr,  # out: [num_shares, 2] int32
    totals_ptr,  # out: [3] int32
    num_seqs,
    window,
    OVERHEAD: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    UNIT: tl.constexpr,
    FIELDS: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,  # max_seqs, up to the next power of two
) -> None:
    """One program a share: each sums all lengths up again, which is quicker than waiting."""
    share = tl.program_id(0)
    rows = tl.arange(0, ROWS_BLOCK)
    context_len = tl.load(context_lens_ptr + rows, mask=rows < num_seqs, other=0)
    first = tl.maximum(context_len - window, 0)
    is_live = (context_len > 0).to(tl.int32)
    units = tl.cdiv(context_len - first // UNIT * UNIT, UNIT) * is_live
    weights = units + OVERHEAD * is_live
    starts = tl.cumsum(weights, axis=0) - weights
    quota = tl.maximum(tl.cdiv(tl.sum(weights, axis=0), tl.num_programs(0)), MIN_SHARE)

    begins_before_end = is_live * (starts < (share + 1) * quota).to(tl.int32)
    ends_before = is_live * (starts + units <= share * quota).to(tl.int32)
    tl.store(share_spans_ptr + 2 * share, tl.sum(ends_before, axis=0))
    tl.store(share_spans_ptr + 2 * share + 1, tl.sum(begins_before_end, axis=0))
    if share == 0:
        num_live = tl.sum(is_live, axis=0)
        tl.store(totals_ptr, quota)
        tl.store(totals_ptr + 1, num_live)
        tl.store(totals_ptr + 2, num_seqs)
        live_rank = tl.cumsum(is_live, axis=0) - 1
        rank = tl.where(is_live > 0, live_rank, num_live + rows - 1 - live_rank)
        fields = sequences_ptr + FIELDS * rank
        tl.store(fields, rows, mask=rows < num_seqs)
        tl.store(fields + 1, starts, mask=rows < num_seqs)
        tl.store(fields + 2, first, mask=rows < num_seqs)
        tl.store(fields + 3, context_len, mask=rows < num_seqs)
        table_rows = rows
        if table_rows_ptr is not None:
            table_rows = tl.load(table_rows_ptr + rows, mask=rows < num_seqs, other=0)
        tl.store(fields + 4, table_rows, mask=rows < num_seqs)


def plan_decode(
    work: DecodeWork, context_lens: torch.Tensor, table_rows: torch.Tensor | None = None
) -> None:
    """Make the work list of this step; one launch, before the first layer.

    Args:
        work: buffers of at least as many sequences, on the device of the lengths.
        context_lens: [num_seqs] int32 with the new token, 0 = padding row.
        table_rows: [num_seqs] int32, row of the block tables; None = row i for sequence i.
    """
    device, max_seqs = work.sequences.device, work.sequences.shape[0]
    num_seqs = context_lens.shape[0] if context_lens.dim() == 1 else -1
    check_tensor("context_lens", context_lens, (num_seqs,), torch.int32, device)
    if num_seqs > max_seqs:
        raise ValueError(
            f"context_lens must have at most {max_seqs} rows, as the work list was allocated for; "
            f"found {num_seqs}: allocate it for the largest step"
        )
    if table_rows is not None:
        check_tensor("table_rows", table_rows, (num_seqs,), torch.int32, device)
    _plan_decode_kernel[(work.num_shares,)](
        context_lens, table_rows, work.sequences, work.share_spans, work.totals, num_seqs,
        work.window or NO_WINDOW, OVERHEAD=work.overhead, MIN_SHARE=work.min_share,
        UNIT=work.unit, FIELDS=SEQUENCE_FIELDS, ROWS_BLOCK=triton.next_power_of_2(max_seqs),
        num_warps=4,
    )  # fmt: skip


#: Integers are equal or wrong.
TOLERANCE = {torch.int32: 0}
