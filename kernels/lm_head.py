"""The last product of a step and the draw from it, without logits in memory.

    logit = x . weight[token]                                    fp32 sums of 16-bit products
    score = logit                                                temperature 0
    score = logit / temperature - log(-log(noise(seed, position, token)))    otherwise
    token = the lowest of those with the largest score

For rows that ask for no filter, penalty, bias or log-probability; others need their logits
(sample.py). Each program takes tiles of the vocabulary, keeps the best of each row over its tiles,
and a second, small launch takes the best of the programs. The vocabulary is the long side of the
tile, so that a batch of one and of a thousand differ only in how wide it is.

Invariants:
1. Of equal scores the lowest token id wins, in whatever order the tiles are done.
2. A row whose logits hold a NaN, or whose largest is infinite, has is_finite 0 and token 0.
3. A padding row (slot -1) has token -1 and is_finite 1; a tile of padding rows reads no weight.

Numerics: fp32 sums, scores and noise; fp32 products are exact ("ieee"). The noise is that of
noise.py. Must move: the weight once (vocab x hidden x 2 bytes), which bounds batches to about 150.
"""

from dataclasses import dataclass

import torch

from headrace.kernels.checks import check_leading, check_rows, check_table, check_tensor
from headrace.kernels.noise import gumbel_of, noise_keys, noise_reference
from headrace.kernels.triton_seam import is_interpreted, tl, triton

#: Lowest temperature divided by, so that a finite logit never becomes infinite.
MIN_TEMPERATURE = 1e-30
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)  # pyright: ignore[reportCallIssue]
_NO_ID = tl.constexpr(0x7FFFFFFF)  # pyright: ignore[reportCallIssue]


def lm_head_draw_reference(
    x: torch.Tensor,  # [num_rows, hidden]
    weight: torch.Tensor,  # [vocab, hidden]
    temperature: torch.Tensor,  # [num_rows] fp32, 0 = greedy
    seeds: torch.Tensor,  # [num_rows] int64
    positions: torch.Tensor,  # [num_rows] int64, index of the token being drawn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens: [num_rows] int64, scores: [num_rows, vocab] fp32)."""
    logits = x.float() @ weight.float().t()
    gumbel = -torch.log(-torch.log(noise_reference(seeds, positions, weight.shape[0])))
    drawn = logits / temperature.clamp(min=MIN_TEMPERATURE)[:, None] + gumbel
    scores = torch.where(temperature[:, None] == 0, logits, drawn)
    return scores.argmax(dim=-1), scores


#: multiprocessors of the GPU that tiles were measured on (H100, H200): one program each.
NUM_SMS = 132


@dataclass(frozen=True, slots=True)
class LmHeadTile:
    """How the product is cut up: a program's share and the means it is given."""

    block_v: int  # tokens a tile
    block_b: int  # rows a tile
    block_k: int  # of hidden, read at a time
    num_warps: int
    num_stages: int
    max_parts: int = 1 << 30  # programs that share the vocabulary; fewer than tiles = persistent


def default_tile(num_rows: int, dtype: torch.dtype) -> LmHeadTile:
    """Choose by the batch: narrow tiles stream the weight, wide ones feed the tensor cores."""
    if dtype == torch.float32:
        return LmHeadTile(64, 16, 32, 4, 3)
    if num_rows <= 16:
        return LmHeadTile(128, 16, 128, 8, 3)
    if num_rows <= 32:
        return LmHeadTile(64, 32, 128, 4, 4)
    if num_rows <= 64:
        return LmHeadTile(128, 64, 64, 4, 4)
    return LmHeadTile(128, 128, 64, 8, 4, NUM_SMS)


@dataclass(frozen=True, slots=True)
class LmHeadWork:
    """Memory between the two launches; its contents mean nothing outside of them."""

    scores: torch.Tensor  # [num_parts * max_rows] fp32, the best of each part and row
    ids: torch.Tensor  # [num_parts * max_rows] int32, whose it is


def lm_head_work(max_rows: int, vocab: int, device: torch.device) -> LmHeadWork:
    """Allocate the work memory for up to max_rows, with any tile of 64 tokens or more."""
    size = triton.cdiv(vocab, 64) * max_rows
    return LmHeadWork(
        torch.empty(size, dtype=torch.float32, device=device),
        torch.empty(size, dtype=torch.int32, device=device),
    )


@triton.jit
def _tile_logits(
    x_ptrs,  # [BLOCK_B, BLOCK_K]
    weight_ptrs,  # [BLOCK_V, BLOCK_K]
    HIDDEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """Multiply one tile of rows with one of the weight: [BLOCK_B, BLOCK_V] fp32.

    The tensor cores want 64 of one side. From 64 rows on that is the rows, as a thread then holds
    few rows and their keys stay in registers; below, it is the vocabulary.
    """
    rows_first: tl.constexpr = BLOCK_B >= 64
    if rows_first:
        acc = tl.zeros([BLOCK_B, BLOCK_V], tl.float32)
    else:
        acc = tl.zeros([BLOCK_V, BLOCK_B], tl.float32)
    for start in tl.range(0, HIDDEN, BLOCK_K):
        if HIDDEN % BLOCK_K == 0:
            weight, x = tl.load(weight_ptrs + start), tl.load(x_ptrs + start)
        else:
            is_inside = (start + tl.arange(0, BLOCK_K) < HIDDEN)[None, :]
            weight = tl.load(weight_ptrs + start, mask=is_inside, other=0.0)
            x = tl.load(x_ptrs + start, mask=is_inside, other=0.0)
        if UPCAST:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        if rows_first:
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(weight, x.T, acc, input_precision="ieee")
    if rows_first:
        return acc
    else:
        return acc.T


@triton.jit
def _lm_head_kernel(
    x_ptr,  # in: [num_rows, HIDDEN]
    weight_ptr,  # in: [vocab, HIDDEN]
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    temperature_ptr,  # in: [num_slots] fp32
    seeds_ptr,  # in: [num_slots, 2] int32
    num_output_ptr,  # in: [num_slots] int32
    scores_ptr,  # out: [num_parts, num_rows] fp32
    ids_ptr,  # out: [num_parts, num_rows] int32
    temperature_stride,
    seeds_stride,
    num_output_stride,
    num_rows,
    vocab,
    HIDDEN: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    # Rows vary fastest: programs that read the same weight run at the same time.
    batch = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    part = tl.program_id(1)
    slots = tl.load(rows_ptr + batch, mask=batch < num_rows, other=-1)
    if tl.max(slots, axis=0) >= 0:
        is_row = slots >= 0
        temperature = tl.load(
            temperature_ptr + slots.to(tl.int64) * temperature_stride, mask=is_row, other=0.0
        )
        is_drawn = temperature > 0
        seed_ptrs = seeds_ptr + slots.to(tl.int64) * seeds_stride
        key_a, key_b = noise_keys(
            tl.load(seed_ptrs, mask=is_row, other=0),
            tl.load(seed_ptrs + 1, mask=is_row, other=0),
            tl.load(num_output_ptr + slots.to(tl.int64) * num_output_stride, mask=is_row, other=0),
        )
        divisor = tl.where(is_drawn, tl.maximum(temperature, _MIN_TEMPERATURE), 1.0)
        any_drawn = tl.max(is_drawn.to(tl.int32), axis=0) > 0
        depth = tl.arange(0, BLOCK_K)
        # Rows and tokens outside are read from the last inside: no masks in the loop.
        safe_batch = tl.minimum(batch, num_rows - 1).to(tl.int64)
        x_ptrs = x_ptr + safe_batch[:, None] * HIDDEN + depth[None, :]
        best = tl.full([BLOCK_B], float("-inf"), tl.float32)
        best_id = tl.full([BLOCK_B], _NO_ID, tl.int32)
        for tile in range(part, tl.cdiv(vocab, BLOCK_V), tl.num_programs(1)):
            ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            safe_ids = tl.minimum(ids, vocab - 1).to(tl.int64)
            weight_ptrs = weight_ptr + safe_ids[:, None] * HIDDEN + depth[None, :]
            score = _tile_logits(x_ptrs, weight_ptrs, HIDDEN, BLOCK_V, BLOCK_B, BLOCK_K, UPCAST)
            if any_drawn:
                gumbel = gumbel_of(key_a[:, None], key_b[:, None], ids[None, :])
                score = tl.where(is_drawn[:, None], score / divisor[:, None] + gumbel, score)
            # A NaN becomes infinity, which the largest score cannot hide.
            score = tl.where(score != score, float("inf"), score)
            score = tl.where((ids < vocab)[None, :], score, float("-inf"))
            tile_best = tl.max(score, axis=1)
            tile_id = tl.min(tl.where(score == tile_best[:, None], ids[None, :], _NO_ID), axis=1)
            # Tiles come in rising order, so an equal score here has the higher id.
            best_id = tl.where(tile_best > best, tile_id, best_id)
            best = tl.maximum(best, tile_best)
        at = part * num_rows + batch
        tl.store(scores_ptr + at, best, mask=batch < num_rows)
        tl.store(ids_ptr + at, best_id, mask=batch < num_rows)


@triton.jit
def _lm_head_pick_kernel(
    scores_ptr,  # in: [num_parts, num_rows] fp32
    ids_ptr,  # in: [num_parts, num_rows] int32
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    tokens_ptr,  # out: [num_rows] int32
    best_ptr,  # out: [num_rows] fp32
    is_finite_ptr,  # out: [num_rows] int32
    num_rows,
    num_parts,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    batch = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    slots = tl.load(rows_ptr + batch, mask=batch < num_rows, other=-1)
    is_row = slots >= 0
    lane_best = tl.full([BLOCK_PARTS, BLOCK_ROWS], float("-inf"), tl.float32)
    lane_id = tl.full([BLOCK_PARTS, BLOCK_ROWS], _NO_ID, tl.int32)
    for start in range(0, num_parts, BLOCK_PARTS):
        parts = start + tl.arange(0, BLOCK_PARTS)
        is_inside = (parts < num_parts)[:, None] & is_row[None, :]
        at = parts[:, None] * num_rows + batch[None, :]
        score = tl.load(scores_ptr + at, mask=is_inside, other=float("-inf"))
        ids = tl.load(ids_ptr + at, mask=is_inside, other=_NO_ID)
        is_better = (score > lane_best) | ((score == lane_best) & (ids < lane_id))
        lane_id = tl.where(is_better, ids, lane_id)
        lane_best = tl.where(is_better, score, lane_best)
    best = tl.max(lane_best, axis=0)
    token = tl.min(tl.where(lane_best == best[None, :], lane_id, _NO_ID), axis=0)
    is_finite = tl.abs(best) < float("inf")
    token = tl.where(is_row, tl.where(is_finite, token, 0), -1)
    tl.store(tokens_ptr + batch, token, mask=batch < num_rows)
    tl.store(best_ptr + batch, best, mask=batch < num_rows)
    tl.store(is_finite_ptr + batch, (is_finite | ~is_row).to(tl.int32), mask=batch < num_rows)


def lm_head_draw(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    num_output: torch.Tensor,
    work: LmHeadWork,
    tokens: torch.Tensor | None = None,
    best: torch.Tensor | None = None,
    is_finite: torch.Tensor | None = None,
    tile: LmHeadTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token a row; return (tokens, best, is_finite), two launches.

    Args:
        x: [num_rows, hidden], contiguous, normalised.
        weight: [vocab, hidden], contiguous, of x's dtype.
        rows: [num_rows] int32, the slot of each row, -1 = padding.
        temperature: [num_slots] fp32, 0 = greedy; like all tables with any stride.
        seeds: [num_slots, 2] int32, the low and the high word of each seed.
        num_output: [num_slots] int32, index of the token being drawn.
        work: of lm_head_work, for this vocabulary and at least num_rows.
        tokens: [num_rows] int32. Allocated when None, as are the next two.
        best: [num_rows] fp32, the token's score: its logit where temperature is 0. Padding: -inf.
        is_finite: [num_rows] int32, 0 where the token means nothing.
        tile: how to cut the product; by the number of rows when None.
    """
    check_leading("x", x, 2)
    (num_rows, hidden), device = x.shape, x.device
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be [vocab, {hidden}] with a vocabulary to draw from; found "
            f"{list(weight.shape)}: pass the lm_head's own weight"
        )
    vocab = weight.shape[0]
    check_tensor("weight", weight, (vocab, hidden), x.dtype, device)
    check_rows(rows, num_rows, device)
    check_draw_tables(temperature, seeds, num_output, device)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=device) if tokens is None else tokens
    best = torch.empty(num_rows, dtype=torch.float32, device=device) if best is None else best
    if is_finite is None:
        is_finite = torch.empty(num_rows, dtype=torch.int32, device=device)
    check_tensor("tokens", tokens, (num_rows,), torch.int32, device)
    check_tensor("best", best, (num_rows,), torch.float32, device)
    check_tensor("is_finite", is_finite, (num_rows,), torch.int32, device)
    tile = default_tile(num_rows, x.dtype) if tile is None else tile
    num_parts = min(triton.cdiv(vocab, tile.block_v), tile.max_parts)
    if work.scores.numel() < num_parts * num_rows:
        raise ValueError(
            f"work must hold {num_parts} x {num_rows} scores; found {work.scores.numel()}: "
            "make it with lm_head_work for this vocabulary and the largest batch"
        )
    if num_rows > 0:
        _lm_head_kernel[(triton.cdiv(num_rows, tile.block_b), num_parts)](
            x, weight, rows, temperature, seeds, num_output, work.scores, work.ids,
            temperature.stride(0), seeds.stride(0), num_output.stride(0), num_rows, vocab,
            HIDDEN=hidden, BLOCK_V=tile.block_v, BLOCK_B=tile.block_b, BLOCK_K=tile.block_k,
            UPCAST=is_interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _lm_head_pick_kernel[(triton.cdiv(num_rows, 16),)](
            work.scores, work.ids, rows, tokens, best, is_finite, num_rows, num_parts,
            BLOCK_PARTS=128, BLOCK_ROWS=16, num_warps=8,
        )  # fmt: skip
    return tokens, best, is_finite


def check_draw_tables(
    temperature: torch.Tensor,  # [num_slots] fp32, sets the number of slots
    seeds: torch.Tensor,
    num_output: torch.Tensor,
    device: torch.device,
) -> None:
    """Raise ValueError unless these are the tables that every draw needs."""
    num_slots = temperature.shape[0] if temperature.dim() == 1 else -1
    check_table("temperature", temperature, torch.float32, num_slots, device)
    check_table("seeds", seeds, torch.int32, num_slots, device, width=2)
    check_table("num_output", num_output, torch.int32, num_slots, device)


#: Of a score: the order of hidden products' sum, then as in sample.py. Where two scores are closer
#: than this, either token is right.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-4, torch.bfloat16: 1e-4}
