"""Log-probabilities of the chosen token and of the k likeliest, from the raw logits.

    logprob[s, v] = logits[s, v] - logsumexp(logits[s])

Raw: before temperature, penalties and filters, as the API promises. Equal logits are listed by
lower token id first. The penalties are written into the logits and the token is drawn after them,
so this comes in two parts:

1. logprobs_rows, before the penalties: the logsumexp, and the likeliest. Two launches, no sort:
   each tile of a row finds its own likeliest in registers, and a second launch merges them.
2. chosen_logprobs, after the draw: the token's own value from the list where it stands in it;
   else its logit is computed again, as one product of a row of hidden and a row of the weight.

Invariants:
1. Only rows whose slot asks (num_logprobs >= 0) are read or written; others keep what was there.
2. A row's values depend on that row alone: tiles are the same in any batch.

Numerics: fp32. The second product sums in another order than the first: see TOLERANCE.
"""

from dataclasses import dataclass

import torch

from headrace.kernels.checks import (
    check_leading,
    check_logits,
    check_rows,
    check_table,
    check_tensor,
)
from headrace.kernels.triton_seam import tl, triton

#: Most alternatives; OpenAI's limit.
MAX_LOGPROBS = 20
#: Tokens a program; a constant, so that sums are the same in any batch.
TILE = 8192
_MAX_LOGPROBS = tl.constexpr(MAX_LOGPROBS)  # pyright: ignore[reportCallIssue]
_NO_ID = tl.constexpr(0x7FFFFFFF)  # pyright: ignore[reportCallIssue]


def logprobs_reference(
    logits: torch.Tensor,  # [num_seqs, vocab]
    tokens: torch.Tensor,  # [num_seqs] int64, the chosen tokens
    k: int,  # how many alternatives; 0 gives empty ones
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (chosen: [num_seqs] fp32, top ids: [num_seqs, k] int64, their logprobs: fp32)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    # A stable sort, not topk: topk leaves open which of two equal logits comes first.
    top_ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices[:, :k]
    return chosen, top_ids, logprobs.gather(1, top_ids)


@triton.jit
def _next_likeliest(x, ids, last_x, last_id) -> tuple[tl.tensor, tl.tensor]:
    """Return the entry after the last in the order (larger x, lower id); id _NO_ID: none left."""
    is_after = ((x < last_x) | ((x == last_x) & (ids > last_id))) & (ids != _NO_ID)
    largest = tl.max(tl.where(is_after, x, float("-inf")), axis=0)
    return largest, tl.min(tl.where(is_after & (x == largest), ids, _NO_ID), axis=0)


@triton.jit
def _logprobs_tile_kernel(
    logits_ptr,  # in: [num_rows, vocab] fp32
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    num_logprobs_ptr,  # in: [num_slots] int32, -1 = off
    largest_ptr,  # out: [num_rows, num_tiles] fp32
    sums_ptr,  # out: [num_rows, num_tiles] fp32, exp(x - the tile's largest)
    values_ptr,  # out: [num_rows, num_tiles, MAX_LOGPROBS] fp32
    ids_ptr,  # out: [num_rows, num_tiles, MAX_LOGPROBS] int32
    logits_stride,
    num_logprobs_stride,
    vocab,
    BLOCK: tl.constexpr,
) -> None:
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        k = tl.load(num_logprobs_ptr + slot * num_logprobs_stride)
        if k >= 0:
            ids = tile * BLOCK + tl.arange(0, BLOCK)
            at = logits_ptr + row * logits_stride + ids
            x = tl.load(at, mask=ids < vocab, other=float("-inf"))
            out = row * tl.num_programs(1) + tile
            largest = tl.max(x, axis=0)
            # A tile of nothing but -inf has no maximum to measure from.
            origin = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
            tl.store(largest_ptr + out, largest)
            tl.store(sums_ptr + out, tl.sum(tl.exp(x - origin), axis=0))
            ids = tl.where(ids < vocab, ids, _NO_ID)
            last_x, last_id = float("inf"), -1
            for rank in range(tl.minimum(k, _MAX_LOGPROBS)):
                last_x, last_id = _next_likeliest(x, ids, last_x, last_id)
                tl.store(values_ptr + out * _MAX_LOGPROBS + rank, last_x)
                tl.store(ids_ptr + out * _MAX_LOGPROBS + rank, last_id)


@triton.jit
def _logprobs_merge_kernel(
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    num_logprobs_ptr,  # in: [num_slots] int32, -1 = off
    largest_ptr,  # in: [num_rows, num_tiles] fp32
    sums_ptr,  # in: [num_rows, num_tiles] fp32
    tile_values_ptr,  # in: [num_rows, num_tiles, MAX_LOGPROBS] fp32
    tile_ids_ptr,  # in: [num_rows, num_tiles, MAX_LOGPROBS] int32
    log_sums_ptr,  # out: [num_rows] fp32
    ids_ptr,  # out: [num_rows, MAX_LOGPROBS] int32
    values_ptr,  # out: [num_rows, MAX_LOGPROBS] fp32
    num_logprobs_stride,
    num_tiles,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    if slot >= 0:
        k = tl.minimum(tl.load(num_logprobs_ptr + slot * num_logprobs_stride), _MAX_LOGPROBS)
        if k >= 0:
            tiles = tl.arange(0, TILES)
            at, is_inside = row * num_tiles + tiles, tiles < num_tiles
            tile_largest = tl.load(largest_ptr + at, mask=is_inside, other=float("-inf"))
            sums = tl.load(sums_ptr + at, mask=is_inside, other=0.0)
            largest = tl.max(tile_largest, axis=0)
            origin = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
            is_some = tile_largest > float("-inf")
            powers = tl.exp(tl.where(is_some, tile_largest - origin, float("-inf")))
            log_sum = origin + tl.log(tl.sum(sums * powers, axis=0))
            tl.store(log_sums_ptr + row, log_sum)
            places = tl.arange(0, BLOCK)
            is_filled = (places < num_tiles * _MAX_LOGPROBS) & (places % _MAX_LOGPROBS < k)
            found = row * num_tiles * _MAX_LOGPROBS + places
            x = tl.load(tile_values_ptr + found, mask=is_filled, other=float("-inf"))
            ids = tl.load(tile_ids_ptr + found, mask=is_filled, other=_NO_ID)
            last_x, last_id = float("inf"), -1
            for rank in range(k):
                last_x, last_id = _next_likeliest(x, ids, last_x, last_id)
                out = row * _MAX_LOGPROBS + rank
                tl.store(ids_ptr + out, tl.where(last_id == _NO_ID, -1, last_id))
                tl.store(values_ptr + out, last_x - log_sum)


@triton.jit
def _chosen_logprobs_kernel(
    x_ptr,  # in: [num_rows, hidden]
    weight_ptr,  # in: [vocab, hidden]
    rows_ptr,  # in: [num_rows] int32, -1 = padding
    num_logprobs_ptr,  # in: [num_slots] int32, -1 = off
    tokens_ptr,  # in: [num_rows] int32
    log_sums_ptr,  # in: [num_rows] fp32
    ids_ptr,  # in: [num_rows, MAX_LOGPROBS] int32
    values_ptr,  # in: [num_rows, MAX_LOGPROBS] fp32
    chosen_ptr,  # out: [num_rows] fp32
    num_logprobs_stride,
    hidden,
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(rows_ptr + row).to(tl.int64)
    token = tl.load(tokens_ptr + row)
    if (slot >= 0) & (token >= 0):
        k = tl.load(num_logprobs_ptr + slot * num_logprobs_stride)
        if k >= 0:
            products = tl.zeros([BLOCK], tl.float32)
            for start in range(0, hidden, BLOCK):
                depth = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + row * hidden + depth, mask=depth < hidden, other=0.0)
                weight_at = weight_ptr + token.to(tl.int64) * hidden + depth
                weight = tl.load(weight_at, mask=depth < hidden, other=0.0)
                products += x.to(tl.float32) * weight.to(tl.float32)
            chosen = tl.sum(products, axis=0) - tl.load(log_sums_ptr + row)
            places = tl.arange(0, PLACES)
            is_listed = places < tl.minimum(k, _MAX_LOGPROBS)
            at = row * _MAX_LOGPROBS + places
            is_it = is_listed & (tl.load(ids_ptr + at, mask=is_listed, other=-1) == token)
            listed = tl.load(values_ptr + at, mask=is_it, other=0.0)
            if tl.max(is_it.to(tl.int32), axis=0) > 0:
                chosen = tl.sum(listed, axis=0)
            tl.store(chosen_ptr + row, chosen)


@dataclass(frozen=True, slots=True)
class LogprobsWork:
    """Memory between the launches; log_sums must stay as it is until the draw."""

    largest: torch.Tensor  # [max_rows * num_tiles] fp32, of a tile's logits
    sums: torch.Tensor  # [max_rows * num_tiles] fp32, exp(logit - the tile's largest)
    tile_values: torch.Tensor  # [max_rows * num_tiles * MAX_LOGPROBS] fp32
    tile_ids: torch.Tensor  # [max_rows * num_tiles * MAX_LOGPROBS] int32
    log_sums: torch.Tensor  # [max_rows] fp32


def logprobs_work(max_rows: int, vocab: int, device: torch.device) -> LogprobsWork:
    """Allocate the work memory for batches of up to max_rows."""
    num_tiles = max_rows * triton.cdiv(vocab, TILE)
    num_listed = num_tiles * MAX_LOGPROBS
    return LogprobsWork(
        largest=torch.empty(num_tiles, dtype=torch.float32, device=device),
        sums=torch.empty(num_tiles, dtype=torch.float32, device=device),
        tile_values=torch.empty(num_listed, dtype=torch.float32, device=device),
        tile_ids=torch.empty(num_listed, dtype=torch.int32, device=device),
        log_sums=torch.empty(max_rows, dtype=torch.float32, device=device),
    )


def logprobs_rows(
    logits: torch.Tensor,
    rows: torch.Tensor,
    num_logprobs: torch.Tensor,
    work: LogprobsWork,
    ids: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Find the likeliest tokens of the rows that ask, before the penalties; two launches.

    Args:
        logits: [num_rows, vocab] fp32, raw; rows dense, at any stride.
        rows: [num_rows] int32, the slot of each row, -1 = padding.
        num_logprobs: [num_slots] int32, how many, -1 = off, at most MAX_LOGPROBS; any stride.
        work: for this vocabulary and at least num_rows; holds the logsumexp until chosen_logprobs.
        ids: [num_rows, MAX_LOGPROBS] int32, out; -1 where the vocabulary is shorter.
        values: [num_rows, MAX_LOGPROBS] fp32, out.
    """
    check_logits(logits)
    (num_rows, vocab), device = logits.shape, logits.device
    check_rows(rows, num_rows, device)
    num_slots = num_logprobs.shape[0] if num_logprobs.dim() == 1 else -1
    check_table("num_logprobs", num_logprobs, torch.int32, num_slots, device)
    check_tensor("ids", ids, (num_rows, MAX_LOGPROBS), torch.int32, device)
    check_tensor("values", values, (num_rows, MAX_LOGPROBS), torch.float32, device)
    num_tiles = triton.cdiv(vocab, TILE)
    if min(work.log_sums.numel(), work.sums.numel() // num_tiles) < num_rows:
        raise ValueError(
            f"work must hold {num_rows} rows of {num_tiles} tiles; found room for "
            f"{min(work.log_sums.numel(), work.sums.numel() // num_tiles)}: make it with "
            "logprobs_work for this vocabulary and the largest batch"
        )
    if num_rows > 0:
        stride = num_logprobs.stride(0)
        _logprobs_tile_kernel[(num_rows, num_tiles)](
            logits, rows, num_logprobs, work.largest, work.sums, work.tile_values, work.tile_ids,
            logits.stride(0), stride, vocab, BLOCK=min(TILE, triton.next_power_of_2(vocab)),
            num_warps=8,
        )  # fmt: skip
        _logprobs_merge_kernel[(num_rows,)](
            rows, num_logprobs, work.largest, work.sums, work.tile_values, work.tile_ids,
            work.log_sums, ids, values, stride, num_tiles, num_warps=4,
            TILES=triton.next_power_of_2(num_tiles),
            BLOCK=triton.next_power_of_2(num_tiles * MAX_LOGPROBS),
        )  # fmt: skip


def chosen_logprobs(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    num_logprobs: torch.Tensor,
    tokens: torch.Tensor,
    work: LogprobsWork,
    ids: torch.Tensor,
    values: torch.Tensor,
    chosen: torch.Tensor,
) -> None:
    """Write the drawn tokens' log-probabilities for the rows that ask; one launch.

    Args:
        x: [num_rows, hidden], contiguous, what the raw logits were made of.
        weight: [vocab, hidden], contiguous, of x's dtype, likewise.
        rows: [num_rows] int32, as logprobs_rows was given.
        num_logprobs: [num_slots] int32, likewise.
        tokens: [num_rows] int32, drawn, each below vocab; -1 = none.
        work: as logprobs_rows left it.
        ids: [num_rows, MAX_LOGPROBS] int32, likewise.
        values: [num_rows, MAX_LOGPROBS] fp32, likewise.
        chosen: [num_rows] fp32, out.
    """
    check_leading("x", x, 2)
    (num_rows, hidden), device = x.shape, x.device
    check_tensor("weight", weight, (*weight.shape[:1], hidden), x.dtype, device)
    check_rows(rows, num_rows, device)
    num_slots = num_logprobs.shape[0] if num_logprobs.dim() == 1 else -1
    check_table("num_logprobs", num_logprobs, torch.int32, num_slots, device)
    check_tensor("tokens", tokens, (num_rows,), torch.int32, device)
    check_tensor("ids", ids, (num_rows, MAX_LOGPROBS), torch.int32, device)
    check_tensor("values", values, (num_rows, MAX_LOGPROBS), torch.float32, device)
    check_tensor("chosen", chosen, (num_rows,), torch.float32, device)
    if num_rows > 0:
        _chosen_logprobs_kernel[(num_rows,)](
            x, weight, rows, num_logprobs, tokens, work.log_sums, ids, values, chosen,
            num_logprobs.stride(0), hidden, BLOCK=1024,
            PLACES=triton.next_power_of_2(MAX_LOGPROBS), num_warps=4,
        )  # fmt: skip


#: Sums in another order, in fp32, and for a token outside the list a second product.
TOLERANCE = {torch.float32: 2e-5}
