"""The numbers of one step, laid out flat: what a batch is to a runner that keeps nothing by slot.

Rows are the tokens of all sequences one after another, decodes first. The row at position p of a
sequence puts its keys and values into place table[p // block_size] * block_size + p % block_size.

Invariants:
 1. Places of a step are all different: no two rows write the same one.
 2. The last row of a chunk is at position context_len - 1.
 3. `due` are the sequences of the batch's due slots, `due_rows` the rows of their last tokens.

Called by: cpu_runner.py; read by cpu_ops.py and model.py. All token values must have come
to the host, so it is of use only without steps in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.worker.engine.batch import Batch
from headrace.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Arrays of one step; int32, -1 = unused table entry."""

    tokens: np.ndarray  # [num_tokens]
    positions: np.ndarray  # [num_tokens]
    slots: np.ndarray  # [num_tokens] places in the cache, as the kernels call them
    cu_q_lens: np.ndarray  # [num_seqs + 1] running sum of rows a sequence, from 0
    context_lens: np.ndarray  # [num_seqs] tokens in the pool once this step is computed
    block_tables: np.ndarray  # [num_seqs, max_blocks]
    due: list[Sequence]  # get their next token from this step
    due_rows: np.ndarray  # [num_due] row of each one's last token


def flatten(batch: Batch) -> FlatBatch:
    """Lay a batch out flat."""
    table, chunks, num_decodes = batch.table, batch.chunks, batch.num_decodes
    owners = np.array([*batch.decode_slots.tolist(), *(chunk.slot for chunk in chunks)])
    q_lens = np.array([1] * num_decodes + [chunk.num_tokens for chunk in chunks], np.int32)
    starts = np.array([*batch.decode_positions.tolist(), *(c.start for c in chunks)], np.int32)
    cu_q_lens = np.concatenate(([0], np.cumsum(q_lens))).astype(np.int32)
    seq_of_row = np.repeat(np.arange(len(owners)), q_lens)
    offsets = np.arange(cu_q_lens[-1], dtype=np.int32) - cu_q_lens[seq_of_row]
    positions = starts[seq_of_row] + offsets
    block_tables = table.tables[owners, : table.num_blocks[owners].max()]
    blocks = block_tables[seq_of_row, positions // table.block_size]
    is_due = np.array([True] * num_decodes + [chunk.is_due for chunk in chunks])
    return FlatBatch(
        tokens=table.tokens[owners[seq_of_row], positions],
        positions=positions,
        slots=blocks * table.block_size + positions % table.block_size,
        cu_q_lens=cu_q_lens,
        context_lens=starts + q_lens,
        block_tables=block_tables,
        due=[table.sequence(slot) for slot in batch.due_slots.tolist()],
        due_rows=cu_q_lens[1:][is_due] - 1,
    )
