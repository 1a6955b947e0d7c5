"""Count what died with a job in hand, keep what is poison, and the orders to replay it.

The new columns of `jobs` have constant defaults, so Postgres rewrites no row.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_NONE = sa.text("0")


def _created_at() -> sa.Column:
    return sa.Column(
        "created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
    )


def upgrade() -> None:
    for name in ("num_crashes", "suspect", "num_losses"):
        op.add_column(
            "jobs", sa.Column(name, sa.SmallInteger(), nullable=False, server_default=_NONE)
        )
    op.add_column("jobs", sa.Column("lost_at", sa.Integer()))
    op.add_column("attempts", sa.Column("signature", sa.Text()))
    op.create_table(
        "dead_letters",
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("num_runs", sa.Integer(), nullable=False),
        _created_at(),
        sa.Column("replayed_at", sa.DateTime(timezone=True)),
        sa.Column("replayed_as", sa.Text()),
        sa.PrimaryKeyConstraint("job_id", name="pk_dead_letters"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_dead_letters_job_id", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_dead_letters_tenant_id"),
    )
    for column in ("signature", "model", "tenant_id"):
        op.create_index(f"ix_dead_letters_{column}_job_id", "dead_letters", [column, "job_id"])
    op.create_index("ix_dead_letters_created_at", "dead_letters", ["created_at"])
    op.create_table(
        "replays",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("filter", JSONB(), nullable=False),
        sa.Column("rate_per_min", sa.Integer(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        _created_at(),
        sa.Column("num_matched", sa.Integer(), nullable=False),
        sa.Column("num_done", sa.Integer(), nullable=False, server_default=_NONE),
        sa.Column("num_refused", sa.Integer(), nullable=False, server_default=_NONE),
        sa.Column(
            "paced_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("canceled_by", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_replays"),
    )


def downgrade() -> None:
    op.drop_table("replays")
    op.drop_table("dead_letters")
    op.drop_column("attempts", "signature")
    for name in ("lost_at", "num_losses", "suspect", "num_crashes"):
        op.drop_column("jobs", name)
