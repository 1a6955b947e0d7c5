"""Add operators, sessions, audit, orders to workers and queues, and where attempts spend time.

Revision: 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("actor_kind", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), server_default="", nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column(
            "details",
            postgresql.JSONB(astext_type=sa.Text()),
            server_default=sa.text("'{}'::jsonb"),
            nullable=False,
        ),
        sa.Column("address", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_action_id", "audit", ["action", "id"], unique=False)
    op.create_index("ix_audit_actor_id", "audit", ["actor", "id"], unique=False)
    op.create_table(
        "operators",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column("disabled_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("num_failures", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("locked_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_login_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "role in ('viewer', 'operator', 'admin')", name=op.f("ck_operators_role")
        ),
        sa.PrimaryKeyConstraint("id", name="pk_operators"),
        sa.UniqueConstraint("name", name="uq_operators_name"),
    )
    op.create_table(
        "queue_pauses",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("class", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("paused_by", sa.Text(), nullable=False),
        sa.Column(
            "paused_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("model", "class", "tenant_id", name="pk_queue_pauses"),
    )
    op.create_table(
        "worker_orders",
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("wanted", sa.Text(), nullable=False),
        sa.Column("num_restarts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("ordered_by", sa.Text(), nullable=False),
        sa.Column(
            "ordered_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.CheckConstraint(
            "wanted in ('serving', 'drained', 'quarantined')", name=op.f("ck_worker_orders_wanted")
        ),
        sa.PrimaryKeyConstraint("worker", name="pk_worker_orders"),
    )
    op.create_table(
        "sessions",
        sa.Column("token_sha256", sa.LargeBinary(), nullable=False),
        sa.Column("operator_id", sa.Text(), nullable=False),
        sa.Column(
            "created_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("now()"),
            nullable=False,
        ),
        sa.Column(
            "seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False
        ),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("address", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["operator_id"], ["operators.id"], name="fk_sessions_operator_id", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("token_sha256", name="pk_sessions"),
    )
    op.create_index("ix_sessions_expires_at", "sessions", ["expires_at"], unique=False)
    op.create_index("ix_sessions_operator_id", "sessions", ["operator_id"], unique=False)
    op.add_column("api_keys", sa.Column("role", sa.Text(), nullable=True))
    op.create_check_constraint("role", "api_keys", "role in ('viewer', 'operator', 'admin')")
    op.add_column("attempts", sa.Column("admitted_ms", sa.Integer(), nullable=True))
    op.add_column("attempts", sa.Column("first_token_ms", sa.Integer(), nullable=True))
    op.add_column("attempts", sa.Column("last_token_ms", sa.Integer(), nullable=True))
    op.add_column("attempts", sa.Column("resumed_at", sa.Integer(), nullable=True))
    op.add_column("attempts", sa.Column("num_tokens", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("made_from", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("traceparent", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "traceparent")
    op.drop_column("jobs", "made_from")
    op.drop_column("attempts", "num_tokens")
    op.drop_column("attempts", "resumed_at")
    op.drop_column("attempts", "last_token_ms")
    op.drop_column("attempts", "first_token_ms")
    op.drop_column("attempts", "admitted_ms")
    op.drop_constraint("role", "api_keys", type_="check")
    op.drop_column("api_keys", "role")
    op.drop_index("ix_sessions_operator_id", table_name="sessions")
    op.drop_index("ix_sessions_expires_at", table_name="sessions")
    op.drop_table("sessions")
    op.drop_table("worker_orders")
    op.drop_table("queue_pauses")
    op.drop_table("operators")
    op.drop_index("ix_audit_actor_id", table_name="audit")
    op.drop_index("ix_audit_action_id", table_name="audit")
    op.drop_table("audit")
