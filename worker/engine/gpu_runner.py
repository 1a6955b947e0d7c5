"""The engine's runner on one NVIDIA GPU: steps as CUDA graphs, results one or two steps later.

`submit` sends what has changed and replays a graph; `collect` waits for the oldest step's event and
reads its tokens from pinned memory. In a steady batch a step is one replay and one event.

    decodes alone      one graph: rows, layers, lm_head, draw, commit
    with chunks        two: the rows (by token bucket), then the draw (by number of due rows)

Invariants:
 1. Steps run in the order of their submission, each on the state the one before left.
 2. No memory is allocated by a step once its graphs are captured.
 3. A step's results are not overwritten before they are collected: at most `depth` + 1 steps are
    in flight and the ring is longer.

Called by: runner.build_runner; loop.py drives it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from headrace.kernels import step as layout
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.batch import Batch, Chunk
from headrace.worker.engine.gpu_graphs import Graphs, bucket_of, decode_buckets, row_buckets
from headrace.worker.engine.gpu_model import GpuModel, KvCache, Need
from headrace.worker.engine.gpu_state import RING_STEPS, DeviceState
from headrace.worker.engine.last_words import DeviceLost
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.sampling import has_penalties
from headrace.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that was submitted."""

    number: int  # counts steps with due rows, as the device does
    num_due: int
    need: Need
    asked_logprobs: np.ndarray  # [num_due] int, -1 = none
    done: torch.cuda.Event | None


class GpuRunner:
    """One model on one device."""

    def __init__(
        self, arch: Architecture, model: GpuModel, cache: KvCache, state: DeviceState, depth: int
    ) -> None:
        self.dtype_name = str(model.dtype).removeprefix("torch.")
        self.vocab_size = arch.vocab_size
        self.max_positions = arch.max_positions
        self.block_size = cache.block_size
        self.num_blocks = cache.k.shape[1]
        self.depth = depth
        self._model, self._cache, self._state = model, cache, state
        self._graphs = Graphs(state.device)
        self._decode_buckets = decode_buckets(state.num_slots)
        self._row_buckets = row_buckets(state.max_rows)
        self._needs = np.zeros(state.num_slots, np.int8)
        self._num_logprobs = np.full(state.num_slots, -1, np.int32)
        self._num_submitted = 0
        self._in_flight: deque[_InFlight] = deque()

    # -- the Protocol -------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, batch: Batch) -> None:
        """Start a step."""
        with _device_faults():
            self._submit(batch)

    @torch.inference_mode()
    def collect(self) -> Sampled:
        """Wait for the oldest step and return its results."""
        step = self._in_flight.popleft()
        with _device_faults():
            if step.done is not None:
                step.done.synchronize()
        tokens, flags = self._state.ring[step.number % RING_STEPS, :, : step.num_due].numpy().copy()
        has_lived = (flags & layout.LIVED) != 0
        return Sampled(
            tokens=tokens,
            # A row whose sequence had ended says nothing; the loop does not ask it.
            is_finite=(flags & layout.FINITE != 0) | ~has_lived,
            is_stop=flags & layout.STOPPED != 0,
            logprobs=self._logprobs(step),
        )

    def is_ready(self) -> bool:
        """Say whether `collect` would not wait."""
        done = self._in_flight[0].done
        return done is None or done.query()

    @torch.inference_mode()
    def clear(self, blocks: list[int]) -> None:
        """Overwrite blocks whose content is no numbers."""
        self._cache.k[:, blocks] = 0
        self._cache.v[:, blocks] = 0

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the graphs of every step whose rows only draw; others come when first needed.

        The largest first: smaller ones then find their memory in the shared pool.
        """
        for bucket in reversed(self._row_buckets):
            self._graphs.prepare(*self._rows_graph(bucket))
        for bucket in reversed(self._decode_buckets):
            self._graphs.prepare(*self._decode_graph(bucket, Need.DRAW))
            self._graphs.prepare(*self._draw_graph(bucket, Need.DRAW))

    def _decode_graph(self, bucket: int, need: Need) -> tuple[Hashable, Callable[[], None]]:
        return ("decode", bucket, need), partial(self._model.decode, self._cache, bucket, need)

    def _rows_graph(self, bucket: int) -> tuple[Hashable, Callable[[], None]]:
        return ("rows", bucket), partial(self._model.compute_rows, self._cache, bucket)

    def _draw_graph(self, bucket: int, need: Need) -> tuple[Hashable, Callable[[], None]]:
        return ("draw", bucket, need), partial(self._model.draw_due, bucket, need)

    # -- a step -------------------------------------------------------------------------------

    def _submit(self, batch: Batch) -> None:
        for seq in batch.started:
            self._start(seq)
        self._state.set_blocks(batch.new_blocks)
        self._state.begin()
        need = Need(int(self._needs[batch.due_slots].max(initial=0)))
        if batch.chunks:
            self._run_rows(batch, need)
        else:
            self._run_decodes(batch.decode_slots, need)
        self._finish_submit(batch.due_slots, need)

    def _start(self, seq: Sequence) -> None:
        slot, params = seq.slot, seq.asked.params
        has_filters = params.temperature > 0 and (
            params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        )
        needs_logits = has_filters or has_penalties(params) or bool(params.logit_bias)
        need = Need.LOGITS if needs_logits else Need.DRAW
        self._needs[slot] = need if params.logprobs is None else Need.LOGPROBS
        self._num_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._state.start(seq)

    def _run_decodes(self, slots: np.ndarray, need: Need) -> None:
        bucket = bucket_of(self._decode_buckets, len(slots))
        self._state.send_decodes(slots, bucket)
        self._graphs.run(*self._decode_graph(bucket, need))

    def _run_rows(self, batch: Batch, need: Need) -> None:
        num_rows = batch.num_decodes + batch.num_prefill_tokens
        bucket = bucket_of(self._row_buckets, num_rows)
        self._send_rows(batch, bucket)
        self._graphs.run(*self._rows_graph(bucket))
        if num_due := len(batch.due_slots):
            due_bucket = bucket_of(self._decode_buckets, num_due)
            self._graphs.run(*self._draw_graph(due_bucket, need))

    def _send_rows(self, batch: Batch, bucket: int) -> None:
        """Lay out decodes, then chunks, then padding."""
        state, chunks = self._state, batch.chunks
        slots = np.full(bucket, -1, np.int32)
        tokens = np.full(bucket, -1, np.int32)
        positions = np.zeros(bucket, np.int32)
        row = batch.num_decodes
        slots[:row] = batch.decode_slots
        starts, due_rows = [], list(range(row))
        for chunk in chunks:
            end = row + chunk.num_tokens
            span = slice(chunk.start, chunk.start + chunk.num_tokens)
            slots[row:end], tokens[row:end] = chunk.slot, chunk.seq.tokens[span]
            positions[row:end] = np.arange(span.start, span.stop)
            starts.append(row)
            row = end
            if chunk.is_due:
                due_rows.append(end - 1)
        state.send(slots, state.row_slots)
        state.send(tokens, state.row_tokens)
        state.send(positions, state.row_positions)
        self._send_chunks(chunks, starts, row)
        state.send_padded(np.array(due_rows, np.int32), state.due_rows)
        state.send_padded(batch.due_slots, state.due_slots)

    def _send_chunks(self, chunks: list[Chunk], starts: list[int], end: int) -> None:
        """Send where chunks lie; those beyond are empty."""
        state = self._state
        cu_q_lens = np.full(state.num_slots + 1, end, np.int32)
        cu_q_lens[: len(starts)] = starts
        lens, slots = np.zeros((2, state.num_slots), np.int32)
        lens[: len(chunks)] = [chunk.start + chunk.num_tokens for chunk in chunks]
        slots[: len(chunks)] = [chunk.slot for chunk in chunks]
        state.send(cu_q_lens, state.chunk_starts)
        state.send(lens, state.chunk_lens)
        state.send(slots, state.chunk_slots)

    def _finish_submit(self, due_slots: np.ndarray, need: Need) -> None:
        """Note the step, and mark on the stream where its results are there."""
        if need is Need.LOGPROBS and len(due_slots):
            self._model.logprobs.keep(self._num_submitted)
        done = None
        if self._state.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        step = _InFlight(
            self._num_submitted,
            len(due_slots),
            need,
            self._num_logprobs[due_slots],
            done,
        )
        self._in_flight.append(step)
        if len(due_slots):
            self._num_submitted += 1

    def _logprobs(self, step: _InFlight) -> dict[int, tuple[float, np.ndarray, np.ndarray]]:
        if step.need is not Need.LOGPROBS:
            return {}
        chosen, ids, values = self._model.logprobs.of(step.number)
        rows = np.flatnonzero(step.asked_logprobs >= 0).tolist()
        asked = step.asked_logprobs
        return {
            row: (
                float(chosen[row]),
                ids[row, : asked[row]].copy(),
                values[row, : asked[row]].copy(),
            )
            for row in rows
        }


@contextmanager
def _device_faults() -> Iterator[None]:
    """Raise what the device or its libraries fail with as DeviceLost; all else as it is."""
    try:
        yield
    except RuntimeError as error:
        # torch has a class of its own for faults of the runtime; cuBLAS's and Triton's are told
        # apart by their texts alone.
        is_fault = isinstance(error, torch.AcceleratorError) or any(
            mark in str(error) for mark in ("CUDA error", "CUBLAS_STATUS", "Triton Error [CUDA]")
        )
        if not is_fault or isinstance(error, torch.OutOfMemoryError):
            raise
        raise DeviceLost(
            f"the GPU failed in mid-run: {error}; the engine ends and its work is handed back: see "
            "nvidia-smi and the kernel's log for the cause (Xid), then restart the worker"
        ) from error
