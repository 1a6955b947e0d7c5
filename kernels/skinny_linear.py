"""A linear layer of at most 256 rows, with what stands before and after it in the same launch.

    y = f(x) @ weight.T (+ bias)            weight: [n, k] row-major
    f(x) = x                                prologue "none":     x [m, k]
         = rms_norm(x, norm_weight, eps)    prologue "rms_norm": x [m, k] fp32, the residual stream
         = silu(gate) * up                  prologue "silu_mul": x [m, 2 * k], gate first
    out = y,  or  residual [m, n] fp32 += y, in place

With few rows such a layer is the reading of its weights, and at one row a decode step is little
else; a launch saved is worth as much as a megabyte. Two kernels: "rows" multiplies whole weight
rows and sums (no tensor cores; once for each row of x), "tiles" pads x to 16, 32, 64 or 128 rows
for the tensor cores and may split k over programs; more rows than a tile are tiles of their own.

Numerics: products are summed in fp32, added to bias and residual in fp32, and rounded to out's
dtype once. rms_norm rounds x * norm_weight to the weight's dtype before the product and applies
1 / rms to the sum (the reference rounds the normed x instead: the same error, in another place;
fp16 overflows where |x * norm_weight| > 65504, bf16 does not). silu is rounded to the dtype, and
its product with up again, as silu_mul does. fp32 products are exact ("ieee").

Invariants:
1. The order of every sum depends on shapes and config alone: no float is added atomically. Of the
   programs that split a tile, the last to arrive adds all partial sums, in the order of their k.
2. Counters of a workspace are zero between launches; the last to arrive puts its own back.
3. With `uses_pdl` nothing but weights is touched before the launch before has ended.

When each config wins, and when cuBLAS does: `tuning.choose`, from measured tables.

Size: two kernels that share how x is loaded and how a tile ends, and one launcher for both.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from headrace.kernels.checks import check_linear, check_linear_target, check_tensor
from headrace.kernels.silu_mul import silu_mul_reference
from headrace.kernels.triton_seam import is_interpreted, tl, triton
from headrace.kernels.tuning import SkinnyConfig, guess

#: A program prefetches no more weights than this before it waits, so that all stay in the L2.
PREFETCH_BYTES = 64 * 1024


def skinny_linear_reference(
    x: torch.Tensor,  # [m, k], or [m, 2 * k] for silu_mul
    weight: torch.Tensor,  # [n, k]
    bias: torch.Tensor | None = None,  # [n]
    prologue: str = "none",
    norm_weight: torch.Tensor | None = None,  # [k], for rms_norm
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,  # [m, n] fp32; not written here
    dtype: torch.dtype | None = None,  # of the result; None = weight's, or fp32 with a residual
) -> torch.Tensor:
    """Return linear(f(x)), with the residual added where there is one: [m, n]."""
    if prologue == "rms_norm":
        assert norm_weight is not None
        x_fp32 = x.float()
        inverse_rms = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
        x = (x_fp32 * inverse_rms * norm_weight.float()).to(weight.dtype)
    elif prologue == "silu_mul":
        x = silu_mul_reference(x)
    result = x.float() @ weight.float().t()
    if bias is not None:
        result = result + bias.float()
    if residual is not None:
        return residual + result
    return result.to(dtype or weight.dtype)


@triton.jit
def _load_activation(
    x_ptr,  # in: [m, k] or [m, 2 * k]
    norm_ptr,  # in: [k], rms_norm only
    row,  # row of x, of a shape that broadcasts with column
    column,
    is_inside,
    dtype: tl.constexpr,
    K: tl.constexpr,
    PROLOGUE: tl.constexpr,
) -> tl.tensor:
    """Return f(x) but for 1 / rms, rounded to dtype, and x itself (whose squares rms_norm sums)."""
    if PROLOGUE == "silu_mul":
        gate_ptr = x_ptr + row * (2 * K) + column
        gate = tl.load(gate_ptr, mask=is_inside, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + K, mask=is_inside, other=0.0).to(tl.float32)
        # exp of minus the magnitude cannot overflow, whichever way the gate points.
        decay = tl.exp(-tl.abs(gate))
        sigmoid = tl.where(gate >= 0, 1.0, decay) / (1.0 + decay)
        raw = (gate * sigmoid).to(dtype).to(tl.float32) * up
        value = raw.to(dtype)
    else:
        raw = tl.load(x_ptr + row * K + column, mask=is_inside, other=0.0)
        value = raw
        if PROLOGUE == "rms_norm":
            norm = tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32)
            value = (raw * norm).to(dtype)
    return value, raw


@triton.jit
def _load_added(
    bias_ptr,
    out_ptr,
    row,
    column,
    is_inside,
    n,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tl.tensor:
    """Load what a tile's products are added to: bias, residual, both or nothing."""
    added = 0.0
    if HAS_BIAS:
        added += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    if ADDS:
        added += tl.load(out_ptr + row * n + column, mask=is_inside, other=0.0)
    return added


@triton.jit
def _finish(
    total,  # [.., block_n] fp32, the products' sums
    added,  # [.., block_n] fp32, or 0
    squares,  # sum of squares of x's row, rms_norm only
    out_ptr,
    row,
    column,
    is_inside,
    n,
    eps,
    K: tl.constexpr,
    PROLOGUE: tl.constexpr,
) -> None:
    """Apply 1 / rms to a tile's sums, and store them."""
    if PROLOGUE == "rms_norm":
        total = total * tl.rsqrt(squares / K + eps)
    total += added
    tl.store(out_ptr + row * n + column, total.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _load_weight(
    weight_rows,  # pointers to the first column of each weight row, along either axis
    is_row,
    column,
    K: tl.constexpr,
) -> tl.tensor:
    """Load a weight tile, which nobody reads again: it should push nothing else out of the L2."""
    is_inside = is_row & (column < K)
    return tl.load(weight_rows + column, mask=is_inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _prefetch_weights(
    weight_ptr,
    first_n,
    first_k,
    n,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,  # 128-byte lines of each weight row to prefetch
) -> None:
    """Send for this program's first weights, into the L2; registers wait for nothing."""
    line: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1).to(tl.int64)
    columns = tl.minimum(first_k + tl.arange(0, LINES) * line, K - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [weight_ptr + rows[:, None] * K + columns[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _skinny_rows_kernel(
    x_ptr,  # in: [m, k] or [m, 2 * k]
    norm_ptr,  # in: [k], rms_norm only
    weight_ptr,  # in: [n, k]
    bias_ptr,  # in: [n], HAS_BIAS only
    out_ptr,  # out: [m, n]; in and out with ADDS
    n,
    eps,
    K: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    # Programs of one weight tile are neighbours, so that all rows but the first read it from L2.
    row = tl.program_id(0)
    first_n = tl.program_id(1) * BLOCK_N
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    column_n = first_n + tl.arange(0, BLOCK_N)
    column_k = tl.arange(0, BLOCK_K)
    is_row = column_n[:, None] < n
    weight_rows = weight_ptr + column_n.to(tl.int64)[:, None] * K
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if K <= BLOCK_K:
        # All of the program's weights are on their way before it waits for anything. Without the
        # barrier ptxas saves registers: it sends for some only when others were multiplied.
        weight = _load_weight(weight_rows, is_row, column_k[None, :], K)
        if EARLY:
            tl.extra.cuda.gdc_wait()
        added = _load_added(bias_ptr, out_ptr, row, column_n, column_n < n, n, ADDS, HAS_BIAS)
        tl.debug_barrier()
        value, raw = _load_activation(
            x_ptr, norm_ptr, row, column_k, column_k < K, dtype, K, PROLOGUE
        )
        sums = weight.to(tl.float32) * value.to(tl.float32)[None, :]
        squares = raw.to(tl.float32) * raw.to(tl.float32)
    else:
        if EARLY:
            _prefetch_weights(weight_ptr, first_n, 0, n, K, BLOCK_N, LINES)
            tl.extra.cuda.gdc_wait()
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            column = start + column_k
            weight = _load_weight(weight_rows, is_row, column[None, :], K)
            value, raw = _load_activation(
                x_ptr, norm_ptr, row, column, column < K, dtype, K, PROLOGUE
            )
            sums += weight.to(tl.float32) * value.to(tl.float32)[None, :]
            if PROLOGUE == "rms_norm":
                squares += raw * raw
        added = _load_added(bias_ptr, out_ptr, row, column_n, column_n < n, n, ADDS, HAS_BIAS)
    _finish(
        tl.sum(sums, axis=1), added, tl.sum(squares, axis=0), out_ptr, row, column_n,
        column_n < n, n, eps, K, PROLOGUE,
    )  # fmt: skip


@triton.jit
def _sum_partials(
    total,  # [block_m, block_n] fp32, this program's
    squares,  # [block_m] fp32
    partials_ptr,  # [num_tiles, splits, block_m, block_n] fp32, then [.., block_m] of squares
    counters_ptr,  # [num_tiles] int32
    is_row,
    PROLOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """Leave this program's sums; the last to arrive returns (all in order, True)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    size: tl.constexpr = BLOCK_M * BLOCK_N
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    sums_ptr = partials_ptr + tile * SPLITS * size + row[:, None] * BLOCK_N + column[None, :]
    squares_ptr = partials_ptr + tl.num_programs(0) * SPLITS * size + tile * SPLITS * BLOCK_M + row
    tl.store(sums_ptr + split * size, total, mask=is_row[:, None])
    if PROLOGUE == "rms_norm":
        tl.store(squares_ptr + split * BLOCK_M, squares, mask=is_row)
    # One thread's atomic publishes the stores of all threads that passed the barrier before it.
    tl.debug_barrier()
    is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(SPLITS):
            # .cg: the L1 may hold what this multiprocessor read before another wrote it.
            total += tl.load(
                sums_ptr + part * size, mask=is_row[:, None], other=0.0, cache_modifier=".cg"
            )
            if PROLOGUE == "rms_norm":
                squares += tl.load(
                    squares_ptr + part * BLOCK_M, mask=is_row, other=0.0, cache_modifier=".cg"
                )
        tl.store(counters_ptr + tile, 0)
    return total, squares, is_last


@triton.jit
def _skinny_tiles_kernel(
    x_ptr,  # in: [m, k] or [m, 2 * k]
    norm_ptr,  # in: [k], rms_norm only
    weight_ptr,  # in: [n, k]
    bias_ptr,  # in: [n], HAS_BIAS only
    out_ptr,  # out: [m, n]; in and out with ADDS
    partials_ptr,  # scratch, SPLITS > 1 only
    counters_ptr,  # [num_tiles] int32, zero before and after; SPLITS > 1 only
    m,
    n,
    eps,
    K: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_K: tl.constexpr,  # columns of a split, a multiple of BLOCK_K
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    EARLY: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in fp32: Triton's interpreter cannot multiply bf16
) -> None:
    # Tiles of the same weights are neighbours, so that all but the first read them from the L2.
    first_m = tl.program_id(0) % ROW_TILES * BLOCK_M
    first_n = tl.program_id(0) // ROW_TILES * BLOCK_N
    first_k = tl.program_id(1) * SPLIT_K
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        _prefetch_weights(weight_ptr, first_n, first_k, n, K, BLOCK_N, LINES)
        tl.extra.cuda.gdc_wait()
    row = first_m + tl.arange(0, BLOCK_M)
    column_n = first_n + tl.arange(0, BLOCK_N)
    column_k = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + column_n.to(tl.int64)[None, :] * K
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(first_k, first_k + SPLIT_K, BLOCK_K, num_stages=STAGES):
        column = start + column_k
        weight = _load_weight(weight_rows, column_n[None, :] < n, column[:, None], K)
        is_inside = (row[:, None] < m) & (column[None, :] < K)
        value, raw = _load_activation(
            x_ptr, norm_ptr, row[:, None], column[None, :], is_inside, dtype, K, PROLOGUE
        )
        if UPCAST:
            value, weight = value.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(value, weight, total, input_precision="ieee")
        if PROLOGUE == "rms_norm":
            # Summed in each iteration: a tile of sums beside the products spills at 64 rows.
            squares += tl.sum(raw * raw, axis=1)
    is_mine = True
    if SPLITS > 1:
        total, squares, is_mine = _sum_partials(
            total, squares, partials_ptr, counters_ptr, row < m,
            PROLOGUE, BLOCK_M, BLOCK_N, SPLITS,
        )  # fmt: skip
    is_inside = (row[:, None] < m) & (column_n[None, :] < n) & is_mine
    added = _load_added(
        bias_ptr, out_ptr, row[:, None], column_n[None, :], is_inside, n, ADDS, HAS_BIAS
    )
    _finish(
        total, added, squares[:, None], out_ptr, row[:, None], column_n[None, :],
        is_inside, n, eps, K, PROLOGUE,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SkinnyWorkspace:
    """What programs that split a tile leave for the last of them; one a stream, never freed."""

    partials: torch.Tensor  # [num_floats] fp32
    counters: torch.Tensor  # [max_tiles] int32, zero between launches

    @classmethod
    def allocate(
        cls, device: torch.device, num_floats: int = 1 << 23, max_tiles: int = 4096
    ) -> "SkinnyWorkspace":
        """Allocate for launches that follow one another: 32 MiB by default."""
        return cls(
            torch.empty(num_floats, dtype=torch.float32, device=device),
            torch.zeros(max_tiles, dtype=torch.int32, device=device),
        )


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    prologue: str = "none",
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
    config: SkinnyConfig | None = None,
    workspace: SkinnyWorkspace | None = None,
) -> torch.Tensor:
    """Return linear(f(x)), or add it to the residual in place and return that.

    Args:
        x: [m, k] of weight's dtype; [m, k] fp32 for rms_norm; [m, 2 * k] for silu_mul. m <= 256.
        weight: [n, k], contiguous.
        out: [m, n], weight's dtype or fp32. Allocated when None; None with a residual.
        bias: [n], dtype of weight.
        prologue: "none", "rms_norm" or "silu_mul".
        norm_weight: [k], dtype of weight; given with rms_norm only.
        eps: added to the mean square, rms_norm only.
        residual: [m, n] fp32, added to in place; never x itself.
        config: from `tuning.choose`; None = its guess.
        workspace: needed by a config that splits; the guess splits only where it is given.
    """
    check_linear(x, weight, bias, prologue, norm_weight)
    check_linear_target(x, weight, out, residual)
    m, (n, k) = x.shape[0], weight.shape
    target = out if residual is None else residual
    if target is None:
        target = torch.empty((m, n), dtype=weight.dtype, device=weight.device)
    if m == 0:
        return target
    if config is None:
        config = guess(m, n, k)
        if workspace is None:
            config = replace(config, splits=1)
    norm = x if norm_weight is None else norm_weight
    tensors = (x, norm, weight, weight if bias is None else bias, target)
    flags = {
        "K": k,
        "PROLOGUE": prologue,
        "ADDS": residual is not None,
        "HAS_BIAS": bias is not None,
        **_config_arguments(config, k, weight.element_size()),
    }
    if config.method == "rows":
        grid = (m, triton.cdiv(n, config.block_n))
        _skinny_rows_kernel[grid](*tensors, n, eps, **flags)
    else:
        flags |= _tile_arguments(config, m, k)
        grid = (flags["ROW_TILES"] * triton.cdiv(n, config.block_n), config.splits)
        scratch = _scratch(config, workspace, grid[0], flags["BLOCK_M"], target)
        _skinny_tiles_kernel[grid](*tensors, *scratch, m, n, eps, **flags)
    return target


def _config_arguments(config: SkinnyConfig, k: int, element_bytes: int) -> dict[str, Any]:
    # The interpreter runs no inline assembly, and programs one after another anyway.
    is_early = config.uses_pdl and not is_interpreted()
    bytes_a_row = min(PREFETCH_BYTES // config.block_n, k * element_bytes // config.splits)
    arguments: dict[str, Any] = {
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.num_stages,
        "LINES": triton.next_power_of_2(triton.cdiv(bytes_a_row, 128)),
        "EARLY": is_early,
        "num_warps": config.num_warps,
    }
    return arguments | ({"launch_pdl": True} if is_early else {})


def _tile_arguments(config: SkinnyConfig, m: int, k: int) -> dict[str, Any]:
    block_m = min(config.block_m, max(16, triton.next_power_of_2(m)))
    return {
        "ROW_TILES": triton.cdiv(m, block_m),
        "BLOCK_M": block_m,
        "SPLITS": config.splits,
        "SPLIT_K": triton.cdiv(triton.cdiv(k, config.splits), config.block_k) * config.block_k,
        "UPCAST": is_interpreted(),
    }


def _scratch(
    config: SkinnyConfig,
    workspace: SkinnyWorkspace | None,
    num_tiles: int,
    block_m: int,
    target: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if config.splits == 1:
        return target, target  # never touched
    needed = num_tiles * config.splits * block_m * (config.block_n + 1)
    if workspace is None:
        raise ValueError(
            f"a config with {config.splits} splits must have a workspace; found None: "
            "pass SkinnyWorkspace.allocate(device), made once"
        )
    num_floats, max_tiles = workspace.partials.numel(), workspace.counters.numel()
    if needed > num_floats or num_tiles > max_tiles:
        raise ValueError(
            f"the workspace must hold {needed} floats and {num_tiles} tiles; found {num_floats} "
            f"and {max_tiles}: allocate it larger or split less"
        )
    check_tensor("partials", workspace.partials, (num_floats,), torch.float32, target.device)
    check_tensor("counters", workspace.counters, (max_tiles,), torch.int32, target.device)
    return workspace.partials, workspace.counters


#: Sums of up to 2,000 products of unit size, rounded once to the dtype; what f(x) loses by being
#: rounded (rms_norm: elsewhere than the reference) grows with the root of k.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
