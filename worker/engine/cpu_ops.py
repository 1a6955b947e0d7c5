"""The kernels' operations in the fastest plain torch found for a CPU, equal to their references.

A CPU has no use for a fused kernel written in Python, but it does have fast GEMMs and a fused
attention over padded keys. So what depends only on the step's positions (rotation angles, which
cache blocks each sequence reads, which keys each query sees) is worked out once a step in `CpuStep`
and used by all layers; per layer there is one gather of whole blocks and one call of
`scaled_dot_product_attention` for a group of sequences.

Decodes are grouped by number of blocks rounded up to a power of two, so that one long context does
not make all others gather as many blocks: padding is at most double. Query heads that share a KV
head are laid out as rows of one query, so nothing is repeated in memory.

Numerics: attention is torch's own (fp32 accumulation). The residual stream is fp32, where
transformers and the reference round it to the model's dtype: two roundings a layer fewer, which a
CPU has almost for nothing. Tolerances are in the test.

Called by: model.py through runner.py; tested against the references of headrace.kernels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from headrace.worker.engine.flat import FlatBatch
from headrace.worker.engine.weights import MATRICES, Weights

#: rows that oneDNN lays weights out for. Against F.linear on an EPYC with AVX-512 BF16, one thread,
#: SmolLM2's matrices at 1, 16 and 300 rows take 62, 63 and 85 % of the time in bf16, 85, 53 and
#: 80 % in fp32; laid out for 1 or 256 rows it is the same.
PACKED_ROWS = 16


@dataclass(frozen=True, slots=True)
class _Group:
    """Sequences that attend in one call, with equally many padded blocks and rows."""

    rows: torch.Tensor | slice  # of the batch, [num_seqs * q_len], sequence by sequence
    blocks: torch.Tensor  # [num_seqs * num_blocks] int64, flat; unused ones name block 0
    mask: torch.Tensor  # [num_seqs, 1, 1 or heads_per_kv * q_len, num_keys], 0 or -inf
    num_seqs: int
    q_len: int


@dataclass(frozen=True, slots=True)
class CpuStep:
    """What all layers of one step share."""

    cos: torch.Tensor  # [num_tokens, 1, head_dim] fp32, halves repeated
    sin: torch.Tensor  # [num_tokens, 1, head_dim], first half negated
    slots: torch.Tensor  # [num_tokens] int64
    groups: dict[int | None, list[_Group]]  # by window

    @classmethod
    def build(
        cls,
        batch: FlatBatch,
        cos: torch.Tensor,  # [max_positions, head_dim] as `rope_tables` makes them
        sin: torch.Tensor,
        windows: frozenset[int | None],
        block_size: int,
        heads_per_kv: int,
        dtype: torch.dtype,  # of the cache
    ) -> CpuStep:
        positions = torch.from_numpy(batch.positions)
        return cls(
            cos=cos[positions].unsqueeze(1),
            sin=sin[positions].unsqueeze(1),
            slots=torch.from_numpy(batch.slots).long(),
            groups={w: _groups(batch, w, block_size, heads_per_kv, dtype) for w in windows},
        )


def rope_tables(
    cos: torch.Tensor,  # [max_positions, head_dim // 2] fp32
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Widen half tables so that a rotation is x * cos + swapped(x) * sin."""
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def pack_weights(weights: Weights) -> Weights:
    """Lay all matrices out for oneDNN's GEMM once, where this build and CPU have it."""
    if not _can_pack(weights.embedding.dtype):
        return weights
    return dataclasses.replace(
        weights,
        lm_head=_pack(weights.lm_head),
        layers=tuple(
            dataclasses.replace(layer, **{name: _pack(getattr(layer, name)) for name in MATRICES})
            for layer in weights.layers
        ),
    )


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)


def _can_pack(dtype: torch.dtype) -> bool:
    """Try what torch does not promise: these operators are those of its own compiler."""
    weight = torch.eye(16, dtype=dtype)
    try:
        found = linear(weight[:3], _pack(weight), None)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found, weight[:3])


def linear(
    x: torch.Tensor,  # [num_rows, in]
    weight: torch.Tensor,  # [out, in], plain or packed
    bias: torch.Tensor | None,  # [out]
) -> torch.Tensor:  # [num_rows, out]
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    if not len(x):  # oneDNN refuses what has no rows, as a step whose prompts all go on has
        return x.new_empty(0, weight.shape[0])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def rms_norm(
    x: torch.Tensor,  # [..., width]
    weight: torch.Tensor,  # [width]
    eps: float,
) -> torch.Tensor:
    """Norm rows in fp32 and return them in the weight's dtype, rounded as the reference rounds."""
    wide = x.float()
    mean_square = torch.linalg.vecdot(wide, wide).div_(x.shape[-1])
    return (wide * mean_square.add_(eps).rsqrt_().unsqueeze(-1)).to(weight.dtype).mul_(weight)


def residual_rms_norm(
    x: torch.Tensor,  # [num_tokens, hidden]
    residual: torch.Tensor,  # [num_tokens, hidden] fp32
    weight: torch.Tensor,  # [hidden]
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (normed sum, sum in fp32)."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:  # [num_tokens, 2 * inter]
    """Return silu(gate) * up: [num_tokens, inter]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def qkv_rope_write(
    qkv: torch.Tensor,  # [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
    step: CpuStep,
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim], written in place
    v_cache: torch.Tensor,  # like k_cache
    num_q_heads: int,
    qk_norm: tuple[torch.Tensor, torch.Tensor] | None,  # q's and k's weight, [head_dim] each
    eps: float,
) -> torch.Tensor:
    """Return q: [num_tokens, num_q_heads, head_dim], rotated; put K and V into their slots."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    qk = heads[:, : num_q_heads + num_kv_heads]
    if qk_norm is not None:
        q, k = qk.split((num_q_heads, num_kv_heads), dim=1)
        normed = [rms_norm(x, w, eps) for x, w in zip((q, k), qk_norm, strict=True)]
        qk = torch.cat(normed, dim=1)
    qk = qk.float()
    qk = torch.addcmul(qk * step.cos, qk.roll(head_dim // 2, dims=-1), step.sin).to(qkv.dtype)
    k_cache.view(-1, num_kv_heads, head_dim).index_copy_(0, step.slots, qk[:, num_q_heads:])
    v_cache.view(-1, num_kv_heads, head_dim).index_copy_(
        0, step.slots, heads[:, num_q_heads + num_kv_heads :]
    )
    return qk[:, :num_q_heads]


def paged_attention(
    q: torch.Tensor,  # [num_tokens, num_q_heads, head_dim]
    step: CpuStep,
    k_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    v_cache: torch.Tensor,  # like k_cache
    scale: float,
    window: int | None,
) -> torch.Tensor:  # [num_tokens, num_q_heads * head_dim]
    """Attend from every row to what its sequence has in the cache, the step's own rows included."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    out = torch.empty(num_tokens, num_q_heads, head_dim, dtype=q.dtype)
    for group in step.groups[window]:
        shape = (group.num_seqs, -1, num_kv_heads, head_dim)
        k = k_cache.index_select(0, group.blocks).view(shape).transpose(1, 2)
        v = v_cache.index_select(0, group.blocks).view(shape).transpose(1, 2)
        rows = q[group.rows].view(group.num_seqs, group.q_len, num_kv_heads, -1, head_dim)
        # [num_seqs, num_kv_heads, group * q_len, head_dim]: the heads of a group are rows too.
        grouped = rows.permute(0, 2, 3, 1, 4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=group.mask, scale=scale)
        mixed = mixed.view(group.num_seqs, num_kv_heads, -1, group.q_len, head_dim)
        out[group.rows] = mixed.permute(0, 3, 1, 2, 4).reshape(-1, num_q_heads, head_dim)
    return out.view(num_tokens, -1)


def _groups(
    batch: FlatBatch, window: int | None, block_size: int, heads_per_kv: int, dtype: torch.dtype
) -> list[_Group]:
    """Split a batch into groups: one-row sequences by power of two of blocks, each chunk alone."""
    q_lens = np.diff(batch.cu_q_lens)
    first_seen = batch.context_lens - q_lens + 1 - (window or 0)
    first_blocks = np.maximum(first_seen, 0) // block_size if window else np.zeros_like(q_lens)
    num_blocks = -(-batch.context_lens // block_size) - first_blocks
    sizes = np.where(q_lens == 1, np.ceil(np.log2(num_blocks)), -1)
    members = [np.flatnonzero(sizes == size) for size in np.unique(sizes[q_lens == 1])]
    members += [np.array([seq]) for seq in np.flatnonzero(q_lens > 1)]
    groups: list[_Group] = []
    for seqs in members:
        columns = first_blocks[seqs, None] + np.arange(num_blocks[seqs].max())
        columns = np.minimum(columns, batch.block_tables.shape[1] - 1)
        blocks = np.maximum(batch.block_tables[seqs[:, None], columns], 0)
        key_positions = first_blocks[seqs, None] * block_size + np.arange(
            columns.shape[1] * block_size
        )
        q_len, start = int(q_lens[seqs[0]]), int(batch.cu_q_lens[seqs[0]])
        is_one = len(seqs) == 1
        groups.append(
            _Group(
                rows=slice(start, start + q_len)
                if is_one
                else torch.from_numpy(batch.cu_q_lens[seqs].astype(np.int64)),
                blocks=torch.from_numpy(blocks.astype(np.int64).ravel()),
                mask=_mask(batch.context_lens[seqs], q_len, key_positions, window)
                .repeat(1, 1, heads_per_kv if q_len > 1 else 1, 1)
                .to(dtype),
                num_seqs=len(seqs),
                q_len=q_len,
            )
        )
    return groups


def _mask(
    context_lens: np.ndarray,  # [num_seqs]
    q_len: int,
    key_positions: np.ndarray,  # [num_seqs, num_keys]
    window: int | None,
) -> torch.Tensor:  # [num_seqs, 1, q_len, num_keys] fp32, 0 = seen, -inf = not
    """Return what is added to the scores."""
    q_positions = (context_lens[:, None] - q_len + np.arange(q_len))[:, :, None]
    keys = key_positions[:, None, :]
    is_seen = keys <= q_positions
    if window is not None:
        is_seen &= keys > q_positions - window
    return torch.from_numpy(np.where(is_seen, np.float32(0), np.float32(-np.inf))).unsqueeze(1)
