"""What launchers check of the paged KV cache, its block tables and the heads that read it.

A cache is the same thing to all who use it, so it is checked in one place: K and V alike in shape,
strides, dtype and device, a head's values side by side, in the dtype of the model or in fp8 with a
scale for each KV head.

Invariants, with those of checks.py:
1. A cache that one launcher takes, every launcher of the same heads takes.

Called by qkv_rope_write.py, paged_decode.py and paged_prefill.py.
"""

import torch

from headrace.kernels.checks import HEAD_DIMS, check_strided, check_tensor
from headrace.kernels.fp8 import FP8


def check_caches(
    q_heads: tuple[int, int],  # (num_q_heads, head_dim)
    dtype: torch.dtype,  # of the model
    device: torch.device,
    caches: tuple[torch.Tensor, torch.Tensor],  # K and V
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
) -> None:
    """Raise ValueError unless both caches are alike, fit the query heads and have their scales.

    Any strides will do for blocks, positions and heads, as long as K and V have the same.
    """
    num_q_heads, head_dim = q_heads
    k_cache, v_cache = caches
    if k_cache.dim() != 4 or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"k_cache must be [num_blocks, block_size, num_kv_heads, {head_dim}] as the query "
            f"heads have head_dim {head_dim}; found {list(k_cache.shape)}: allocate it for this "
            "model"
        )
    num_kv_heads = k_cache.shape[2]
    if num_kv_heads == 0 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads; found {num_q_heads} and "
            f"{num_kv_heads}: pass the cache of this layer's model"
        )
    if k_cache.dtype not in (dtype, FP8):
        raise ValueError(
            f"k_cache must be {dtype} as the model, or {FP8}; found {k_cache.dtype}: "
            "allocate it in one of these"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_strided(name, cache, tuple(k_cache.shape), k_cache.dtype, device)
    if v_cache.stride() != k_cache.stride():
        raise ValueError(
            f"v_cache must have the strides of k_cache, {list(k_cache.stride())}; found "
            f"{list(v_cache.stride())}: allocate both alike"
        )
    for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
        _check_scale(name, scale, k_cache)


def _check_scale(name: str, scale: torch.Tensor | None, cache: torch.Tensor) -> None:
    if (scale is not None) != (cache.dtype == FP8):
        raise ValueError(
            f"{name} must be given for a {FP8} cache and for no other; found "
            f"{'none' if scale is None else 'one'} with {cache.dtype}: pass one number a KV head "
            "with an fp8 cache, else None"
        )
    if scale is not None:
        check_tensor(name, scale, (cache.shape[2],), torch.float32, cache.device)


def check_attention(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
) -> None:
    """Raise ValueError for what the attention kernels are not built for."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"attention kernels are built for head_dim in {list(HEAD_DIMS)}; found {head_dim}: "
            "run this model on the references"
        )
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(
            f"block_size must be a power of two and at least 16; found {block_size}: "
            "set the KV pool's block size to 16, 32, 64 or 128"
        )
    if num_q_heads // num_kv_heads > 64:
        raise ValueError(
            "at most 64 query heads may share a KV head; found "
            f"{num_q_heads} query and {num_kv_heads} KV heads: run this model on the references"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"window must be at least 1 (the token itself) or None; found {window}: "
            "pass None for full attention"
        )


def check_block_tables(
    block_tables: torch.Tensor,
    device: torch.device,
    num_rows: int | None = None,  # None = any: rows are named by table_rows
) -> None:
    """Raise ValueError unless these are rows of block ids, which may be a view into wider rows."""
    if block_tables.dim() != 2:
        raise ValueError(
            "block_tables must be [num_rows, max_blocks]; found "
            f"{list(block_tables.shape)}: pass the table of block ids"
        )
    rows = block_tables.shape[0] if num_rows is None else num_rows
    shape = (rows, block_tables.shape[1])
    check_strided("block_tables", block_tables, shape, torch.int32, device)
