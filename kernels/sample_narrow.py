"""The two middle launches of sample.py, and what its four share: work memory, device functions.

They make a row with filters short enough for one program. With top-k:

    bin   = the leading bits of 1 + (largest logit - logit)           never falls as the logit falls
    count = tokens of each tile of the row in each bin
    list  = the tokens of the first bins that together hold k, in order of their ids

and so the list holds every token that top-k keeps. Without top-k, where the best-scored token of
the row has as much mass above it as top-p allows, the best-scored of those above it is found.

Invariants:
1. What is computed for a row depends on that row alone: tiles are the same in any batch, and each
   finds the place of its tokens from the counts of those before it, not by asking who comes first.
2. A row that is padding, greedy, without filters, or without a finite maximum writes nothing.
3. A list longer than MAX_LISTED is counted and not written.

Numerics: fp32; the reference is threshold_reference of sample.py. Called by sample.py.
"""

from dataclasses import dataclass, fields

import torch

from headrace.kernels.lm_head import MIN_TEMPERATURE
from headrace.kernels.noise import gumbel_of, noise_keys
from headrace.kernels.triton_seam import tl, triton

#: Tokens a program; a constant, so that sums are the same in any batch.
TILE = 8192
#: Bins of the distance to the largest logit, 16 an octave of 1 + distance: 16 octaves.
NUM_BINS = 256
#: Longest list of tokens that top-k may have kept; the last launch reads it in one go.
MAX_LISTED = 2048
_NUM_BINS = tl.constexpr(NUM_BINS)  # pyright: ignore[reportCallIssue]
_MAX_LISTED = tl.constexpr(MAX_LISTED)  # pyright: ignore[reportCallIssue]
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)  # pyright: ignore[reportCallIssue]
_NO_ID = tl.constexpr(0x7FFFFFFF)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, slots=True)
class SampleWork:
    """Memory between the launches; its contents mean nothing outside of them."""

    largest: torch.Tensor  # [max_rows * num_tiles] fp32, of a tile's logits
    sums: torch.Tensor  # [max_rows * num_tiles] fp32, exp(x - the tile's largest x)
    scores: torch.Tensor  # [max_rows * num_tiles] fp32, the tile's best, later the second round's
    ids: torch.Tensor  # [max_rows * num_tiles] int32, whose they are
    masses: torch.Tensor  # [max_rows * num_tiles] fp32, above the best-scored token
    next_scores: torch.Tensor  # [max_rows * num_tiles] fp32, of tokens above the best-scored
    next_ids: torch.Tensor  # [max_rows * num_tiles] int32
    bins: torch.Tensor  # [max_rows * num_tiles * NUM_BINS] int32
    num_listed: torch.Tensor  # [max_rows] int32
    listed: torch.Tensor  # [max_rows * MAX_LISTED] fp32, logits that top-k may keep
    listed_ids: torch.Tensor  # [max_rows * MAX_LISTED] int32


def sample_work(max_rows: int, vocab: int, device: torch.device) -> SampleWork:
    """Allocate the work memory for batches of up to max_rows."""
    num_tiles = triton.cdiv(vocab, TILE)
    sizes = {"bins": num_tiles * NUM_BINS, "num_listed": 1}
    sizes |= {"listed": MAX_LISTED, "listed_ids": MAX_LISTED}
    integers = {"ids", "next_ids", "bins", "num_listed", "listed_ids"}
    return SampleWork(
        **{
            field.name: torch.empty(
                max_rows * sizes.get(field.name, num_tiles),
                dtype=torch.int32 if field.name in integers else torch.float32,
                device=device,
            )
            for field in fields(SampleWork)
        }
    )


@triton.jit
def load_temperature(temperature_ptr, slot, stride) -> tl.tensor:
    """Load a divisor that leaves finite logits finite; 0 stays 0 and means greedy."""
    asked = tl.load(temperature_ptr + slot * stride)
    return tl.where(asked > 0, tl.maximum(asked, _MIN_TEMPERATURE), 0.0)


@triton.jit
def load_keys(seeds_ptr, seeds_stride, num_output_ptr, num_output_stride, slot) -> tl.tensor:
    """Load what a row's noise is made from."""
    seed_ptr = seeds_ptr + slot * seeds_stride
    position = tl.load(num_output_ptr + slot * num_output_stride)
    return noise_keys(tl.load(seed_ptr), tl.load(seed_ptr + 1), position)


@triton.jit
def load_filters(
    top_k_ptr, top_k_stride, top_p_ptr, top_p_stride, min_p_ptr, min_p_stride, slot, vocab
) -> tl.tensor:
    """Load (k, or 0 where it limits nothing; top_p; min_p; whether any filter is on)."""
    k = tl.load(top_k_ptr + slot * top_k_stride)
    k = tl.where((k > 0) & (k < vocab), k, 0)
    top_p = tl.load(top_p_ptr + slot * top_p_stride)
    min_p = tl.load(min_p_ptr + slot * min_p_stride)
    return k, top_p, min_p, (k > 0) | (top_p < 1) | (min_p > 0)


@triton.jit
def best_of(scores, ids) -> tl.tensor:
    """Return the largest score and, of those with it, the lowest id."""
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, ids, _NO_ID), axis=0)


@triton.jit
def load_best(scores_ptr, ids_ptr, row, num_tiles, TILES: tl.constexpr) -> tl.tensor:
    """Return the best score of a row's tiles and whose it is."""
    tiles = tl.arange(0, TILES)
    at = row * num_tiles + tiles
    scores = tl.load(scores_ptr + at, mask=tiles < num_tiles, other=float("-inf"))
    return best_of(scores, tl.load(ids_ptr + at, mask=tiles < num_tiles, other=_NO_ID))


@triton.jit
def load_largest(largest_ptr, row, num_tiles, TILES: tl.constexpr) -> tl.tensor:
    """Return a row's largest logit; infinite, or NaN made infinite, where nothing can be drawn."""
    tiles = tl.arange(0, TILES)
    at = row * num_tiles + tiles
    return tl.max(tl.load(largest_ptr + at, mask=tiles < num_tiles, other=float("-inf")), axis=0)


@triton.jit
def _bin_of(x, largest) -> tl.tensor:
    """Return the bin of the distance to the largest logit: never falls as x falls."""
    bits = (largest - x + 1.0).to(tl.int32, bitcast=True)
    return tl.minimum((bits >> 19) - (127 << 4), _NUM_BINS - 1)


@triton.jit
def is_drawn_first(
    x, largest, total, masses_ptr, row, num_tiles, top_p, min_p, TILES: tl.constexpr
) -> tl.tensor:
    """Say whether the best-scored token, at x of a row without top-k, passes top-p and min-p."""
    tiles = tl.arange(0, TILES)
    at = row * num_tiles + tiles
    mass = tl.sum(tl.load(masses_ptr + at, mask=tiles < num_tiles, other=0.0), axis=0)
    is_kept = (mass < top_p * total) | (top_p >= 1) | (x >= largest)
    return is_kept & (x >= largest + log_or_off(min_p))


@triton.jit
def log_or_off(min_p) -> tl.tensor:
    """Return log(min_p), which bounds x minus the largest x; -inf where min-p is off."""
    # Not above 0, whatever was asked: the largest x must stay within the bound.
    log = tl.minimum(tl.log(tl.maximum(min_p, 1e-38)), 0.0)
    return tl.where(min_p > 0, log, float("-inf"))


@triton.jit
def load_total(
    largest_ptr, sums_ptr, row, num_tiles, temperature, largest, TILES: tl.constexpr
) -> tl.tensor:
    """Return the sum of exp(x - largest x) over a row."""
    tiles = tl.arange(0, TILES)
    at, is_inside = row * num_tiles + tiles, tiles < num_tiles
    tile_largest = tl.load(largest_ptr + at, mask=is_inside, other=float("-inf"))
    sums = tl.load(sums_ptr + at, mask=is_inside, other=0.0)
    return tl.sum(sums * tl.exp(tile_largest / temperature - largest / temperature), axis=0)


@triton.jit
def _count_kernel(
    logits_ptr,  # in: [num_rows, vocab] fp32
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    temperature_ptr,  # in: [num_slots] fp32, 0 = greedy
    top_k_ptr,  # in: [num_slots] int32, 0 = off
    top_p_ptr,  # in: [num_slots] fp32, 1 = off
    min_p_ptr,  # in: [num_slots] fp32, 0 = off
    largest_ptr,  # in: [num_rows, num_tiles] fp32
    scores_ptr,  # in: [num_rows, num_tiles] fp32
    ids_ptr,  # in: [num_rows, num_tiles] int32
    masses_ptr,  # out: [num_rows, num_tiles] fp32
    bins_ptr,  # out: [num_rows, num_tiles, NUM_BINS] int32
    logits_stride,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    vocab,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_tiles = tl.num_programs(1)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        temperature = load_temperature(temperature_ptr, slot, temperature_stride)
        k, _, _, is_filtered = load_filters(
            top_k_ptr, top_k_stride, top_p_ptr, top_p_stride, min_p_ptr, min_p_stride, slot, vocab
        )
        largest = load_largest(largest_ptr, row, num_tiles, TILES)
        if (temperature > 0) & is_filtered & (tl.abs(largest) < float("inf")):
            ids = tile * BLOCK + tl.arange(0, BLOCK)
            row_ptr = logits_ptr + row * logits_stride
            x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
            out = row * num_tiles + tile
            if k > 0:
                counts = tl.histogram(_bin_of(x, largest), _NUM_BINS, mask=ids < vocab)
                tl.store(bins_ptr + out * _NUM_BINS + tl.arange(0, _NUM_BINS), counts)
            else:
                _, best_id = load_best(scores_ptr, ids_ptr, row, num_tiles, TILES)
                cut = tl.load(row_ptr + best_id) / temperature
                x = x / temperature
                powers = tl.exp(x - largest / temperature)
                tl.store(masses_ptr + out, tl.sum(tl.where(x > cut, powers, 0.0), axis=0))


@triton.jit
def _list_tile(
    x, ids, largest, k, bins_ptr, num_listed_ptr, listed_ptr, listed_ids_ptr, row, tile, num_tiles,
    vocab, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Write this tile's tokens of the leading bins into the row's list, in order of their ids."""
    tiles, bins = tl.arange(0, TILES)[:, None], tl.arange(0, _NUM_BINS)
    at = (row * num_tiles + tiles) * _NUM_BINS + bins[None, :]
    counts = tl.load(bins_ptr + at, mask=tiles < num_tiles, other=0)
    # The first bin with which the k largest are all in.
    last_bin = tl.sum((tl.cumsum(tl.sum(counts, axis=0), axis=0) < k).to(tl.int32), axis=0)
    counts = tl.where(bins[None, :] <= last_bin, counts, 0)
    num_listed = tl.sum(tl.sum(counts, axis=1), axis=0)
    if tile == 0:
        tl.store(num_listed_ptr + row, num_listed)
    if num_listed <= _MAX_LISTED:
        start = tl.sum(tl.sum(tl.where(tiles < tile, counts, 0), axis=1), axis=0)
        is_listed = (_bin_of(x, largest) <= last_bin) & (ids < vocab)
        place = row * _MAX_LISTED + start + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
        tl.store(listed_ptr + place, x, mask=is_listed)
        tl.store(listed_ids_ptr + place, ids, mask=is_listed)


@triton.jit
def _narrow_kernel(
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
    bins_ptr,  # in: [num_rows, num_tiles, NUM_BINS] int32
    next_scores_ptr,  # out: [num_rows, num_tiles] fp32
    next_ids_ptr,  # out: [num_rows, num_tiles] int32
    num_listed_ptr,  # out: [num_rows] int32
    listed_ptr,  # out: [num_rows, MAX_LISTED] fp32
    listed_ids_ptr,  # out: [num_rows, MAX_LISTED] int32
    logits_stride,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    seeds_stride,
    num_output_stride,
    vocab,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_tiles = tl.num_programs(1)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        temperature = load_temperature(temperature_ptr, slot, temperature_stride)
        k, top_p, min_p, is_filtered = load_filters(
            top_k_ptr, top_k_stride, top_p_ptr, top_p_stride, min_p_ptr, min_p_stride, slot, vocab
        )
        largest = load_largest(largest_ptr, row, num_tiles, TILES)
        if (temperature > 0) & is_filtered & (tl.abs(largest) < float("inf")):
            ids = tile * BLOCK + tl.arange(0, BLOCK)
            row_ptr = logits_ptr + row * logits_stride
            if k > 0:
                x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
                _list_tile(
                    x, ids, largest, k, bins_ptr, num_listed_ptr, listed_ptr, listed_ids_ptr, row,
                    tile, num_tiles, vocab, TILES,
                )  # fmt: skip
            else:
                _, best_id = load_best(scores_ptr, ids_ptr, row, num_tiles, TILES)
                cut = tl.load(row_ptr + best_id) / temperature
                total = load_total(
                    largest_ptr, sums_ptr, row, num_tiles, temperature, largest, TILES
                )
                top = largest / temperature
                if not is_drawn_first(
                    cut, top, total, masses_ptr, row, num_tiles, top_p, min_p, TILES
                ):
                    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")) / temperature
                    key_a, key_b = load_keys(
                        seeds_ptr, seeds_stride, num_output_ptr, num_output_stride, slot
                    )
                    is_left = (x > cut) & (x >= top + log_or_off(min_p))
                    score = tl.where(is_left, x + gumbel_of(key_a, key_b, ids), float("-inf"))
                    best, best_id = best_of(score, tl.where(is_left, ids, _NO_ID))
                    out = row * num_tiles + tile
                    tl.store(next_scores_ptr + out, best)
                    tl.store(next_ids_ptr + out, best_id)
