"""Add the indexes of the operator's job search, the labels, and the extension for parts of texts.

pg_trgm is a trusted extension of Postgres' own distribution: the database's owner may create it.
On a large table this takes minutes and blocks writes to `jobs` meanwhile. A gateway of an older
version that still runs afterwards writes no labels: its jobs are not found by their metadata.

Revision: 0003, after 0002.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

#: The labels of the jobs that are there already, as contract/labels.py makes them.
_LABELS = """
INSERT INTO job_labels (label, job_id)
SELECT DISTINCT substr(sha256(convert_to(entry.key, 'UTF8') || '\\x00'::bytea
                              || convert_to(entry.value, 'UTF8')), 1, 8), jobs.id
FROM jobs, jsonb_each_text(jobs.metadata) AS entry
"""


def upgrade() -> None:
    op.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
    for name, columns in (
        ("ix_jobs_tenant_id_status_id", ["tenant_id", "status", "id"]),
        ("ix_jobs_model_status_id", ["model", "status", "id"]),
        ("ix_jobs_status_id", ["status", "id"]),
        ("ix_jobs_class_id", ["class", "id"]),
    ):
        op.create_index(name, "jobs", columns)
    for name, columns, where in (
        ("ix_jobs_worker_id", ["worker", "id"], "worker is not null"),
        ("ix_jobs_failed", ["id"], "error_code is not null"),
        ("ix_jobs_made_from", ["made_from"], "made_from is not null"),
    ):
        op.create_index(name, "jobs", columns, postgresql_where=sa.text(where))
    op.create_index(
        "ix_jobs_error",
        "jobs",
        [sa.literal_column("((error_code || ' ') || coalesce(error_text, ''))").label("error")],
        postgresql_using="gin",
        postgresql_ops={"error": "gin_trgm_ops"},
        postgresql_where=sa.text("error_code is not null"),
    )
    op.create_table(
        "job_labels",
        sa.Column("label", sa.LargeBinary(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
    )
    op.execute(_LABELS)
    op.create_primary_key("pk_job_labels", "job_labels", ["label", "job_id"])
    op.create_index("ix_job_labels_job_id", "job_labels", ["job_id"])
    op.create_foreign_key(
        "fk_job_labels_job_id", "job_labels", "jobs", ["job_id"], ["id"], ondelete="CASCADE"
    )


def downgrade() -> None:
    """Drop the labels and indexes; the extension stays, others may use it."""
    op.drop_table("job_labels")
    for name in (
        "ix_jobs_error",
        "ix_jobs_made_from",
        "ix_jobs_failed",
        "ix_jobs_worker_id",
        "ix_jobs_class_id",
        "ix_jobs_status_id",
        "ix_jobs_model_status_id",
        "ix_jobs_tenant_id_status_id",
    ):
        op.drop_index(name, table_name="jobs")
