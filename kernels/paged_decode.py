"""Attention of one new token a sequence over its paged KV cache (decode).

    out[s, h] = softmax(scale * q[s, h] . K[s]) V[s]        over the positions the token may see

K[s], V[s] are the first context_lens[s] positions of sequence s, position p in block
block_tables[t, p // block_size] at offset p % block_size, t = table_rows[s] or s; the new token is
the last of them. With a window only positions > context_len - 1 - window are seen, as in
transformers, and blocks wholly behind the window are never read (their table entries may be -1).
Query head h reads KV head h // (num_q_heads / num_kv_heads).
The work is cut into equal shares by decode_work.py; one program takes one share of one KV head,
with the head's group of query heads packed into one tile, and a sequence cut in two or more is
merged by whichever of its programs ends last, in the order of its positions all the same.
Numerics: scores, softmax and sums in fp32, rounded once to q.dtype. An fp8 cache is multiplied in
fp16 (fp32 when q is fp32), its K scale times the softmax scale, its V scale on the sum.
Size: one operation whose launcher takes and checks eleven tensors; plan and merge are apart.
"""

import math
from dataclasses import dataclass

import torch

from headrace.kernels.cache_checks import check_attention, check_block_tables, check_caches
from headrace.kernels.checks import check_leading, check_tensor
from headrace.kernels.decode_merge import SPLITS_BLOCK, merge_splits, merge_splits_of
from headrace.kernels.decode_work import NO_WINDOW, SEQUENCE_FIELDS, DecodeWork, plan_decode
from headrace.kernels.triton_seam import is_interpreted, tl, triton


def paged_decode_reference(
    q: torch.Tensor,  # [num_tokens, num_q_heads, head_dim]
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # like k_cache
    block_tables: torch.Tensor,  # [num_slots, max_blocks] int32, -1 = unused
    context_lens: torch.Tensor,  # [num_seqs] int32 with the new token, 0 = padding row
    scale: float,
    window: int | None = None,  # positions seen, the token's own included; None = all
    *,
    table_rows: torch.Tensor | None = None,  # [num_seqs] int32, None = row i for sequence i
    k_scale: torch.Tensor | None = None,  # [num_kv_heads] fp32, of an fp8 cache
    v_scale: torch.Tensor | None = None,  # like k_scale
) -> torch.Tensor:
    """Return [num_tokens, num_q_heads, head_dim]; rows that decode nothing are zero."""
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    rows = range(len(context_lens)) if table_rows is None else table_rows.tolist()
    out = torch.zeros_like(q)
    for seq, context_len in enumerate(context_lens.tolist()):
        if context_len == 0:
            continue
        first = max(0, context_len - (window or NO_WINDOW))
        first_block = first // block_size
        blocks = block_tables[rows[seq], first_block : -(-context_len // block_size)].long()
        seen = slice(first - first_block * block_size, context_len - first_block * block_size)
        k = k_cache[blocks].flatten(0, 1)[seen].transpose(0, 1).float()
        v = v_cache[blocks].flatten(0, 1)[seen].transpose(0, 1).float()
        k = k if k_scale is None else k * k_scale[:, None, None]
        v = v if v_scale is None else v * v_scale[:, None, None]
        grouped_q = q[seq].view(num_kv_heads, -1, head_dim).float()
        weights = torch.softmax(grouped_q @ k.transpose(1, 2) * scale, dim=-1)
        out[seq] = (weights @ v).reshape(-1, head_dim).to(q.dtype)
    return out


@triton.jit
def _unpack_pairs(
    pairs,  # uint16, two e4m3 numbers, the even one in the low byte
    dtype: tl.constexpr,
    IN_PTX: tl.constexpr,  # two pairs to a register: a third of the instructions, and fp16 only
) -> tuple[tl.tensor, tl.tensor]:
    """Return the even and the odd numbers, converted exactly."""
    if IN_PTX:
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes;
            .reg .b16 even, odd, rest;
            prmt.b32 bytes, $2, 0, 0x4420;
            mov.b32 {even, rest}, bytes;
            prmt.b32 bytes, $2, 0, 0x4431;
            mov.b32 {odd, rest}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, even;
            cvt.rn.f16x2.e4m3x2 $1, odd;
            }
            """,
            constraints="=r,=r,r",
            args=[pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        even = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(dtype)
        odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(dtype)
    return even, odd


@triton.jit
def _attend(
    q,  # [GROUP_BLOCK, DIM_BLOCK], of the dtype to multiply in
    k_ptr,  # the KV head's part of the cache
    v_ptr,
    table_ptr,  # the sequence's row
    begin,  # first position
    end,
    k_block_stride,
    k_position_stride,
    v_block_stride,
    v_position_stride,
    scale_log2,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    UNPACKS_IN_PTX: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Attend over [begin, end), at least one position: (weighted mean of V, log2 of the sum).

    One loop with masks, rather than a plain one and another for the ends: a second loop would
    empty and refill the pipeline of loads, which costs more than comparing positions.
    """
    lanes = tl.arange(0, TILE)
    # Bytes are transposed for the second product in pairs, as tensor cores' loads move 16 bits: an
    # fp8 V is read as pairs of dims, the even and the odd ones multiplied apart.
    is_paired: tl.constexpr = v_ptr.dtype.element_ty.primitive_bitwidth == 8
    num_parts: tl.constexpr = 2 if is_paired else 1
    dims = tl.arange(0, DIM_BLOCK)
    v_dims = tl.arange(0, DIM_BLOCK // num_parts)
    if is_paired:
        v_ptr = v_ptr.to(tl.pointer_type(tl.uint16))
    k_offsets = lanes[:, None] * k_position_stride + dims[None, :]
    v_offsets = lanes[:, None] * (v_position_stride // num_parts) + v_dims[None, :]
    row_max = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    # Summed over a tile's lanes at the end only: a sum across warps costs two barriers.
    sums = tl.zeros([GROUP_BLOCK, TILE], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM_BLOCK // num_parts], tl.float32)
    odd_acc = acc
    # A tile ahead by hand: Triton's pipeline would spend one of its stages on the block ids.
    next_block = tl.load(table_ptr + begin // block_size)
    for tile in range(begin // TILE * TILE, end, TILE):
        block = next_block.to(tl.int64)
        next_tile = tile + TILE
        next_block = tl.load(table_ptr + next_tile // block_size, mask=next_tile < end, other=0)
        in_block = tile % block_size
        k_start = block * k_block_stride + in_block * k_position_stride
        v_start = (block * v_block_stride + in_block * v_position_stride) // num_parts
        is_seen = (tile + lanes >= begin) & (tile + lanes < end)
        is_k = is_seen[:, None]
        is_v = is_seen[:, None]
        if head_dim < DIM_BLOCK:
            is_k = is_k & (dims < head_dim)[None, :]
            is_v = is_v & (v_dims < head_dim // num_parts)[None, :]
        k = tl.load(k_ptr + k_start + k_offsets, mask=is_k, other=0.0).to(q.dtype)
        v = tl.load(v_ptr + v_start + v_offsets, mask=is_v, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        # Every tile holds a position of [begin, end), so the maximum is finite.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        sums = sums * decay[:, None] + weights
        row_max = new_max
        weights = weights.to(q.dtype)
        acc *= decay[:, None]
        if is_paired:
            v, odd_v = _unpack_pairs(v, q.dtype, UNPACKS_IN_PTX)
            odd_acc = odd_acc * decay[:, None] + tl.dot(weights, odd_v, input_precision="ieee")
        acc += tl.dot(weights, v.to(q.dtype), input_precision="ieee")
    if is_paired:
        acc = tl.join(acc, odd_acc).reshape(GROUP_BLOCK, DIM_BLOCK)
    row_sum = tl.sum(sums, axis=1)
    return acc / row_sum[:, None], row_max + tl.log2(row_sum)


@triton.jit
def _paged_decode_kernel(
    q_ptr,  # in: [num_tokens, num_q_heads, head_dim]
    k_cache_ptr,  # in: [num_blocks, block_size, num_kv_heads, head_dim], strides below
    v_cache_ptr,  # in: like k_cache
    k_scale_ptr,  # in: [num_kv_heads] fp32, or None
    v_scale_ptr,  # in: like k_scale
    block_tables_ptr,  # in: [num_slots, max_blocks] int32, stride below
    sequences_ptr,  # in: [max_seqs, 8] int32, this and the next two as decode_work.py has them
    share_spans_ptr,  # in: [num_shares, 2] int32
    totals_ptr,  # in: [3] int32
    arrivals_ptr,  # in/out: [num_shares, num_kv_heads] int32, zero before and after
    partial_ptr,  # out: [2 * num_shares, num_q_heads, head_dim] fp32, of sequences in many shares
    partial_lse_ptr,  # out: [2 * num_shares, num_q_heads] fp32
    out_ptr,  # out: [num_tokens, num_q_heads, head_dim], the first num_seqs rows
    table_stride,
    k_block_stride,
    k_position_stride,
    k_head_stride,
    v_block_stride,
    v_position_stride,
    v_head_stride,
    scale_log2,  # scale * log2(e), as exp2 is the cheaper exponential
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,  # query heads a KV head, up to the next power of two >= 16
    DIM_BLOCK: tl.constexpr,  # head_dim, up to the next power of two
    TILE: tl.constexpr,  # positions a tile; divides block_size, so a tile lies in one block
    UNIT: tl.constexpr,  # positions; this and the next are the work list's
    FIELDS: tl.constexpr,
    MERGES: tl.constexpr,  # whether the last program of a sequence merges its splits
    SPLITS_BLOCK: tl.constexpr,
    MULTIPLIES_IN: tl.constexpr,  # dtype of the operands of both products
    UNPACKS_IN_PTX: tl.constexpr,  # an fp8 V, where the machine has PTX and multiplies in fp16
) -> None:
    """One program: one share of one KV head."""
    kv_head = tl.program_id(0) % num_kv_heads
    share = tl.program_id(0) // num_kv_heads
    num_shares = tl.num_programs(0) // num_kv_heads
    group: tl.constexpr = num_q_heads // num_kv_heads
    in_group = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    heads = kv_head * group + in_group
    is_q = (in_group < group)[:, None] & (dims < head_dim)[None, :]
    v_scale = 1.0
    if k_scale_ptr is not None:
        scale_log2 *= tl.load(k_scale_ptr + kv_head)
        v_scale = tl.load(v_scale_ptr + kv_head)
    quota = tl.load(totals_ptr)
    first_item = tl.load(share_spans_ptr + 2 * share)
    end_item = tl.load(share_spans_ptr + 2 * share + 1)
    for item in range(first_item, end_item):
        fields = sequences_ptr + FIELDS * item
        row = tl.load(fields).to(tl.int64)
        start = tl.load(fields + 1)
        first = tl.load(fields + 2)
        context_len = tl.load(fields + 3)
        table_row = tl.load(fields + 4).to(tl.int64)
        origin = first // UNIT * UNIT
        begin = tl.maximum(origin + (share * quota - start) * UNIT, first)
        end = tl.minimum(origin + ((share + 1) * quota - start) * UNIT, context_len)
        q_offsets = (row * num_q_heads + heads)[:, None] * head_dim + dims[None, :]
        q = tl.load(q_ptr + q_offsets, mask=is_q, other=0.0)
        if k_scale_ptr is not None:
            q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0)
        mean, lse = _attend(
            q.to(MULTIPLIES_IN), k_cache_ptr + kv_head * k_head_stride,
            v_cache_ptr + kv_head * v_head_stride, block_tables_ptr + table_row * table_stride,
            begin, end, k_block_stride, k_position_stride, v_block_stride, v_position_stride,
            scale_log2, head_dim, block_size, GROUP_BLOCK, DIM_BLOCK, TILE, UNPACKS_IN_PTX,
        )  # fmt: skip
        mean *= v_scale

        first_share = start // quota
        last_share = (start + tl.cdiv(context_len - origin, UNIT) - 1) // quota
        if first_share == last_share:
            tl.store(out_ptr + q_offsets, mean.to(out_ptr.dtype.element_ty), mask=is_q)
        else:
            slot = 2 * share + (share == first_share).to(tl.int32)
            rows = slot * num_q_heads + heads
            tl.store(partial_ptr + rows[:, None] * head_dim + dims[None, :], mean, mask=is_q)
            tl.store(partial_lse_ptr + rows, lse, mask=in_group < group)
            if MERGES:
                # The barrier puts every thread's stores before the one thread's release.
                tl.debug_barrier()
                arrivals = arrivals_ptr + last_share * num_kv_heads + kv_head
                arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
                if arrived == last_share - first_share:
                    tl.store(arrivals, 0)
                    for head in range(kv_head * group, kv_head * group + group):
                        merged = merge_splits_of(
                            partial_ptr, partial_lse_ptr, first_share, last_share, head,
                            num_q_heads, head_dim, DIM_BLOCK, SPLITS_BLOCK,
                        )  # fmt: skip
                        out_row = out_ptr + (row * num_q_heads + head) * head_dim
                        merged = merged.to(out_ptr.dtype.element_ty)
                        tl.store(out_row + dims, merged, mask=dims < head_dim)

    # Padding rows lie behind the live ones in the list: without any, this costs two loads.
    num_live = tl.load(totals_ptr + 1)
    num_seqs = tl.load(totals_ptr + 2)
    nothing = tl.zeros([GROUP_BLOCK, DIM_BLOCK], out_ptr.dtype.element_ty)
    for at in range(num_live + share * GROUP_BLOCK, num_seqs, num_shares * GROUP_BLOCK):
        is_row = at + in_group < num_seqs
        rows = tl.load(sequences_ptr + FIELDS * (at + in_group), mask=is_row, other=0).to(tl.int64)
        is_padding = is_row[:, None] & (dims < head_dim)[None, :]
        for head in range(kv_head * group, kv_head * group + group):
            offsets = (rows * num_q_heads + head)[:, None] * head_dim + dims[None, :]
            tl.store(out_ptr + offsets, nothing, mask=is_padding)


@dataclass(frozen=True, slots=True)
class DecodeTuning:
    """What a measurement decides; the result is the same but for rounding."""

    tile: int  # positions a tile, at most block_size
    num_warps: int = 4
    num_stages: int = 3  # tiles of K and V in flight, and the one at work
    merges_inside: bool = True  # in the same launch, else in a second one
    #: What lets as many programs be resident as DecodeWork was told; None = the compiler's choice.
    max_registers: int | None = None


def choose_tuning(head_dim: int, element_bytes: int, block_size: int) -> DecodeTuning:
    """Return the default: two programs a multiprocessor fit, with 64 KiB and more in flight."""
    row_bytes = triton.next_power_of_2(head_dim) * element_bytes
    tile = min(16384 // row_bytes, block_size, 128)
    return DecodeTuning(tile, num_stages=3 if tile * row_bytes >= 16384 else 4)


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int | None = None,
    out: torch.Tensor | None = None,
    *,
    table_rows: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    work: DecodeWork | None = None,
    tuning: DecodeTuning | None = None,
) -> torch.Tensor:
    """Attend from one new token a sequence to its paged context.

    Args:
        q: [num_tokens, num_q_heads, head_dim], contiguous; head_dim 64, 96, 128 or 256. Rows from
            num_seqs on are neither read nor written.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], any strides but the last; dtype
            of q, or float8_e4m3fn with scales.
        v_cache: like k_cache.
        block_tables: [num_slots, max_blocks] int32, any row stride; entries of unseen blocks are
            never read through.
        context_lens: [num_seqs] int32 with the new token, 0 = padding row, which comes out zero.
        scale: of the scores, usually head_dim ** -0.5.
        window: positions seen, the token's own included; None = all.
        out: like q. Allocated when None.
        table_rows: [num_seqs] int32, row of the block tables; None = row i for sequence i. With
            `work` it belongs to plan_decode.
        k_scale: [num_kv_heads] fp32, value = stored * scale.
        v_scale: like k_scale.
        work: planned for these context_lens by plan_decode; None = planned here, a launch more.
        tuning: None = choose_tuning.
    """
    check_leading("q", q, 3)
    num_q_heads, head_dim = q.shape[1:]
    caches, scales = (k_cache, v_cache), (k_scale, v_scale)
    check_caches((num_q_heads, head_dim), q.dtype, q.device, caches, scales)
    block_size, num_kv_heads = k_cache.shape[1:3]
    check_attention(num_q_heads, num_kv_heads, head_dim, block_size, window)
    out = torch.empty_like(q) if out is None else out
    check_tensor("out", out, tuple(q.shape), q.dtype, q.device)
    tuning = tuning or choose_tuning(head_dim, k_cache.element_size(), block_size)
    if tuning.tile < 16 or block_size % tuning.tile:
        raise ValueError(
            f"tile must be at least 16 and divide block_size; found {tuning.tile} and "
            f"{block_size}: leave tuning out to have it chosen"
        )
    num_seqs = _check_rows(q, block_tables, context_lens, table_rows, is_free=work is not None)
    if k_scale is not None and any(stride % 2 for stride in v_cache.stride()[:3]):
        raise ValueError(
            "v_cache must have even strides, as an fp8 V is read in pairs; found "
            f"{list(v_cache.stride())}: keep whole heads together in memory"
        )
    if num_seqs == 0:
        return out
    if work is None:
        heads = (num_q_heads, num_kv_heads, head_dim)
        work = DecodeWork.allocate(num_seqs, heads, q.device, window)
        plan_decode(work, context_lens, table_rows)
    elif table_rows is not None:
        raise ValueError(
            "table_rows must be given to plan_decode where work is given; found both here: "
            "leave table_rows out"
        )
    _check_work(work, num_seqs, (num_q_heads, num_kv_heads, head_dim), window)
    multiplies_in = {torch.float32: tl.float32, torch.float16: tl.float16}.get(q.dtype, tl.bfloat16)
    if q.dtype != torch.float32 and k_scale is not None:
        multiplies_in = tl.float16
    if q.dtype == torch.bfloat16 and is_interpreted():
        multiplies_in = tl.float32  # the interpreter multiplies bf16 wrongly
    _paged_decode_kernel[(work.num_shares * num_kv_heads,)](
        q, k_cache, v_cache, k_scale, v_scale, block_tables, work.sequences, work.share_spans,
        work.totals, work.arrivals, work.partial, work.partial_lse, out, block_tables.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3], scale * math.log2(math.e),
        num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size,
        GROUP_BLOCK=max(16, triton.next_power_of_2(num_q_heads // num_kv_heads)),
        DIM_BLOCK=triton.next_power_of_2(head_dim), TILE=tuning.tile, UNIT=work.unit,
        FIELDS=SEQUENCE_FIELDS, MERGES=tuning.merges_inside, SPLITS_BLOCK=SPLITS_BLOCK,
        MULTIPLIES_IN=multiplies_in, num_warps=tuning.num_warps, num_stages=tuning.num_stages,
        UNPACKS_IN_PTX=multiplies_in == tl.float16 and not is_interpreted(),
        maxnreg=tuning.max_registers,
    )  # fmt: skip
    if not tuning.merges_inside:
        merge_splits(work, out)
    return out


def _check_rows(
    q: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    table_rows: torch.Tensor | None,
    is_free: bool,  # a table has rows as plan_decode was told, not one a sequence
) -> int:
    """Return num_seqs, or raise ValueError for rows that do not fit each other."""
    num_seqs = context_lens.shape[0] if context_lens.dim() == 1 else -1
    check_tensor("context_lens", context_lens, (num_seqs,), torch.int32, q.device)
    if num_seqs > q.shape[0]:
        raise ValueError(
            f"q must have a row for each of {num_seqs} sequences; found {q.shape[0]}: "
            "pass the context_lens of this step"
        )
    num_rows = None if is_free or table_rows is not None else num_seqs
    check_block_tables(block_tables, q.device, num_rows)
    if table_rows is not None:
        check_tensor("table_rows", table_rows, (num_seqs,), torch.int32, q.device)
    return num_seqs


def _check_work(
    work: DecodeWork, num_seqs: int, heads: tuple[int, int, int], window: int | None
) -> None:
    """Raise ValueError for a work list that was allocated for something else."""
    num_q_heads, num_kv_heads, head_dim = heads
    found = (*work.partial.shape[1:], work.arrivals.shape[1], work.window)
    wanted = (num_q_heads, head_dim, num_kv_heads, window)
    if found != wanted or num_seqs > work.sequences.shape[0]:
        raise ValueError(
            "work must be allocated for (num_q_heads, head_dim, num_kv_heads, window) "
            f"{wanted} and {num_seqs} sequences; found {found} and {work.sequences.shape[0]}: "
            "allocate one for each distinct window and shape"
        )


#: Sums of products of unit normals in another order; weights are rounded to the dtype before they
#: meet V, and the result once more.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
