"""Labels: a job's metadata as rows in order, so that a search by it is an index scan, newest first.

An inverted index knows which jobs have a value, but not in which order: it gathers all of them to
show 50. A label is a short digest of one name and its value, and `job_labels` is indexed by (label,
job): the jobs of a value lie side by side by age, as those of a tenant or a status do.

Invariants:
1. Every job has a label for each entry of its metadata, written in the transaction that makes the
   job; metadata never changes afterwards, and labels go with their job.
2. A label may stand for two values (it is 8 bytes): who searches by it looks at the row as well.

Called by: accepting, job_edits, job_search, bench/job_search.
"""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import ColumnElement, LargeBinary, func, literal_column, select, true
from sqlalchemy.dialects.postgresql import Insert, insert

from headrace.contract.records import job_labels

#: Bytes of a label. Four billion values share one by chance, and then a search skips a row.
NUM_BYTES = 8
#: The label of `entry`, a row of jsonb_each_text. No text in Postgres holds the byte in between.
LABEL = (
    "substr(sha256(convert_to(entry.key, 'UTF8') || '\\x00'::bytea"
    f" || convert_to(entry.value, 'UTF8')), 1, {NUM_BYTES})"
)


def label_of(name: str, value: str) -> bytes:
    """Return what LABEL is in SQL."""
    return hashlib.sha256(f"{name}\0{value}".encode()).digest()[:NUM_BYTES]


def labeling(source: Any, *conditions: ColumnElement[bool]) -> Insert:
    """Return the statement that writes the labels of the jobs in `source`."""
    entry = func.jsonb_each_text(source.c.meta).table_valued("key", "value", name="entry")
    rows = (
        select(literal_column(LABEL, LargeBinary), source.c.id)
        .select_from(source.join(entry, true()))
        .where(*conditions)
    )
    written = insert(job_labels).from_select(["label", "job_id"], rows)
    return written.on_conflict_do_nothing()  # two entries of one job may share a label
