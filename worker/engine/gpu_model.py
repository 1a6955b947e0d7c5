"""The decoder on a GPU: one step's launches, from slots to tokens, nothing read by the host.

    body: prepare -> embed, norm -> each layer: qkv | rope, write | attention | o | +, norm |
          gate and up | silu * | down | +, norm  -> hidden rows that are due
    tail: lm_head and draw in one, or logits -> penalties, filters, log-probabilities -> draw;
          then commit, which feeds the token back and tests for the end

Both are pure sequences of launches on fixed memory, so that gpu_graphs.py can capture them. The
residual stream is fp32 and updated in place; everything between is in the model's dtype.

Invariants:
 1. No launch depends on a value that only the device has, nor on how many rows are real.
 2. A row's result does not depend on the rows beside it, but for the rounding of products that
    choose their tiles by the number of rows.
 3. At most 9 launches a layer, 5 of them products or attention; 6 where skinny kernels serve. A
    step of one decode is one launch for all layers, where that serves (kernels/decode_layers.py).

Called by: gpu_runner.py. The plain counterpart is model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from headrace.kernels import step as layout
from headrace.kernels.decode_layers import decode_layers
from headrace.kernels.decode_work import DecodeWork, choose_num_shares, plan_decode
from headrace.kernels.embed import embed_rms_norm
from headrace.kernels.layers_work import LayersWork, LayerTensors, can_run
from headrace.kernels.lm_head import lm_head_draw, lm_head_work
from headrace.kernels.paged_decode import paged_decode
from headrace.kernels.paged_prefill import choose_tiling, paged_prefill
from headrace.kernels.prefill_work import make_prefill_work, plan_prefill
from headrace.kernels.qkv_rope_write import qkv_rope_write
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.step import commit_step, prepare_step
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.gpu_draw import LogitsDraw, Need
from headrace.worker.engine.gpu_layers import make_layers
from headrace.worker.engine.gpu_state import DeviceState
from headrace.worker.engine.weights import Weights

#: decodes up to which one attention program a multiprocessor is best: 8 x 4k 39.5 us against 43.6
#: with two, 64 x 1.1k 78.0 against 75.5 (H200, qwen3-0.6b's heads).
FEW_ROWS = 16


def _few_work(
    num_slots: int, heads: tuple[int, int, int], device: torch.device, window: int | None
) -> DecodeWork:
    num_shares = choose_num_shares(heads[1], device, 1)
    return DecodeWork.allocate(num_slots, heads, device, window, num_shares=num_shares, min_share=8)


def _many_work(
    num_slots: int,
    heads: tuple[int, int, int],
    device: torch.device,
    window: int | None,
    *,
    is_fp8: bool,
) -> DecodeWork:
    # A third program fits beside two where tiles are half as large: 204 us against 233.
    num_shares = choose_num_shares(heads[1], device, 3 if is_fp8 else 2)
    return DecodeWork.allocate(num_slots, heads, device, window, num_shares=num_shares, overhead=5)


def _row_work(arch: Architecture, weights: Weights, *, is_fp8_cache: bool) -> LayersWork | None:
    """Return what a step of one row needs to be one launch of all layers; None: it cannot be."""
    heads = (arch.num_q_heads, arch.num_kv_heads, arch.head_dim)
    embedding, is_fp8 = weights.embedding, not isinstance(weights.layers[0].qkv, torch.Tensor)
    if is_fp8_cache or is_fp8:
        return None
    if not can_run(arch.hidden, heads, embedding.dtype, embedding.device):
        return None
    layers = [
        LayerTensors(
            layer.attention_norm, layer.qkv, layer.qkv_bias, *(layer.qk_norm or (None, None)),
            layer.o, layer.o_bias, layer.mlp_norm, layer.gate_up, layer.gate_up_bias, layer.down,
            layer.down_bias,
        )
        for layer in weights.layers
    ]  # fmt: skip
    return LayersWork.allocate(layers, arch.windows, heads)


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values; [num_layers, num_blocks, num_kv_heads, block_size, head_dim] in memory."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None  # [num_layers, num_kv_heads] fp32, of an fp8 cache
    v_scale: torch.Tensor | None

    @property
    def block_size(self) -> int:
        return self.k.shape[3]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one layer's keys and values as [num_blocks, block_size, num_kv_heads, dim]."""
        return self.k[index].transpose(1, 2), self.v[index].transpose(1, 2)

    def scales(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return one layer's scales of keys and of values; None unless the cache is fp8."""
        if self.k_scale is None or self.v_scale is None:
            return None, None
        return self.k_scale[index], self.v_scale[index]


class GpuModel:
    """Weights, rotations, work lists and the buffers between body and tail."""

    def __init__(
        self,
        arch: Architecture,
        weights: Weights,
        state: DeviceState,
        device_name: str,
        *,
        is_fp8_cache: bool,
    ) -> None:
        self._arch, self._weights, self._state = arch, weights, state
        device = state.device
        self._cos, self._sin = (table.to(device) for table in arch.rope_cos_sin())
        heads = (arch.num_q_heads, arch.num_kv_heads, arch.head_dim)
        self._decode_work = [
            {w: allocate(state.num_slots, heads, device, w) for w in dict.fromkeys(arch.windows)}
            for allocate in (_few_work, partial(_many_work, is_fp8=is_fp8_cache))
        ]
        self.dtype = weights.embedding.dtype
        group = arch.num_q_heads // arch.num_kv_heads
        self._tiling = choose_tiling(group, arch.head_dim, self.dtype)
        self._prefill_work = make_prefill_work(
            state.max_rows, state.num_slots, self._tiling.tile_tokens, device
        )
        self._layers = make_layers(weights.layers, arch.rms_eps, device_name)
        self._row_work = _row_work(arch, weights, is_fp8_cache=is_fp8_cache)
        self._head_work = lm_head_work(state.num_slots, arch.vocab_size, device)
        hidden = (state.num_slots, arch.hidden)
        self._due_hidden = torch.zeros(hidden, dtype=self.dtype, device=device)
        self._logits_draw = LogitsDraw(weights.lm_head, state)
        self.logprobs = self._logits_draw.logprobs

    def decode(self, cache: KvCache, num_rows: int, need: Need) -> None:
        """Compute and draw one token of each of `state.decode_slots[:num_rows]`."""
        state = self._state
        slots = state.decode_slots[:num_rows]
        prepare_step(
            state.words, slots, None, None, *self._made(num_rows), state.decode_lens,
            cache.block_size,
        )  # fmt: skip
        if num_rows == 1 and self._row_work is not None:
            hidden = self._one_row(cache, self._row_work)
        else:
            hidden = self._body(cache, num_rows, has_chunks=False, due_rows=None)
        self._tail(hidden, slots, state.decode_lens[:num_rows], need)

    def _one_row(self, cache: KvCache, work: LayersWork) -> torch.Tensor:  # [1, hidden]
        """Compute the layers of a step of one decode in one launch."""
        state, weights, eps = self._state, self._weights, self._arch.rms_eps
        residual = decode_layers(
            work, weights.embedding, *self._made(1), state.decode_lens[:1],
            state.decode_slots[:1], state.tables, self._cos, self._sin, cache.k, cache.v, eps,
        )  # fmt: skip
        return rms_norm(residual, weights.norm, eps)

    def compute_rows(self, cache: KvCache, num_rows: int) -> None:
        """Compute the rows of a step with chunks; keep the hidden rows that are due."""
        state = self._state
        prepare_step(
            state.words, state.row_slots[:num_rows], state.row_tokens[:num_rows],
            state.row_positions[:num_rows], *self._made(num_rows), state.decode_lens,
            cache.block_size,
        )  # fmt: skip
        self._due_hidden.copy_(
            self._body(cache, num_rows, has_chunks=True, due_rows=state.due_rows)
        )

    def draw_due(self, num_due: int, need: Need) -> None:
        """Draw a token for each of `state.due_slots[:num_due]`, after compute_rows."""
        state = self._state
        rows = state.due_rows[:num_due].clamp(min=0).long()
        contexts = state.positions[rows] + 1
        self._tail(self._due_hidden[:num_due], state.due_slots[:num_due], contexts, need)

    def due_logits(self, num_due: int) -> torch.Tensor:  # [num_due, vocab] fp32
        """Return the logits of rows that compute_rows kept; no step does, bench/fp8_error.py."""
        return self._logits_draw.logits(self._due_hidden[:num_due])

    def _made(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = self._state
        return state.tokens[:num_rows], state.positions[:num_rows], state.kv_slots[:num_rows]

    def _body(
        self,
        cache: KvCache,
        num_rows: int,
        *,
        has_chunks: bool,
        due_rows: torch.Tensor | None,  # [num_slots] int32, -1 = none
    ) -> torch.Tensor:  # [num_rows or num_slots, hidden]
        arch, state, weights = self._arch, self._state, self._weights
        self._plan(num_rows, has_chunks=has_chunks)
        normed, residual = embed_rms_norm(
            state.tokens[:num_rows], weights.embedding, weights.layers[0].attention_norm,
            arch.rms_eps,
        )  # fmt: skip
        pending = None
        for i in range(arch.num_layers):

            def attend(qkv: torch.Tensor, i: int = i) -> torch.Tensor:
                return self._attend(cache, i, qkv, has_chunks=has_chunks)

            pending = self._layers.run(i, normed, pending, residual, attend)
            normed = None
        return self._layers.finish(pending, residual, weights.norm, due_rows)

    def _work_of(self, num_rows: int) -> dict[int | None, DecodeWork]:
        return self._decode_work[num_rows > FEW_ROWS]

    def _plan(self, num_rows: int, *, has_chunks: bool) -> None:
        """Lay out the attention of a step, once for all layers."""
        state = self._state
        lens = state.decode_lens[:num_rows]  # of at most num_slots rows
        slots = state.row_slots if has_chunks else state.decode_slots
        for work in self._work_of(num_rows).values():
            plan_decode(work, lens, slots[: len(lens)])
        if has_chunks:
            plan_prefill(
                self._prefill_work, state.chunk_starts, state.chunk_lens, state.chunk_slots
            )

    def _attend(
        self, cache: KvCache, index: int, qkv: torch.Tensor, *, has_chunks: bool
    ) -> torch.Tensor:
        """Rotate, write and attend: [num_rows, qkv width] -> [num_rows, num_q_heads * dim]."""
        arch, state, layer = self._arch, self._state, self._weights.layers[index]
        num_rows = qkv.shape[0]
        k_cache, v_cache = cache.layer(index)
        k_scale, v_scale = cache.scales(index)
        q_norm, k_norm = layer.qk_norm or (None, None)
        _, positions, kv_slots = self._made(num_rows)
        q = qkv_rope_write(
            qkv, self._cos, self._sin, positions, kv_slots, k_cache, v_cache, arch.num_q_heads,
            q_norm, k_norm, arch.rms_eps, bias=layer.qkv_bias, k_scale=k_scale,
            v_scale=v_scale,
        )  # fmt: skip
        out = torch.empty_like(q)
        pages = (k_cache, v_cache, state.tables)
        scale, window = arch.head_dim**-0.5, arch.windows[index]
        paged_decode(
            q, *pages, state.decode_lens[:num_rows], scale, window, out,
            k_scale=k_scale, v_scale=v_scale, work=self._work_of(num_rows)[window],
        )  # fmt: skip
        if has_chunks:
            paged_prefill(
                q, *pages, state.chunk_starts, state.chunk_lens, scale, window, out,
                k_scale=k_scale, v_scale=v_scale, work=self._prefill_work, tiling=self._tiling,
            )  # fmt: skip
        return out.view(num_rows, -1)

    def _tail(
        self,
        hidden: torch.Tensor,  # [num_due, hidden]
        slots: torch.Tensor,  # [num_due] int32, -1 = padding
        contexts: torch.Tensor,  # [num_due] int32, positions computed with this step
        need: Need,
    ) -> None:
        """Draw and commit."""
        state = self._state
        if need is Need.DRAW:
            drawn, _, is_finite = lm_head_draw(
                hidden, self._weights.lm_head, slots, state.float_column(layout.TEMPERATURE),
                state.seeds, state.column(layout.NUM_OUTPUT), self._head_work,
            )  # fmt: skip
        else:
            drawn, is_finite = self._logits_draw.draw(hidden, slots, need)
        commit_step(
            state.words, slots, drawn, is_finite, contexts, state.counts, state.counter, state.ring
        )
