"""Job search over many rows: fill a database of its own once, then time each kind of search.

    nice -n 10 python -m bench.job_search --folder DIR [--rows 10000000] [--rounds 40]

DIR keeps an embedded Postgres (10 million rows: about 20 GB; delete it afterwards); a second run
with the same DIR and number of rows only measures. The rows look like a fleet's: 200 tenants of
very different sizes, four models of which one is rare, 3 % failed, 1 % expired, metadata of common
and rare values, ids spread over 90 days. Each kind of search is asked `rounds` times with varied
values, at the default page of 50; the time is that of JobSearch.page, from Python.

Prints one JSON line a kind on standard output and a table on standard error. Exit status 1 when a
kind's p95 is over the target.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg

from headrace.contract.database import connect
from headrace.contract.job_search import JobFilter, JobSearch
from headrace.contract.labels import LABEL
from headrace.fleet.migrate import migrate
from headrace.fleet.postgres import start_postgres

#: Milliseconds that 95 of 100 searches of each kind must stay under.
TARGET_MS = 150.0
#: Rows of one statement: its memory and the time to the next line of progress.
CHUNK = 500_000
#: The days over which the ids are spread, and the time of the first.
DAYS = 90
BEGIN = datetime(2026, 6, 1, tzinfo=UTC)

_SETTINGS = (
    "max_wal_size = '16GB'",
    "checkpoint_timeout = '30min'",
    "full_page_writes = off",
    "synchronous_commit = off",
    "autovacuum = off",
)

_FILL = """
INSERT INTO jobs (id, tenant_id, key_id, model, class, priority, input, sampling, metadata,
  cost_tokens, created_at, status, attempt, worker, started_at, finished_at, finish_reason,
  error_code, error_text, prompt_tokens, cached_tokens, output_text, output_token_ids, output_ends,
  output_gen)
SELECT 'job_' || lpad(to_hex(ms), 12, '0') || '7' || lpad(to_hex(i %% 4096), 3, '0') || '8'
         || substr(md5(i::text), 1, 15),
  'tenant_' || lpad(tenant::text, 3, '0'), 'key_bench',
  CASE WHEN m < 10 THEN 'model-rare' WHEN m < 10000 THEN 'model-c' WHEN m < 100000 THEN 'model-b'
       ELSE 'model-a' END,
  CASE WHEN r %% 10 < 3 THEN 'batch' ELSE 'interactive' END,
  'normal',
  jsonb_build_object('prompt', repeat('The quick brown fox jumps over ', 8) || i),
  '{"max_tokens": 64, "temperature": 0.7, "top_p": 0.95, "seed": 7, "stop": []}',
  CASE WHEN r %% 5 = 0 THEN '{}'::jsonb ELSE jsonb_build_object(
    'user', 'u' || r %% 100000,
    'env', CASE WHEN m < 1000 THEN 'canary' WHEN m < 100000 THEN 'staging' ELSE 'prod' END,
    'run', 'r' || i / 1000,
    'season', CASE WHEN i < 200000 THEN 'first' ELSE 'later' END) END,
  300, at, status, 1,
  CASE WHEN status <> 'queued' THEN 'host-' || lpad((r %% 64)::text, 2, '0') END,
  CASE WHEN status <> 'queued' THEN at END,
  CASE WHEN status NOT IN ('queued', 'running') THEN at + interval '3 seconds' END,
  CASE status WHEN 'succeeded' THEN 'stop' WHEN 'failed' THEN 'error' WHEN 'queued' THEN NULL
              WHEN 'running' THEN NULL ELSE status END,
  CASE WHEN status = 'expired' THEN 'deadline_exceeded' WHEN status <> 'failed' THEN NULL
       WHEN e < 30 THEN 'prompt_too_long' ELSE 'engine_refused' END,
  CASE WHEN status = 'expired' THEN 'the job''s deadline passed before a worker could start it'
       WHEN status <> 'failed' THEN NULL
       WHEN e < 30 THEN 'prompt has ' || 9000 + r %% 5000 || ' tokens; this worker holds 8192'
       WHEN e < 90 THEN 'CUDA out of memory: tried to get ' || r %% 900 || ' MiB for step ' || i
       WHEN e < 99 THEN 'the engine ended with signal ' || r %% 31 || ' at step ' || i
       ELSE 'NCCL watchdog: rank ' || r %% 8 || ' gave up after ' || r %% 600000 || ' ms' END,
  120, 0, CASE WHEN status = 'succeeded' THEN repeat('and runs into the wide green field ', 5) END,
  CASE WHEN status = 'succeeded' THEN array_fill(r %% 49152, ARRAY[40])::int[] END,
  CASE WHEN status = 'succeeded' THEN array_fill(r %% 180, ARRAY[40])::int[] END, 0
FROM (
  SELECT i, ms, to_timestamp(ms / 1000.0) AS at, r, m, e,
    floor(200 * power(t / 1e6, 3))::int AS tenant,
    CASE WHEN i >= %(rows)s - 200 THEN 'running' WHEN i >= %(rows)s - 2000 THEN 'queued'
         WHEN s < 30 THEN 'failed' WHEN s < 40 THEN 'expired' WHEN s < 55 THEN 'canceled'
         ELSE 'succeeded' END AS status
  FROM (
    SELECT i, %(begin_ms)s + (i * %(span_ms)s::numeric / %(rows)s)::bigint AS ms,
      (hashint8extended(i, 1) & 1073741823)::int AS r,
      (hashint8extended(i, 2) & 1073741823) %% 1000000 AS m,
      (hashint8extended(i, 3) & 1073741823) %% 1000000 AS t,
      (hashint8extended(i, 4) & 1073741823) %% 1000 AS s,
      (hashint8extended(i, 5) & 1073741823) %% 100 AS e
    FROM generate_series(%(first)s::bigint, %(last)s::bigint - 1) AS i
  ) AS drawn
) AS shaped
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fill(url: str, rows: int) -> None:
    """Write the rows without indexes but the primary key's and without checking keys, then index.

    A database that holds this number of rows already is left as it is.
    """
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as db:
        known = db.execute("SELECT reltuples FROM pg_class WHERE relname = 'jobs'").fetchone()
        if known is not None and abs(known[0] - rows) < rows * 0.05:
            return
        for setting in _SETTINGS:
            db.execute(f"ALTER SYSTEM SET {setting}".encode())
        db.execute("SELECT pg_reload_conf()")
        found = db.execute(
            "SELECT indexname, indexdef FROM pg_indexes"
            " WHERE tablename = 'jobs' AND indexname <> 'pk_jobs'"
        ).fetchall()
        for name, _ in found:
            db.execute(f"DROP INDEX {name}".encode())
        db.execute("TRUNCATE tenants CASCADE")
        db.execute("SET session_replication_role = replica")  # no lookup of keys a row
        db.execute(
            "INSERT INTO tenants (id, name) SELECT 'tenant_' || lpad(i::text, 3, '0'),"
            " 'customer ' || i FROM generate_series(0, 200) AS i"  # the last has no jobs
        )
        db.execute(
            "INSERT INTO api_keys (id, tenant_id, name, prefix, secret_sha256)"
            " VALUES ('key_bench', 'tenant_000', 'bench', 'bench', '')"
        )
        begun = time.monotonic()
        for first in range(0, rows, CHUNK):
            values = {"first": first, "last": min(rows, first + CHUNK), "rows": rows}
            values |= {"begin_ms": _ms(BEGIN), "span_ms": DAYS * 86_400_000}
            db.execute(_FILL, values)
            say(f"{values['last']:,} rows after {time.monotonic() - begun:.0f} s")
        db.execute("SET maintenance_work_mem = '1GB'")
        _label(db)
        say(f"labels after {time.monotonic() - begun:.0f} s")
        for name, definition in found:
            db.execute(definition.encode())
            say(f"{name} after {time.monotonic() - begun:.0f} s")
        db.execute("VACUUM ANALYZE jobs, job_labels")
        db.execute("ALTER SYSTEM RESET max_wal_size")  # 16 GB of it would press rows out of memory
        db.execute("SELECT pg_reload_conf()")
        db.execute("CHECKPOINT")
        say(f"analysed after {time.monotonic() - begun:.0f} s")


def _label(db: psycopg.Connection) -> None:
    """Write the labels of all jobs as accepting does, then index them."""
    db.execute("ALTER TABLE job_labels DROP CONSTRAINT pk_job_labels")
    db.execute("DROP INDEX ix_job_labels_job_id")
    db.execute(
        f"INSERT INTO job_labels (label, job_id) SELECT {LABEL}, jobs.id"
        " FROM jobs, jsonb_each_text(jobs.metadata) AS entry".encode()
    )
    db.execute("ALTER TABLE job_labels ADD CONSTRAINT pk_job_labels PRIMARY KEY (label, job_id)")
    db.execute("CREATE INDEX ix_job_labels_job_id ON job_labels (job_id)")


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _within(draw: random.Random, wanted: JobFilter, days: float = 1.0) -> JobFilter:
    """Return the filter for a range of so many days, which is drawn."""
    begin = BEGIN + timedelta(days=draw.uniform(0, DAYS - days))
    return replace(wanted, created_after=begin, created_before=begin + timedelta(days=days))


def kinds(rows: int) -> dict[str, Callable[[random.Random], JobFilter]]:
    """Return the searches by name; each draws its values."""
    tenant = lambda draw: f"tenant_{draw.randrange(200):03d}"  # noqa: E731
    status = lambda draw: (draw.choice(["failed", "canceled", "expired", "succeeded"]),)  # noqa: E731
    model = lambda draw: draw.choice(["model-a", "model-b", "model-c", "model-rare"])  # noqa: E731
    common = lambda draw: draw.choice(["out of memory", "engine", "Deadline", "tokens"])  # noqa: E731
    f = JobFilter
    return {
        "everything": lambda d: f(),
        "tenant": lambda d: f(tenant=tenant(d)),
        "tenant by name": lambda d: f(tenant=f"customer {d.randrange(200)}"),
        "tenant without jobs": lambda d: f(tenant="customer 200"),
        "status": lambda d: f(statuses=status(d)),
        "status, few": lambda d: f(statuses=(d.choice(["queued", "running"]),)),
        "model": lambda d: f(model=model(d)),
        "model, none": lambda d: f(model="model-none"),
        "class": lambda d: f(job_class=d.choice(["batch", "interactive"])),
        "worker": lambda d: f(worker=f"host-{d.randrange(64):02d}"),
        "worker, none": lambda d: f(worker="host-99"),
        "time": lambda d: _within(d, f()),
        "time, none": lambda d: f(created_before=BEGIN - timedelta(days=1)),
        "error, common": lambda d: f(error=common(d)),
        "error, rare": lambda d: f(error=f"gave up after {d.randrange(600_000)} ms"),
        "error, one in a hundred": lambda d: f(error="nccl WATCHDOG"),
        "error, one": lambda d: f(error=f"MiB for step {d.randrange(rows)}"),
        "error, none": lambda d: f(error="no such thing"),
        "meta, common": lambda d: f(meta=("env", "prod")),
        "meta, 1 in 1,000": lambda d: f(meta=("env", "canary")),
        "meta, 1 in 100,000": lambda d: f(meta=("user", f"u{d.randrange(100_000)}")),
        "meta, one stretch": lambda d: f(meta=("run", f"r{d.randrange(rows // 1000)}")),
        "meta, old only": lambda d: f(meta=("season", "first")),
        "meta, none": lambda d: f(meta=("env", "nowhere")),
        "status+tenant": lambda d: f(statuses=status(d), tenant=tenant(d)),
        "status+tenant, few": lambda d: f(statuses=("queued",), tenant=tenant(d)),
        "status+model": lambda d: f(statuses=status(d), model=model(d)),
        "status+time": lambda d: _within(d, f(statuses=status(d))),
        "error+time": lambda d: _within(d, f(error=common(d))),
        "error, rare+time": lambda d: _within(d, f(error="nccl watchdog"), 30),
        "error, none+time": lambda d: _within(d, f(error="no such thing"), 30),
        "meta+time": lambda d: _within(d, f(meta=("env", "prod"))),
        "meta, 1 in 1,000+time": lambda d: _within(d, f(meta=("env", "canary"))),
        "meta, rare+time": lambda d: _within(d, f(meta=("user", f"u{d.randrange(100_000)}")), 30),
        "tenant+error": lambda d: f(tenant=tenant(d), error=common(d)),
        "tenant+model": lambda d: f(tenant=tenant(d), model=model(d)),
        "tenant+meta": lambda d: f(tenant=tenant(d), meta=("env", "staging")),
        "worker+status": lambda d: f(worker=f"host-{d.randrange(64):02d}", statuses=status(d)),
    }


def measure(search: JobSearch, rows: int, rounds: int) -> bool:
    """Time every kind; False when one is over the target."""
    say(f"{'search':26} {'p50':>8} {'p95':>8} {'max':>8}  rows found")
    is_good = True
    for name, make in kinds(rows).items():
        draw, took_ms, num_found = random.Random(name), [], 0
        for _ in range(rounds):
            wanted = make(draw)
            begun = time.perf_counter()
            num_found += len(search.page(wanted, limit=50).rows)
            took_ms.append((time.perf_counter() - begun) * 1000)
        took_ms.sort()
        p50, p95, most = took_ms[rounds // 2], took_ms[int(rounds * 0.95)], took_ms[-1]
        is_good &= p95 <= TARGET_MS
        line = {"search": name, "p50_ms": p50, "p95_ms": p95, "max_ms": most, "rounds": rounds}
        print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}))
        say(f"{name:26} {p50:8.1f} {p95:8.1f} {most:8.1f}  {num_found / rounds:.1f}")
    return is_good


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    with start_postgres(options.folder, durable=False) as postgres:
        migrate(postgres.url)
        fill(postgres.url, options.rows)
        engine = connect(postgres.url, pool_size=1)
        is_good = measure(JobSearch(engine), options.rows, options.rounds)
        engine.dispose()
    say(f"{options.rows:,} rows, load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
