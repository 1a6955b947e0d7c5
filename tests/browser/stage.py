"""A whole fleet with operators, for Chromium: the real small model, and two stub workers.

The stub's tokens come at a steady pace, so a test may count on a job that is still running. Its
model is called STUB. Jobs that must look as they seldom do (a failed one with a given text) are
written into Postgres as a worker would have.
"""

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from headrace.contract import database
from headrace.contract.crashes import POISON_TEXT
from headrace.contract.errors import Poison
from headrace.contract.operators import Operators
from headrace.contract.passwords import Passwords
from headrace.contract.roles import Role
from headrace.tests.fleet.fleet_parts import Fleet

STUB = "stub"
STUB_WORKERS = ("stub-a", "stub-b")
REAL_WORKER = "real"
PASSWORD = "correct horse battery staple"
#: ms a step of the stub takes: slow enough to be seen, fast enough to end.
STEP_MS = 40


@dataclass
class Stage:
    """A running fleet and those who may look at it."""

    folder: Path
    model: Path
    names: dict[Role, str] = field(default_factory=lambda: {role: f"the-{role}" for role in Role})

    def start(self) -> None:
        self.fleet = Fleet(self.folder, self.model, {"HEADRACE_DRAIN_S": "1"})
        self.fleet.start_servers()
        engine = database.connect(self.fleet.postgres.url)
        operators = Operators(engine, Passwords())
        for role, name in self.names.items():
            operators.create(name=name, password=PASSWORD, role=role)
        engine.dispose()
        self.fleet.start("tasks", "tasks")
        self.fleet.start_gateway()
        for name in STUB_WORKERS:
            self.start_stub(name)
        self.fleet.start_worker(REAL_WORKER)

    def start_stub(self, name: str) -> None:
        self.fleet.start_worker(
            name,
            HEADRACE_RUNNER="stub",
            HEADRACE_STUB_STEP_MS=str(STEP_MS),
            HEADRACE_MODEL_NAME=STUB,
        )

    def stop(self) -> None:
        self.fleet.stop()

    def submit(self, num_tokens: int, **more: object) -> str:
        """Submit a job to the stub and return its id."""
        sampling = {"max_tokens": num_tokens}
        return self.fleet.submit(model=STUB, prompt="p", sampling=sampling, **more)["id"]

    def fail(self, text: str, **more: object) -> str:
        """Make a job that waits for ever end as failed with this text; return its id."""
        job = self.submit(1, **more)
        self.fleet.wait_status(job, "succeeded")
        self.sql(
            "update jobs set status = 'failed', error_code = 'engine_refused', error_text = %s,"
            " finish_reason = null where id = %s", text, job,
        )  # fmt: skip
        return job

    def bury(self, signature: str, detail: str = "a trace", **more: object) -> str:
        """Make a job that has a dead letter, as contract/crashes would; return its id."""
        job = self.fail(POISON_TEXT, **more)
        self.sql("update jobs set error_code = %s where id = %s", Poison.code, job)
        self.sql(
            "insert into dead_letters (job_id, tenant_id, model, signature, detail, num_runs)"
            " select id, tenant_id, model, %s, %s, 3 from jobs where id = %s",
            signature, detail, job,
        )  # fmt: skip
        return job

    def made_of(self, job: str) -> list[str]:
        """Return the jobs that were made from it."""
        url = self.fleet.postgres.url.replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            query = "select id from jobs where made_from = %s"
            return [row[0] for row in connection.execute(query, (job,)).fetchall()]

    def row(self, job: str) -> dict[str, Any]:
        """Return the job's row with its tenant's name."""
        url = self.fleet.postgres.url.replace("+psycopg", "")
        query = (
            "select jobs.*, tenants.name as tenant from jobs"
            " join tenants on tenants.id = tenant_id where jobs.id = %s"
        )
        with psycopg.connect(url, row_factory=dict_row) as connection:
            row = connection.execute(query, (job,)).fetchone()
        assert row is not None, job
        return row

    def sql(self, statement: str, *values: object) -> None:
        url = self.fleet.postgres.url.replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement, values)


def unique(word: str) -> str:
    """Return a word that no other job has."""
    return f"{word}-{uuid.uuid4().hex[:10]}"
