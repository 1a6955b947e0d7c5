"""Fixtures of the courier's tests: real stores, a tokenizer of bytes, and the parts of a worker."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Engine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace.contract import database, redis_client, wire
from headrace.contract.accounts import Accounts
from headrace.contract.crashes import Crashes
from headrace.contract.ids import new_id
from headrace.contract.ledger import Ledger
from headrace.contract.prompts import Prompts
from headrace.contract.specs import spec_of
from headrace.contract.streams import JobStreams
from headrace.contract.tokens import TokenLog
from headrace.contract.tracing import Traces
from headrace.worker.endings import Endings
from headrace.worker.held import Held
from headrace.worker.intake import Intake
from headrace.worker.latencies import Latencies
from headrace.worker.metrics import Metrics
from headrace.worker.room import Room
from headrace.worker.running import RunningJob
from headrace.worker.spans import JobSpans
from headrace.worker.suspicion import Suspicion

MODEL = "bytes"
END = 256  # the model's end token


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    """A model folder with a byte-level tokenizer and a chat template that refuses a `system`."""
    folder: Path = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    config = {"eos_token": "<end>", "chat_template": template}
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(config))
    return Prompts.load(folder)


@dataclass
class Bench:
    """One worker's parts but its engine and its loop: `delivered` is what the loop would get."""

    engine: Engine
    client: Any
    prompts: Prompts
    name: str = "w1"
    delivered: list[RunningJob] = field(default_factory=list)
    traces: Traces | None = None

    def __post_init__(self) -> None:
        self.ledger, self.streams = Ledger(self.engine), JobStreams(self.client)
        self.tokens, self.held, self.metrics = TokenLog(self.client), Held(), Metrics()
        self.latencies = Latencies()
        self.room = Room()
        self.room.opened(10_000, 100, max_num_seqs=8)
        self.key = Accounts(self.engine).create_key(tenant="t", name="n")
        self.suspicion = Suspicion(
            model=MODEL,
            worker=self.name,
            crashes=Crashes(self.engine),
            ledger=self.ledger,
            streams=self.streams,
            metrics=self.metrics,
        )
        self.intake = Intake(
            model=MODEL,
            worker=self.name,
            lease_ms=60_000,
            streams=self.streams,
            tokens=self.tokens,
            ledger=self.ledger,
            prompts=self.prompts,
            held=self.held,
            room=self.room,
            suspicion=self.suspicion,
            metrics=self.metrics,
            deliver=self.delivered.append,
        )
        self.endings = Endings(
            model=MODEL,
            worker=self.name,
            ledger=self.ledger,
            tokens=self.tokens,
            streams=self.streams,
            held=self.held,
            metrics=self.metrics,
            latencies=self.latencies,
            spans=JobSpans(self.traces, MODEL, self.name),
        )

    def accept(self, *, given: dict[str, Any] | None = None, **sampling: Any) -> str:
        """Accept and enqueue a job as the gateway does."""
        job_id = new_id("job")
        params = wire.Sampling(**{"max_tokens": 10, **sampling})
        row = {
            "id": job_id,
            "tenant_id": self.key.tenant_id,
            "key_id": self.key.id,
            "model": MODEL,
            "job_class": "interactive",
            "priority": "normal",
            "input": given or {"prompt": "abc"},
            "sampling": msgspec.to_builtins(params, str_keys=True),
            "meta": {},
            "cost_tokens": 13,
        }
        self.ledger.accept_job(row, idempotency_key=None, request_sha256=b"")
        self.streams.enqueue(spec_of(self.row(job_id)), 13)
        return job_id

    def row(self, job_id: str):
        row = self.ledger.job(job_id)
        assert row is not None
        return row

    def claim(self) -> list[RunningJob]:
        """Let intake claim once; return what it delivered."""
        self.delivered.clear()
        self.intake._claim_once()
        return list(self.delivered)

    def settle(self, *jobs: RunningJob) -> None:
        """Let the endings' thread do its work, in this thread."""
        for job in jobs:
            self.endings.put(job)
        self.endings.stop()
        self.endings.run()

    def chunk(self, job_id: str, attempt: int, first: int, text: str) -> wire.TokenChunk:
        ids = self.prompts.encode(text, add_special_tokens=False)
        return wire.TokenChunk(
            job=job_id,
            attempt=attempt,
            gen=0,
            first=first,
            ids=tuple(ids),
            text=text,
            ends=tuple(range(1, len(text) + 1)),
        )

    def num_entries(self) -> int:
        return sum(d.num_queued + d.num_held for d in self.streams.depths(MODEL))


@pytest.fixture
def bench(redis_url: str, database_url: str, prompts: Prompts) -> Iterator[Bench]:
    engine, client = database.connect(database_url), redis_client.connect(redis_url)
    client.flushall()
    yield Bench(engine, client, prompts)
    engine.dispose()
    client.close()
