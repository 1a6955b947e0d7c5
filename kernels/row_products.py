"""The product of one row with a weight, its first tiles in registers before the row is known.

    out[i] = sum_k f(x)[k] weight[i, k] (+ bias[i])          f(x) = x, or x * norm_weight
    normed: out * rsqrt(mean(x^2) + eps);   added: residual[i] += out[i]
    two parts: silu(out[i]) * out[n + i]

For kernels of several phases (decode_layers.py): nothing of a weight depends on the phase before,
so `load_units` sends for a program's first weights ahead of the barrier, and `multiply_row` sums
them behind it and sends for the next ones as each has been used.

A unit is a tile of `BLOCK_N` weight rows by `CHUNK` columns, [CHUNK / 256, BLOCK_N, 256]: in this
order of dimensions a warp holds whole rows of a unit, 16 bytes a thread and chunk of 256 columns,
and sums them without another warp. Program p takes the tiles of BLOCK_N rows p, p + num_programs,
..; the units of a tile follow one another, chunk by chunk, gate before up.

Numerics: as skinny_linear.py's: x * norm_weight is rounded to the weight's dtype before the
product, products are summed in fp32, the sum is rounded once (gate and up before silu, and silu).

Invariants:
1. A row of the result is one program's, and its sums are made in the order of the columns.
2. HELD is a multiple of PARTS; a program has UNITS units, those without rows included.

Called by decode_layers.py.
"""

from headrace.kernels.triton_seam import tl, triton

# What a constexpr condition binds, the same condition reads.
# pyright: reportPossiblyUnboundVariable=false

#: Columns that a warp reads at once: 16 bytes a thread in 16 bits.
LANES = tl.constexpr(256)  # pyright: ignore[reportCallIssue]


@triton.jit
def columns_of(chunk, CHUNK: tl.constexpr) -> tl.tensor:
    """Return the columns of a chunk: [CHUNK / LANES, LANES]."""
    lines = tl.arange(0, CHUNK // LANES)[:, None] * LANES
    return chunk * CHUNK + lines + tl.arange(0, LANES)[None, :]


@triton.jit
def load_unit(
    weight_ptr,  # in: [PARTS * N, K]
    unit,  # of this program
    num_rows,  # of a part; 0 = load nothing
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tensor:
    """Load one unit: [CHUNK / LANES, BLOCK_N, LANES]; nobody reads it again."""
    per_tile: tl.constexpr = (K + CHUNK - 1) // CHUNK * PARTS
    tile = tl.program_id(0) + unit // per_tile * tl.num_programs(0)
    chunk = unit % per_tile // PARTS
    first_row = tile * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    is_inside = (first_row + rows < num_rows)[None, :, None]
    columns = columns_of(0, CHUNK)[:, None, :]
    if K % CHUNK != 0:
        is_inside = is_inside & (chunk * CHUNK + columns < K)
    start = (first_row + unit % PARTS * N).to(tl.int64) * K + chunk * CHUNK
    # Not so, and nothing but the order of the first two dimensions follows from it: Triton 3.6
    # spread the first over warps otherwise, which then need each other for every sum.
    offsets = tl.max_contiguous(rows[None, :, None] * K + columns, [1, 2, LANES])
    return tl.load(
        weight_ptr + start + offsets,
        mask=is_inside, other=0.0, eviction_policy="evict_first",
    )  # fmt: skip


@triton.jit
def load_units(
    weight_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    HELD: tl.constexpr,
) -> tl.tensor:
    """Load the first HELD units, as a tuple."""
    units = ()
    for i in tl.static_range(HELD):
        unit = load_unit(weight_ptr, i, num_rows, N, K, CHUNK, BLOCK_N, PARTS)
        units = units + (unit,)  # noqa: RUF005 (Triton knows no star)
    return units


@triton.jit
def load_norm(norm_ptr, K: tl.constexpr, CHUNK: tl.constexpr) -> tl.tensor:
    """Load a norm's weight ahead where it is one chunk: [CHUNK / LANES, LANES]."""
    columns = columns_of(0, CHUNK)
    return tl.load(norm_ptr + columns, mask=columns < K, other=0.0)


@triton.jit
def load_stream(
    residual_ptr,  # in: [K] fp32
    embedding_ptr,  # in: [K], the token's
    is_first,  # whether nothing is in the residual yet
    is_later,
    columns,
    K: tl.constexpr,
) -> tl.tensor:
    """Load from the residual stream in fp32, which starts as the token's embedding."""
    is_inside = columns < K
    first = tl.load(embedding_ptr + columns, mask=is_inside & is_first, other=0.0)
    later = tl.load(
        residual_ptr + columns, mask=is_inside & is_later, other=0.0, cache_modifier=".cg"
    )
    return first.to(tl.float32) + later


@triton.jit
def _load_x(
    x_ptr,
    embedding_ptr,
    norm_ptr,
    is_first,
    is_later,
    chunk,
    dtype: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMS: tl.constexpr,
) -> tl.tensor:
    """Return one chunk of f(x): [CHUNK / LANES, LANES]."""
    columns = columns_of(chunk, CHUNK)
    if NORMS:
        raw = load_stream(x_ptr, embedding_ptr, is_first, is_later, columns, K)
        norm = tl.load(norm_ptr + columns, mask=columns < K, other=0.0)
        x = (raw * norm.to(tl.float32)).to(dtype)
    else:
        x = tl.load(x_ptr + columns, mask=columns < K, other=0.0, cache_modifier=".cg")
    return x


@triton.jit
def _load_added(
    bias_ptr,
    out_ptr,
    rows,
    part: tl.constexpr,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
) -> tl.tensor:
    """Load what the sums of a tile are added to; the residual's rows are this program's own."""
    added = tl.zeros(rows.shape, tl.float32)
    if HAS_BIAS:
        added += tl.load(bias_ptr + part * N + rows, mask=rows < N, other=0.0).to(tl.float32)
    if ADDS:
        added += tl.load(out_ptr + rows, mask=rows < N, other=0.0, cache_modifier=".cg")
    return added


@triton.jit
def _store_tile(
    first,  # [BLOCK_N] fp32, sums of the first part: gate
    second,  # [BLOCK_N] fp32: up; PARTS 2 only
    out_ptr,
    rows,
    dtype: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    if PARTS == 2:
        gate, up = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        # exp of minus the magnitude cannot overflow, whichever way the gate points.
        decay = tl.exp(-tl.abs(gate))
        sigmoid = tl.where(gate >= 0, 1.0, decay) / (1.0 + decay)
        first = (gate * sigmoid).to(dtype).to(tl.float32) * up
    tl.store(out_ptr + rows, first.to(out_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def _add_unit(
    unit,  # [CHUNK / LANES, BLOCK_N, LANES]
    x,  # [CHUNK / LANES, LANES], the chunk before, or the only one
    sums,  # ([BLOCK_N], [BLOCK_N]) fp32, of the parts
    added,  # what is added to them
    pointers,
    is_first,
    is_later,
    inverse_rms,
    number,  # of the unit within the program
    at,  # of the unit within its tile
    part: tl.constexpr,
    dtype: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    NORMS: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tuple:
    """Sum one unit, begin its tile or end it where it is the first or last; return what goes on."""
    per_tile: tl.constexpr = (K + CHUNK - 1) // CHUNK * PARTS
    x_ptr, embedding_ptr, norm_ptr, bias_ptr, out_ptr = pointers
    tile = tl.program_id(0) + number // per_tile * tl.num_programs(0)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if K > CHUNK and part == 0:
        x = _load_x(
            x_ptr, embedding_ptr, norm_ptr, is_first, is_later, at // PARTS,
            dtype, K, CHUNK, NORMS,
        )  # fmt: skip
    first, second = sums
    added_first, added_second = added
    if at == 0:
        first = tl.zeros([BLOCK_N], tl.float32)
        second = tl.zeros([BLOCK_N], tl.float32)
        added_first = _load_added(bias_ptr, out_ptr, rows, 0, N, HAS_BIAS, ADDS)
        if PARTS == 2:
            added_second = _load_added(bias_ptr, out_ptr, rows, 1, N, HAS_BIAS, ADDS)
    product = unit.to(tl.float32) * x.to(tl.float32)[:, None, :]
    total = tl.sum(tl.sum(product, axis=0), axis=1)
    if part == 0:
        first += total
    else:
        second += total
    if at == per_tile - 1:
        _store_tile(
            first * inverse_rms + added_first, second * inverse_rms + added_second,
            out_ptr, rows, dtype, N, PARTS,
        )  # fmt: skip
    return x, (first, second), (added_first, added_second)


@triton.jit
def multiply_row(
    units,  # of `load_units`
    norm,  # of `load_norm`, where it is one chunk
    weight_ptr,  # in: [PARTS * N, K]
    norm_ptr,  # in: [K], NORMS only
    bias_ptr,  # in: [PARTS * N], HAS_BIAS only
    x_ptr,  # in: [K]; the residual stream with NORMS, fp32
    embedding_ptr,  # in: [K] of the token, NORMS only
    is_first,  # whether x is the embedding, NORMS only
    is_later,  # whether x is the residual
    out_ptr,  # out: [N]; in and out with ADDS, fp32
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    HELD: tl.constexpr,
    UNITS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,  # K, up to a power of two of at least LANES
    NORMS: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Multiply the row with this program's rows of the weight."""
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    chunks: tl.constexpr = (K + CHUNK - 1) // CHUNK
    per_tile: tl.constexpr = chunks * PARTS
    inverse_rms = 1.0
    if NORMS:
        whole: tl.constexpr = CHUNK if chunks == 1 else ROW_BLOCK
        row = load_stream(x_ptr, embedding_ptr, is_first, is_later, columns_of(0, whole), K)
        if chunks == 1:
            x = (row * norm.to(tl.float32)).to(dtype)
        inverse_rms = tl.rsqrt(tl.sum(tl.sum(row * row, axis=0), axis=0) / K + eps)
    elif chunks == 1:
        x = tl.load(
            x_ptr + columns_of(0, CHUNK), mask=columns_of(0, CHUNK) < K, other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
    if chunks > 1:
        x = tl.zeros([CHUNK // LANES, LANES], dtype)
    nothing = tl.zeros([BLOCK_N], tl.float32)
    sums, added = (nothing, nothing), (nothing, nothing)
    pointers = (x_ptr, embedding_ptr, norm_ptr, bias_ptr, out_ptr)
    if UNITS <= HELD:
        for i in tl.static_range(UNITS):
            x, sums, added = _add_unit(
                units[i], x, sums, added, pointers, is_first, is_later, inverse_rms,
                i, i % per_tile, i % PARTS,
                dtype, N, K, CHUNK, BLOCK_N, PARTS, NORMS, ADDS, HAS_BIAS,
            )  # fmt: skip
    else:
        for base in range(0, UNITS, HELD):
            later = ()
            for i in tl.static_range(HELD):
                x, sums, added = _add_unit(
                    units[i], x, sums, added, pointers, is_first, is_later, inverse_rms,
                    base + i, (base + i) % per_tile, i % PARTS,
                    dtype, N, K, CHUNK, BLOCK_N, PARTS, NORMS, ADDS, HAS_BIAS,
                )  # fmt: skip
                next_one = base + i + HELD
                unit = load_unit(weight_ptr, next_one, N, N, K, CHUNK, BLOCK_N, PARTS)
                later = later + (unit,)  # noqa: RUF005
            units = later
