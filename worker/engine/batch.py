"""The numbers of one step, laid out flat: what a plan is to the model.

Rows are the planned tokens of all sequences one after another, decodes first. Row r of sequence s
is at position num_computed(s) + its offset in the chunk, and its keys and values go to slot =
table[position // block_size] * block_size + position % block_size.

Invariants:
 1. Slots of a batch are all different: no two rows write the same place.
 2. The last row of a chunk is at position context_len - 1.
 3. `due` are the sequences whose last known token is in this batch, `due_rows` its rows.

Called by: loop.py (build), runner.py (readers).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.worker.engine.scheduler import Plan
from headrace.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays of one step; int32, -1 = unused table entry."""

    num_decodes: int  # leading sequences with one row each
    tokens: np.ndarray  # [num_tokens]
    positions: np.ndarray  # [num_tokens]
    slots: np.ndarray  # [num_tokens]
    cu_q_lens: np.ndarray  # [num_seqs + 1] running sum of rows a sequence, from 0
    context_lens: np.ndarray  # [num_seqs] tokens in the pool once this step is computed
    block_tables: np.ndarray  # [num_seqs, max_blocks]
    due: list[Sequence]  # get their next token from this step
    due_rows: np.ndarray  # [num_due] row of each one's last token


def build_batch(plan: Plan, block_size: int) -> Batch:
    """Lay a plan out flat."""
    planned = list(plan)
    q_lens = np.array([num_tokens for _, num_tokens in planned], np.int32)
    starts = np.array([seq.num_computed for seq, _ in planned], np.int32)
    cu_q_lens = np.concatenate(([0], np.cumsum(q_lens))).astype(np.int32)
    max_blocks = max(len(seq.table) for seq, _ in planned)
    block_tables = np.full((len(planned), max_blocks), -1, np.int32)
    for row, (seq, _) in enumerate(planned):
        block_tables[row, : len(seq.table)] = seq.table
    seq_of_row = np.repeat(np.arange(len(planned)), q_lens)
    offsets = np.arange(cu_q_lens[-1], dtype=np.int32) - cu_q_lens[seq_of_row]
    positions = starts[seq_of_row] + offsets
    blocks = block_tables[seq_of_row, positions // block_size]
    chunks = [seq.tokens[seq.num_computed : seq.num_computed + n] for seq, n in planned]
    is_due = [seq.num_pending == num_tokens for seq, num_tokens in planned]
    return Batch(
        num_decodes=len(plan.decodes),
        tokens=np.concatenate(chunks),
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        cu_q_lens=cu_q_lens,
        context_lens=starts + q_lens,
        block_tables=block_tables,
        due=[seq for (seq, _), due in zip(planned, is_due, strict=True) if due],
        due_rows=cu_q_lens[1:][np.array(is_due)] - 1,
    )
