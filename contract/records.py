"""The tables of Postgres, the authority on every job (design invariant 2).

A job's row holds what was asked and how it ended; while it runs, its tokens are in the token log
and only its state is here. Ids are UUIDv7 with a prefix, so `ORDER BY id` is by age. Times are
`timestamptz`, set by the server. Migrations (migrations/versions) make these tables; a test
compares the two.

Called by: ledger.py, migrations/env.py.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    func,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_ROLE = "role in ('viewer', 'operator', 'admin')"
#: A failed job's error as one text, as it is indexed and searched.
ERROR = "((error_code || ' ') || coalesce(error_text, ''))"
_OPEN = "status in ('queued', 'running')"


def _now() -> Column[object]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now())


def _count(name: str, kind: type[Integer] = Integer) -> Column[int]:
    return Column(name, kind, nullable=False, server_default=text("0"))


tenants = Table(
    "tenants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    _now(),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False, unique=True),  # the part that is looked up, not secret
    Column("secret_sha256", LargeBinary, nullable=False),  # of 192 random bits: no salt needed
    _now(),
    Column("revoked_at", DateTime(timezone=True)),
    Column("last_used_at", DateTime(timezone=True)),  # to the minute
    Column("role", Text),  # operators.role: what it may do under /v1/admin; null: nothing
    CheckConstraint(_ROLE, name="role"),
)

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("card", JSONB(), nullable=False),  # wire.ModelCard
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.id"), nullable=False),
    Column("key_id", Text, ForeignKey("api_keys.id"), nullable=False),
    Column("model", Text, nullable=False),
    Column("class", Text, nullable=False, key="job_class"),
    Column("priority", Text, nullable=False),
    Column("input", JSONB(), nullable=False),  # {"prompt" | "prompt_token_ids" | "messages": ...}
    Column("sampling", JSONB(), nullable=False),  # wire.Sampling, seed filled in
    Column("metadata", JSONB(), nullable=False, key="meta"),
    Column("cost_tokens", Integer, nullable=False),  # prompt estimate + max_tokens
    _now(),
    Column("deadline_at", DateTime(timezone=True)),
    Column("status", Text, nullable=False),  # wire.JobStatus: who may change it is said there
    Column("attempt", Integer, nullable=False, server_default=text("0")),  # the fence
    Column("worker", Text),
    Column("started_at", DateTime(timezone=True)),  # of the first attempt
    Column("cancel_requested_at", DateTime(timezone=True)),
    Column("finished_at", DateTime(timezone=True)),
    Column("finish_reason", Text),
    Column("error_code", Text),
    Column("error_text", Text),
    Column("prompt_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("output_text", Text),
    Column("output_token_ids", ARRAY(Integer)),
    Column("output_ends", ARRAY(Integer)),  # length of the text after each token, characters
    Column("output_logprobs", JSONB()),
    Column("output_gen", Integer),  # which log it was (keys.py): resumes are checked against it
    Column("made_from", Text),  # the job that an operator retried or cloned
    Column("traceparent", Text),  # W3C trace context of the request that made it
    # Written by crashes.py alone, which says what they mean.
    _count("num_crashes", SmallInteger),  # deaths of an engine that ran it, for certain of a job
    _count("suspect", SmallInteger),  # 0 | 1 runs among suspects only | 2 runs alone
    _count("num_losses", SmallInteger),  # other deaths in a row in which it gained no token
    Column("lost_at", Integer),  # tokens in its log at the last of those
    CheckConstraint(
        "status in ('queued', 'running', 'succeeded', 'failed', 'canceled', 'expired')",
        name="status",
    ),
    CheckConstraint(f"({_OPEN}) = (finished_at is null)", name="ended"),
    Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
    Index("ix_jobs_open", "id", postgresql_where=text(_OPEN)),
    Index(
        "ix_jobs_deadline",
        "deadline_at",
        postgresql_where=text("status = 'queued' and deadline_at is not null"),
    ),
    Index("ix_jobs_finished_at", "finished_at", postgresql_where=text("finished_at is not null")),
    # The rest is for the operator's search (job_search.py): each begins with what one asks for and
    # ends with the id, by which the answer is sorted.
    Index("ix_jobs_tenant_id_status_id", "tenant_id", "status", "id"),
    Index("ix_jobs_model_status_id", "model", "status", "id"),
    Index("ix_jobs_status_id", "status", "id"),
    Index("ix_jobs_class_id", "job_class", "id"),
    Index("ix_jobs_worker_id", "worker", "id", postgresql_where=text("worker is not null")),
    Index("ix_jobs_failed", "id", postgresql_where=text("error_code is not null")),
    Index(
        "ix_jobs_error",
        literal_column(ERROR, Text).label("error"),
        postgresql_using="gin",
        postgresql_ops={"error": "gin_trgm_ops"},
        postgresql_where=text("error_code is not null"),
    ),
    Index("ix_jobs_made_from", "made_from", postgresql_where=text("made_from is not null")),
)

job_labels = Table(
    "job_labels",
    metadata,
    Column("label", LargeBinary, primary_key=True),  # labels.py: of one entry of the metadata
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Index("ix_job_labels_job_id", "job_id"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("worker", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("ended_at", DateTime(timezone=True)),  # null: running, or replaced by a newer attempt
    # A terminal status, handed_back, or what its engine died of: crashed (certain), lost (not).
    Column("outcome", Text),
    # Where its time went, ms after started_at by the worker's clock; null: it never told.
    Column("admitted_ms", Integer),  # tokenised and given to the engine
    Column("first_token_ms", Integer),  # the prompt is computed
    Column("last_token_ms", Integer),
    Column("resumed_at", Integer),  # tokens it found in the log
    Column("num_tokens", Integer),  # tokens it made itself
    Column("signature", Text),  # of what its engine died of; null: it did not
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.id"), nullable=False),
    Column("model", Text, nullable=False),
    Column("signature", Text, nullable=False),  # equal where the cause is: worker/evidence.py
    Column("detail", Text, nullable=False),
    Column("num_runs", Integer, nullable=False),  # that died with it in hand
    _now(),
    Column("replayed_at", DateTime(timezone=True)),
    Column("replayed_as", Text),  # id of the job that was made of it
    Index("ix_dead_letters_signature_job_id", "signature", "job_id"),
    Index("ix_dead_letters_model_job_id", "model", "job_id"),
    Index("ix_dead_letters_tenant_id_job_id", "tenant_id", "job_id"),
    Index("ix_dead_letters_created_at", "created_at"),
)

replays = Table(
    "replays",
    metadata,
    Column("id", Text, primary_key=True),
    Column("filter", JSONB(), nullable=False),  # which dead letters
    Column("rate_per_min", Integer, nullable=False),
    Column("by", Text, nullable=False),  # who ordered it, as in the audit log
    _now(),
    Column("num_matched", Integer, nullable=False),  # when it was ordered
    _count("num_done"),
    _count("num_refused"),
    # Up to when its rate is spent.
    Column("paced_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("ended_at", DateTime(timezone=True)),
    Column("canceled_by", Text),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, unique=True),
    _now(),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", Text, ForeignKey("tenants.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", LargeBinary, nullable=False),
    # Checked at commit: the key is taken before the job is written, so that a second request waits.
    Column(
        "job_id",
        Text,
        ForeignKey("jobs.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        nullable=False,
    ),
    _now(),
    Index("ix_idempotency_keys_job_id", "job_id"),
)

operators = Table(
    "operators",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("password_hash", Text, nullable=False),  # Argon2id, with its parameters and salt
    Column("role", Text, nullable=False),  # viewer | operator | admin
    _now(),
    Column("disabled_at", DateTime(timezone=True)),
    Column("num_failures", Integer, nullable=False, server_default=text("0")),  # since a login
    Column("locked_until", DateTime(timezone=True)),
    Column("last_login_at", DateTime(timezone=True)),
    CheckConstraint(_ROLE, name="role"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("token_sha256", LargeBinary, primary_key=True),  # of 256 random bits: no salt needed
    Column("operator_id", Text, ForeignKey("operators.id", ondelete="CASCADE"), nullable=False),
    _now(),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("address", Text),
    Index("ix_sessions_operator_id", "operator_id"),
    Index("ix_sessions_expires_at", "expires_at"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    _now(),
    Column("actor", Text, nullable=False),  # an operator's name, a key's id, or what was tried
    Column("actor_kind", Text, nullable=False),  # operator | key | nobody
    Column("role", Text),
    Column("action", Text, nullable=False),  # worker.drain, job.cancel, login, ...
    Column("target", Text, nullable=False, server_default=""),
    Column("outcome", Text, nullable=False),  # begun, then done or the code of the refusal
    Column("details", JSONB(), nullable=False, server_default=text("'{}'::jsonb")),
    Column("address", Text),
    Index("ix_audit_actor_id", "actor", "id"),
    Index("ix_audit_action_id", "action", "id"),
)

worker_orders = Table(
    "worker_orders",
    metadata,
    Column("worker", Text, primary_key=True),
    Column("wanted", Text, nullable=False),  # serving | drained | quarantined
    Column("num_restarts", Integer, nullable=False, server_default=text("0")),  # ordered so far
    Column("ordered_by", Text, nullable=False),
    Column("ordered_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    CheckConstraint("wanted in ('serving', 'drained', 'quarantined')", name="wanted"),
)

queue_pauses = Table(
    "queue_pauses",
    metadata,
    # '*' stands for all of a kind.
    Column("model", Text, primary_key=True),
    Column("class", Text, primary_key=True, key="job_class"),
    Column("tenant_id", Text, primary_key=True),
    Column("paused_by", Text, nullable=False),
    Column("paused_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
