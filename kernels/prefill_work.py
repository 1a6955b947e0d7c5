"""How prefill attention is cut, and its work list: the query tiles of a step, longest first.

A chunk of q_len tokens is cut into ceil(q_len / tile_tokens) tiles; a tile's cost grows with the
position of its last token, its `end`. The list is sorted by falling end (ties by chunk), so that a
grid of constant size that strides over it ends evenly. It is made on the device, once a step, and
all layers read it.

Each tile finds its own place in the order, and nothing is sorted: the tiles of a chunk end at
first_position + tile_tokens * (i + 1), the last one at the chunk's context, so the number of tiles
of another chunk that end later is one division. All of it is integers, so the list is exact.

Invariants:
1. Every row of every chunk is in exactly one listed tile; a tile lies within one chunk.
2. The list has no holes: tiles 0 .. num_tiles - 1 are written, the rest is stale.
3. It depends on lengths on the device alone, and is the same on every run.

Called by the engine before the layers of a step that holds prompt chunks, and by
`paged_prefill` where no list is passed.
"""

from dataclasses import dataclass

import torch

from headrace.kernels.checks import check_tensor
from headrace.kernels.triton_seam import tl, triton

#: Fields of a listed tile: its first row in q, its rows, the position of the first of them, and
#: the row of the block tables.
TILE_FIELDS = 4

#: Tiles of a chunk placed at a time, chunks compared with at a time, and programs a chunk at most.
_TILES_AT_ONCE = 16
_CHUNKS_AT_ONCE = 64
_MAX_PARTS = 16


@dataclass(frozen=True, slots=True)
class PrefillTiling:
    """How a launch is cut; the benchmark tries several, `choose_tiling` has the choice."""

    rows: int  # rows a query tile, a power of two; at least 64 for Hopper's wide products
    heads: int  # query heads a tile: divides the group of a KV head
    tile: int  # positions a step, at most; cut to block_size
    num_warps: int
    num_stages: int
    programs_a_sm: int  # of the constant grid

    @property
    def tile_tokens(self) -> int:
        return self.rows // self.heads


def choose_tiling(group: int, head_dim: int, dtype: torch.dtype) -> PrefillTiling:
    """Return the tiling for query heads a KV head, head_dim and q's dtype.

    Two small tiles a multiprocessor beat a large one (H200, 8 x 1024 of llama-8b: 207 us against
    265 for 128 x 128; 256 x 32 of qwen3-0.6b: 45 against 110), with an fp8 cache too (293, 299).
    Beyond head_dim 128, not measured: the most positions a step without spills in the inner loop.
    """
    if dtype == torch.float32:
        # fp32 is here to be compared with, not to be fast: small tiles keep registers in bounds.
        rows = max(16, triton.next_power_of_2(group))
        return PrefillTiling(rows, group, 32 if head_dim > 64 else 64, 4, 2, 2)
    if head_dim > 128:
        return PrefillTiling(128, group, 32, 8, 2, 1)
    return PrefillTiling(64, group, 64, 4, 3, 2)


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Fixed device buffers for the query tiles of a step of up to max_tokens in num_chunks."""

    tiles: torch.Tensor  # [max_tiles, TILE_FIELDS] int32
    num_tiles: torch.Tensor  # [1] int32
    tile_tokens: int  # tokens a tile, which must be that of the attention kernel
    num_chunks: int  # chunks a step, empty ones included


def make_prefill_work(
    max_tokens: int, num_chunks: int, tile_tokens: int, device: torch.device
) -> PrefillWork:
    """Allocate the list for any split of up to max_tokens rows into num_chunks chunks.

    Args:
        max_tokens: rows of the chunks, at most.
        num_chunks: chunks, empty ones included.
        tile_tokens: tokens a tile, from `PrefillTiling.tile_tokens`.
        device: where the step runs.
    """
    if max_tokens < 0 or num_chunks < 1 or tile_tokens < 1:
        raise ValueError(
            "prefill work needs max_tokens >= 0, num_chunks >= 1 and tile_tokens >= 1; found "
            f"{max_tokens}, {num_chunks} and {tile_tokens}: pass the largest step of the engine"
        )
    max_tiles = max_tokens // tile_tokens + min(num_chunks, max_tokens)
    tiles = torch.zeros((max_tiles, TILE_FIELDS), dtype=torch.int32, device=device)
    num_tiles = torch.zeros(1, dtype=torch.int32, device=device)
    return PrefillWork(tiles, num_tiles, tile_tokens, num_chunks)


def check_tiling(
    tiling: PrefillTiling, group: int, work: PrefillWork | None, device: torch.device
) -> None:
    """Raise ValueError unless the tiling fits the heads, and the list the tiling."""
    if group % tiling.heads or tiling.heads > tiling.rows:
        raise ValueError(
            f"a tile's heads must divide the group and be at most its rows; found {tiling.heads} "
            f"heads, a group of {group} and {tiling.rows} rows: use choose_tiling"
        )
    if work is not None and work.tile_tokens != tiling.tile_tokens:
        raise ValueError(
            f"work must list tiles of {tiling.tile_tokens} tokens, as the tiling has; found "
            f"{work.tile_tokens}: make it with choose_tiling(...).tile_tokens"
        )
    if work is not None and work.tiles.device != device:
        raise ValueError(
            f"work must be on {device}, where q is; found {work.tiles.device}: make it there"
        )


def plan_prefill_reference(
    cu_q_lens: torch.Tensor,  # [num_chunks + 1] int32, absolute rows
    context_lens: torch.Tensor,  # [num_chunks] int32, tokens in the cache with this chunk
    tile_tokens: int,
    table_rows: torch.Tensor | None = None,  # [num_chunks] int32; None = row i for chunk i
) -> list[tuple[int, int, int, int]]:
    """Return the listed tiles: (first row, rows, position of the first, block-table row)."""
    starts, context = cu_q_lens.tolist(), context_lens.tolist()
    rows = list(range(len(context))) if table_rows is None else table_rows.tolist()
    order = []
    for chunk, context_len in enumerate(context):
        start, stop = starts[chunk], starts[chunk + 1]
        for first in range(start, stop, tile_tokens):
            num_rows = min(tile_tokens, stop - first)
            position = context_len - (stop - first)
            tile = (first, num_rows, position, rows[chunk])
            order.append((-(position + num_rows), chunk, tile))
    return [tile for _, _, tile in sorted(order)]


@triton.jit
def _plan_prefill_kernel(
    cu_q_lens_ptr,  # in: [num_chunks + 1] int32
    context_lens_ptr,  # in: [num_chunks] int32
    table_rows_ptr,  # in: [num_chunks] int32, or None: chunk i has row i
    tiles_ptr,  # out: [max_tiles, 4] int32
    num_tiles_ptr,  # out: [1] int32
    num_chunks,
    max_tiles,
    TILE_TOKENS: tl.constexpr,
    TILES: tl.constexpr,  # tiles placed at a time
    CHUNKS: tl.constexpr,  # chunks compared with at a time
) -> None:
    """One program: every num_programs(1)-th group of TILES tiles of one chunk."""
    chunk = tl.program_id(0)
    part = tl.program_id(1)
    chunk_start = tl.load(cu_q_lens_ptr + chunk)
    q_len = tl.load(cu_q_lens_ptr + chunk + 1) - chunk_start
    first_position = tl.load(context_lens_ptr + chunk) - q_len
    table_row = chunk
    if table_rows_ptr is not None:
        table_row = tl.load(table_rows_ptr + chunk)
    others = tl.arange(0, CHUNKS)

    for group in range(part * TILES, tl.cdiv(q_len, TILE_TOKENS), tl.num_programs(1) * TILES):
        start = (group + tl.arange(0, TILES)) * TILE_TOKENS
        num_rows = tl.minimum(q_len - start, TILE_TOKENS)
        end = first_position + start + num_rows
        place = tl.zeros([TILES], tl.int32)
        for base in range(0, num_chunks, CHUNKS):
            other = base + others
            is_chunk = other < num_chunks
            other_start = tl.load(cu_q_lens_ptr + other, mask=is_chunk, other=0)
            other_stop = tl.load(cu_q_lens_ptr + other + 1, mask=is_chunk, other=0)
            context_len = tl.load(context_lens_ptr + other, mask=is_chunk, other=0)
            num_other = tl.cdiv(other_stop - other_start, TILE_TOKENS)
            other_first = context_len - (other_stop - other_start)
            # Of two tiles with one end, that of the lower chunk comes first.
            bound = end[:, None] - (other < chunk).to(tl.int32)[None, :]
            num_sooner = tl.maximum((bound - other_first[None, :]) // TILE_TOKENS, 0)
            num_later = tl.maximum(num_other[None, :] - num_sooner, 0)
            num_later = tl.where(context_len[None, :] > bound, num_later, 0)
            place += tl.sum(num_later, axis=1)
        fields = tiles_ptr + place * 4
        is_tile = (start < q_len) & (place < max_tiles)
        tl.store(fields, chunk_start + start, mask=is_tile)
        tl.store(fields + 1, num_rows, mask=is_tile)
        tl.store(fields + 2, first_position + start, mask=is_tile)
        tl.store(fields + 3, table_row, mask=is_tile)

    if (chunk == 0) & (part == 0):
        total = 0
        for base in range(0, num_chunks, CHUNKS):
            other = base + others
            is_chunk = other < num_chunks
            other_start = tl.load(cu_q_lens_ptr + other, mask=is_chunk, other=0)
            other_stop = tl.load(cu_q_lens_ptr + other + 1, mask=is_chunk, other=0)
            total += tl.sum(tl.cdiv(other_stop - other_start, TILE_TOKENS), axis=0)
        tl.store(num_tiles_ptr, tl.minimum(total, max_tiles))


def plan_prefill(
    work: PrefillWork,
    cu_q_lens: torch.Tensor,
    context_lens: torch.Tensor,
    table_rows: torch.Tensor | None = None,
) -> None:
    """List a step's query tiles in work, on the device, in one launch.

    The order by length serves every window, so layers of different windows share one list.

    Args:
        work: written in place.
        cu_q_lens: [num_chunks + 1] int32, rows of q where each chunk starts, and the end; need not
            start at 0. At most the max_tokens that work was made for.
        context_lens: [num_chunks] int32, tokens in the cache with this chunk; of an empty chunk
            anything.
        table_rows: [num_chunks] int32, row of the block tables; None = row i for chunk i. Of an
            empty chunk anything.
    """
    device = work.tiles.device
    check_tensor("cu_q_lens", cu_q_lens, (work.num_chunks + 1,), torch.int32, device)
    check_tensor("context_lens", context_lens, (work.num_chunks,), torch.int32, device)
    if table_rows is not None:
        check_tensor("table_rows", table_rows, (work.num_chunks,), torch.int32, device)
    max_tiles = work.tiles.shape[0]
    parts = max(1, min(_MAX_PARTS, max_tiles // _TILES_AT_ONCE))
    _plan_prefill_kernel[(work.num_chunks, parts)](
        cu_q_lens, context_lens, table_rows, work.tiles, work.num_tiles, work.num_chunks,
        max_tiles, TILE_TOKENS=work.tile_tokens, TILES=_TILES_AT_ONCE, CHUNKS=_CHUNKS_AT_ONCE,
        num_warps=4,
    )  # fmt: skip
