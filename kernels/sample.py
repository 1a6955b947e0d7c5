"""Draw one token a row: greedy, or Gumbel-max over what top-k, top-p and min-p keep.

    x     = logits / temperature
    top-k keeps x >= (the k-th largest x)
    top-p keeps x for which the probability of everything strictly above it is < top_p,
          probabilities being those of what top-k kept
    min-p keeps x whose probability is >= min_p * (the largest probability)
    token = argmax over kept of x - log(-log(noise(seed, position, token)))

Order as in vLLM: temperature, top-k, top-p, min-p. No sort, and four launches, the first three of
one program for each row and 8192 tokens:

1. survey   the largest logit, the sum of exponentials, the best score. This decides rows that are
            greedy or have no filter; for them the rest returns at once.
2. count    top-k: a histogram of the distance to the largest logit. Otherwise: the mass above the
            best-scored token, which is drawn if that is < top_p.
3. narrow   top-k: list the tokens of the leading bins that together hold k. Otherwise, where the
            best-scored token was filtered out: the best-scored of those above it.
4. finish   one program a row: top-k on the short list; then reject the best-scored and take the
            best-scored above it until one has a mass above it of < top_p. The first that is kept
            is the best of all kept, so the token is the reference's without its threshold.

A row whose list would be longer than MAX_LISTED (k over a thousand or so) is read whole instead.

Invariants:
1. A row's token depends on that row alone, never on the batch around it: sums have a fixed order.
2. Values equal to a threshold are all kept; equal scores go to the lower token id. So the result
   is deterministic, and top_k = 1 is greedy but for exactly equal logits.
3. temperature 0 is argmax, whatever the filters and the seed say.
4. The largest value is always kept: top_p = 0 and min_p = 1 leave a token to draw.
5. A row that holds a NaN, or whose largest is infinite, has is_finite 0 and token 0.
6. A padding row (slot -1) has token -1 and is_finite 1, and its logits are not read.

Numerics: fp32. Launches 2 and 3 stand in sample_narrow.py; `noise`, `penalise` and `logprobs` have
their own files and are named here too.
Size: the references, which the CPU engine uses, and a launcher of many tables beside the kernels.
"""

import torch

from headrace.kernels.checks import check_logits, check_rows, check_table, check_tensor
from headrace.kernels.lm_head import check_draw_tables
from headrace.kernels.logprobs import logprobs_reference
from headrace.kernels.noise import gumbel_of, noise_at_reference, noise_reference
from headrace.kernels.penalise import penalise_reference
from headrace.kernels.sample_narrow import (
    MAX_LISTED,
    NUM_BINS,
    TILE,
    SampleWork,
    _count_kernel,
    _narrow_kernel,
    best_of,
    is_drawn_first,
    load_best,
    load_filters,
    load_keys,
    load_largest,
    load_temperature,
    load_total,
    log_or_off,
    sample_work,
)
from headrace.kernels.triton_seam import tl, triton

__all__ = [
    "logprobs_reference",
    "noise_at_reference",
    "noise_reference",
    "penalise_reference",
    "sample",
    "sample_reference",
    "sample_work",
]

_MAX_LISTED = tl.constexpr(MAX_LISTED)  # pyright: ignore[reportCallIssue]
_NO_ID = tl.constexpr(0x7FFFFFFF)  # pyright: ignore[reportCallIssue]


def threshold_reference(
    scaled: torch.Tensor,  # [num_seqs, vocab] fp32, logits / temperature
    top_k: torch.Tensor,  # [num_seqs] int32, 0 = off
    top_p: torch.Tensor,  # [num_seqs] fp32, 1 = off
    min_p: torch.Tensor,  # [num_seqs] fp32, 0 = off
) -> torch.Tensor:
    """Return the smallest value that every filter keeps: [num_seqs] fp32."""
    vocab = scaled.shape[1]
    ordered = scaled.sort(dim=-1, descending=True).values
    k = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()
    kth = ordered.gather(1, k[:, None] - 1)
    probs = torch.softmax(ordered.masked_fill(ordered < kth, float("-inf")), dim=-1)
    mass_above = probs.cumsum(-1) - probs
    # >= 1 of the sorted values is kept; with top-p off, rounding in the sum must drop nothing.
    is_kept = (mass_above < top_p[:, None]) | (top_p[:, None] >= 1)
    num_kept = is_kept.sum(-1, keepdim=True).clamp(min=1)
    top_p_threshold = torch.maximum(ordered.gather(1, num_kept - 1), kth)
    min_p_threshold = ordered[:, :1] + min_p[:, None].log()
    return torch.maximum(top_p_threshold, min_p_threshold).squeeze(1)


def sample_reference(
    logits: torch.Tensor,  # [num_seqs, vocab] fp32
    temperature: torch.Tensor,  # [num_seqs] fp32, 0 = greedy
    top_k: torch.Tensor,  # [num_seqs] int32, 0 = off
    top_p: torch.Tensor,  # [num_seqs] fp32, 1 = off
    min_p: torch.Tensor,  # [num_seqs] fp32, 0 = off
    seeds: torch.Tensor,  # [num_seqs] int64
    positions: torch.Tensor,  # [num_seqs] int64, index of the token being drawn
) -> torch.Tensor:
    """Return tokens: [num_seqs] int64."""
    greedy = logits.argmax(dim=-1)
    is_greedy = temperature == 0
    if bool(is_greedy.all()):
        return greedy
    scaled = logits / torch.where(is_greedy, 1.0, temperature)[:, None]
    threshold = threshold_reference(scaled, top_k, top_p, min_p)
    gumbel = -torch.log(-torch.log(noise_reference(seeds, positions, logits.shape[1])))
    scores = (scaled + gumbel).masked_fill(scaled < threshold[:, None], float("-inf"))
    return torch.where(is_greedy, greedy, scores.argmax(dim=-1))


@triton.jit
def _survey_kernel(
    logits_ptr,  # in: [num_rows, vocab] fp32
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    temperature_ptr,  # in: [num_slots] fp32, 0 = greedy
    seeds_ptr,  # in: [num_slots, 2] int32
    num_output_ptr,  # in: [num_slots] int32
    largest_ptr,  # out: [num_rows, num_tiles] fp32
    sums_ptr,  # out: [num_rows, num_tiles] fp32
    scores_ptr,  # out: [num_rows, num_tiles] fp32
    ids_ptr,  # out: [num_rows, num_tiles] int32
    logits_stride,
    temperature_stride,
    seeds_stride,
    num_output_stride,
    vocab,
    BLOCK: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        ids = tile * BLOCK + tl.arange(0, BLOCK)
        at = logits_ptr + row * logits_stride + ids
        x = tl.load(at, mask=ids < vocab, other=float("-inf"))
        # A NaN becomes infinity, which the largest logit cannot hide.
        x = tl.where(x != x, float("inf"), x)
        out = row * tl.num_programs(1) + tile
        largest = tl.max(x, axis=0)
        tl.store(largest_ptr + out, largest)
        temperature = load_temperature(temperature_ptr, slot, temperature_stride)
        score = x
        if temperature > 0:
            score = x / temperature
            is_finite = tl.abs(largest) < float("inf")
            below = score - tl.where(is_finite, largest / temperature, 0.0)
            powers = tl.exp(tl.where(is_finite, below, float("-inf")))
            tl.store(sums_ptr + out, tl.sum(powers, axis=0))
            key_a, key_b = load_keys(
                seeds_ptr, seeds_stride, num_output_ptr, num_output_stride, slot
            )
            score += gumbel_of(key_a, key_b, ids)
        best, best_id = best_of(score, ids)
        tl.store(scores_ptr + out, best)
        tl.store(ids_ptr + out, best_id)


@triton.jit
def _key_of(x) -> tl.tensor:
    """Map fp32 to int32 in the same order, so that halving a range of values ends exactly."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(key) -> tl.tensor:
    """Undo _key_of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_scaled(x_ptr, places, num, temperature) -> tl.tensor:
    """Load some logits divided by the temperature; beyond the last -inf."""
    return tl.load(x_ptr + places, mask=places < num, other=float("-inf")) / temperature


@triton.jit
def _top_k_threshold(x_ptr, num, temperature, k, top, BLOCK: tl.constexpr) -> tl.tensor:
    """Find by halving a value that exactly the k largest reach (more, if equal ones straddle)."""
    # int64, so that the middle of two int32 keys never overflows. At least k values are >= low,
    # fewer than k are >= high.
    low = _key_of(tl.full([], float("-inf"), tl.float32)).to(tl.int64)
    high = _key_of(top).to(tl.int64) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num, BLOCK):
            places = start + tl.arange(0, BLOCK)
            keys = _key_of(_load_scaled(x_ptr, places, num, temperature))
            counts += ((keys >= middle) & (places < num)).to(tl.int32)
        count = tl.sum(counts, axis=0)
        low = tl.where(count >= k, middle, low)
        # With exactly k above the middle no further halving changes what is kept.
        high = tl.where(count == k, middle + 1, tl.where(count >= k, high, middle))
    return _value_of(low.to(tl.int32))


@triton.jit
def _mass(x_ptr, num, temperature, top, floor, cut, BLOCK: tl.constexpr) -> tl.tensor:
    """Sum exp(x - top) over x >= floor and x > cut."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num, BLOCK):
        x = _load_scaled(x_ptr, start + tl.arange(0, BLOCK), num, temperature)
        sums += tl.where((x >= floor) & (x > cut), tl.exp(x - top), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _best_above(
    x_ptr, ids_ptr, is_listed, num, temperature, floor, cut, key_a, key_b, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return (the best-scored token with x >= floor and x > cut, its x)."""
    lane_score = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_id = tl.full([BLOCK], _NO_ID, tl.int32)
    lane_x = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, num, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = _load_scaled(x_ptr, places, num, temperature)
        is_left = (x >= floor) & (x > cut)
        # Noise is the dear part, and mostly nothing in sight is left to have it.
        if tl.max(is_left.to(tl.int32), axis=0) > 0:
            ids = places
            if is_listed:
                ids = tl.load(ids_ptr + places, mask=is_left, other=_NO_ID)
            score = x + gumbel_of(key_a, key_b, ids)
            is_better = is_left & (score > lane_score)
            lane_score = tl.where(is_better, score, lane_score)
            lane_id = tl.where(is_better, ids, lane_id)
            lane_x = tl.where(is_better, x, lane_x)
    _, token = best_of(lane_score, lane_id)
    return token, tl.max(tl.where(lane_id == token, lane_x, float("-inf")), axis=0)


@triton.jit
def _draw_filtered(
    row_ptr, listed_ptr, listed_ids_ptr, num_listed_ptr, next_scores_ptr, next_ids_ptr, masses_ptr,
    row, vocab, num_tiles, temperature, k, top_p, min_p, top, total, first, key_a, key_b,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the best-scored token that the filters keep."""
    x_ptr, num, is_listed = row_ptr, vocab, k < 0
    floor = top + log_or_off(min_p)
    token, is_kept = first, k < 0
    x = top
    if k > 0:
        num_listed = tl.load(num_listed_ptr + row)
        is_listed = num_listed <= _MAX_LISTED
        if is_listed:
            x_ptr, num = listed_ptr + row * _MAX_LISTED, num_listed
        kth = _top_k_threshold(x_ptr, num, temperature, k, top, BLOCK)
        # top-p's probabilities are of what top-k kept.
        total = _mass(x_ptr, num, temperature, top, kth, float("-inf"), BLOCK)
        floor = tl.maximum(floor, kth)
        token, x = _best_above(
            x_ptr, listed_ids_ptr + row * _MAX_LISTED, is_listed, num, temperature, floor,
            float("-inf"), key_a, key_b, BLOCK,
        )  # fmt: skip
    else:
        x = tl.load(row_ptr + first) / temperature
        is_kept = is_drawn_first(x, top, total, masses_ptr, row, num_tiles, top_p, min_p, TILES)
        if not is_kept:
            _, token = load_best(next_scores_ptr, next_ids_ptr, row, num_tiles, TILES)
            x = tl.load(row_ptr + token) / temperature
    while not is_kept:
        mass = _mass(x_ptr, num, temperature, top, floor, x, BLOCK)
        # Each round rejects a value for good, and the largest is always kept: this ends.
        is_kept = (mass < top_p * total) | (top_p >= 1) | (x >= top)
        if not is_kept:
            token, x = _best_above(
                x_ptr, listed_ids_ptr + row * _MAX_LISTED, is_listed, num, temperature, floor, x,
                key_a, key_b, BLOCK,
            )  # fmt: skip
    return token


@triton.jit
def _finish_kernel(
    logits_ptr,  # in: [num_rows, vocab] fp32
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    temperature_ptr,  # in: [num_slots] fp32, 0 = greedy
    top_k_ptr,  # in: [num_slots] int32, 0 = off
    top_p_ptr,  # in: [num_slots] fp32, 1 = off
    min_p_ptr,  # in: [num_slots] fp32, 0 = off
    seeds_ptr,  # in: [num_slots, 2] int32
    num_output_ptr,  # in: [num_slots] int32
    largest_ptr,  # in: [num_rows, num_tiles] fp32
    sums_ptr,  # in: [num_rows, num_tiles] fp32
    scores_ptr,  # in: [num_rows, num_tiles] fp32
    ids_ptr,  # in: [num_rows, num_tiles] int32
    masses_ptr,  # in: [num_rows, num_tiles] fp32
    next_scores_ptr,  # in: [num_rows, num_tiles] fp32
    next_ids_ptr,  # in: [num_rows, num_tiles] int32
    num_listed_ptr,  # in: [num_rows] int32
    listed_ptr,  # in: [num_rows, MAX_LISTED] fp32
    listed_ids_ptr,  # in: [num_rows, MAX_LISTED] int32
    tokens_ptr,  # out: [num_rows] int32
    is_finite_ptr,  # out: [num_rows] int32
    logits_stride,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    seeds_stride,
    num_output_stride,
    vocab,
    num_tiles,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    token = tl.full([], -1, tl.int32)
    is_finite = slot < 0
    if slot >= 0:
        temperature = load_temperature(temperature_ptr, slot, temperature_stride)
        k, top_p, min_p, is_filtered = load_filters(
            top_k_ptr, top_k_stride, top_p_ptr, top_p_stride, min_p_ptr, min_p_stride, slot, vocab
        )
        largest = load_largest(largest_ptr, row, num_tiles, TILES)
        is_finite = tl.abs(largest) < float("inf")
        token = tl.full([], 0, tl.int32)
        if is_finite:
            _, token = load_best(scores_ptr, ids_ptr, row, num_tiles, TILES)
            if is_filtered & (temperature > 0):
                total = load_total(
                    largest_ptr, sums_ptr, row, num_tiles, temperature, largest, TILES
                )
                key_a, key_b = load_keys(
                    seeds_ptr, seeds_stride, num_output_ptr, num_output_stride, slot
                )
                token = _draw_filtered(
                    logits_ptr + row * logits_stride, listed_ptr, listed_ids_ptr, num_listed_ptr,
                    next_scores_ptr, next_ids_ptr, masses_ptr, row, vocab, num_tiles, temperature,
                    k, top_p, min_p, largest / temperature, total, token, key_a, key_b,
                    BLOCK, TILES,
                )  # fmt: skip
    tl.store(tokens_ptr + row, token)
    tl.store(is_finite_ptr + row, is_finite.to(tl.int32))


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    num_output: torch.Tensor,
    work: SampleWork,
    tokens: torch.Tensor | None = None,
    is_finite: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row; return (tokens, is_finite), four launches.

    Args:
        logits: [num_rows, vocab] fp32, penalised; rows dense, at any stride.
        rows: [num_rows] int32, the slot of each row, -1 = padding.
        temperature: [num_slots] fp32, 0 = greedy; like all tables with any stride.
        top_k: [num_slots] int32, 0 = off.
        top_p: [num_slots] fp32, 1 = off.
        min_p: [num_slots] fp32, 0 = off.
        seeds: [num_slots, 2] int32, the low and the high word of each seed.
        num_output: [num_slots] int32, index of the token being drawn.
        work: of sample_work, for this vocabulary and at least num_rows.
        tokens: [num_rows] int32, -1 for padding. Allocated when None, as is the next.
        is_finite: [num_rows] int32, 0 where the token means nothing.
    """
    check_logits(logits)
    (num_rows, vocab), device = logits.shape, logits.device
    check_rows(rows, num_rows, device)
    check_draw_tables(temperature, seeds, num_output, device)
    for name, table, dtype in (
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        check_table(name, table, dtype, temperature.shape[0], device)
    tokens = torch.empty(num_rows, dtype=torch.int32, device=device) if tokens is None else tokens
    if is_finite is None:
        is_finite = torch.empty(num_rows, dtype=torch.int32, device=device)
    check_tensor("tokens", tokens, (num_rows,), torch.int32, device)
    check_tensor("is_finite", is_finite, (num_rows,), torch.int32, device)
    block = min(TILE, max(256, triton.next_power_of_2(vocab)))
    num_tiles = triton.cdiv(vocab, block)
    if min(work.bins.numel() // (num_tiles * NUM_BINS), work.num_listed.numel()) < num_rows:
        raise ValueError(
            f"work must hold {num_rows} rows of {num_tiles} tiles; found room for "
            f"{work.bins.numel() // (num_tiles * NUM_BINS)}: make it with sample_work for this "
            "vocabulary and the largest batch"
        )
    if num_rows == 0:
        return tokens, is_finite
    w, grid = work, (num_rows, num_tiles)
    seeds_at = (seeds.stride(0), num_output.stride(0))
    filters = (top_k, top_p, min_p)
    strides = (logits.stride(0), temperature.stride(0), *(table.stride(0) for table in filters))
    tiles = triton.next_power_of_2(num_tiles)
    _survey_kernel[grid](
        logits, rows, temperature, seeds, num_output, w.largest, w.sums, w.scores, w.ids,
        *strides[:2], *seeds_at, vocab, BLOCK=block, num_warps=8,
    )  # fmt: skip
    _count_kernel[grid](
        logits, rows, temperature, *filters, w.largest, w.scores, w.ids, w.masses, w.bins,
        *strides, vocab, BLOCK=block, TILES=tiles, num_warps=8,
    )  # fmt: skip
    _narrow_kernel[grid](
        logits, rows, temperature, *filters, seeds, num_output, w.largest, w.sums, w.scores, w.ids,
        w.masses, w.bins, w.next_scores, w.next_ids, w.num_listed, w.listed, w.listed_ids,
        *strides, *seeds_at, vocab, BLOCK=block, TILES=tiles, num_warps=8,
    )  # fmt: skip
    _finish_kernel[(num_rows,)](
        logits, rows, temperature, *filters, seeds, num_output, w.largest, w.sums, w.scores, w.ids,
        w.masses, w.next_scores, w.next_ids, w.num_listed, w.listed, w.listed_ids,
        tokens, is_finite, *strides, *seeds_at, vocab, num_tiles,
        BLOCK=block, TILES=tiles, num_warps=16,
    )  # fmt: skip
    return tokens, is_finite


#: Of a score, not of a token: two logarithms and a division, a few units in the last place of
#: values below 32. Where two scores, or a filter's sum and its limit, are closer, either is right.
TOLERANCE = {torch.float32: 1e-4}
