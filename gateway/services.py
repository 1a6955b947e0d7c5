"""What the views work with: one of each a process, built from the settings, closed together.

Everything is lazy: no connection is opened and no thread is started before the first use, so an
app may be made before gunicorn forks (it is not: gateway/server) and in tests without servers.

Called by: gateway/app (build), all views.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass

from sqlalchemy import Engine

from headrace.contract import database, redis_client
from headrace.contract.accounts import Accounts
from headrace.contract.audit import Audit
from headrace.contract.errors import QueueUnavailable
from headrace.contract.ids import new_id
from headrace.contract.job_edits import JobEdits
from headrace.contract.job_search import JobSearch
from headrace.contract.ledger import Ledger
from headrace.contract.live import Live
from headrace.contract.operators import Operators
from headrace.contract.passwords import Passwords
from headrace.contract.pauses import Pauses
from headrace.contract.settings import GatewaySettings
from headrace.contract.streams import JobStreams, Workers
from headrace.contract.tokens import ShardSubscription, TokenLog
from headrace.contract.tracing import Traces
from headrace.gateway.admission import Admission
from headrace.gateway.auth import KeyGuard
from headrace.gateway.cards import ModelCards
from headrace.gateway.dashboard.guard import SessionGuard
from headrace.gateway.dashboard.threads import run_in_thread
from headrace.gateway.follower import Follower
from headrace.gateway.metrics import Metrics
from headrace.gateway.outbox import Enqueuer
from headrace.gateway.prompt_check import PromptCheck
from headrace.gateway.queue_depths import QueueDepths

#: Redis connections of one process; greenlets beyond that wait for one.
MAX_REDIS_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of one gateway process."""

    settings: GatewaySettings
    engine: Engine
    redis: redis_client.Client
    ledger: Ledger
    admission: Admission
    accounts: Accounts
    keys: KeyGuard
    operators: Operators
    sessions: SessionGuard
    audit: Audit
    search: JobSearch
    edits: JobEdits
    cards: ModelCards
    prompts: PromptCheck
    streams: JobStreams
    token_log: TokenLog
    workers: Workers
    live: Live
    pauses: Pauses
    enqueuer: Enqueuer
    follower: Follower
    metrics: Metrics
    shard: str  # name of this process in Redis
    closing: threading.Event  # set when the process stops: endless streams end
    traces: Traces | None

    @classmethod
    def build(cls, settings: GatewaySettings) -> Services:
        engine = database.connect(
            settings.database_url.get_secret_value(), pool_size=settings.db_pool_size
        )
        redis = redis_client.connect(
            settings.redis_url.get_secret_value(), max_connections=MAX_REDIS_CONNECTIONS
        )
        shard = new_id("gw")
        ledger, accounts, metrics = Ledger(engine), Accounts(engine), Metrics()
        streams, token_log, live = JobStreams(redis), TokenLog(redis), Live(redis)
        cards = ModelCards(accounts)
        operators = Operators(engine, Passwords(run_in_thread))
        return cls(
            settings=settings,
            engine=engine,
            redis=redis,
            ledger=ledger,
            admission=Admission(QueueDepths(live, cards.known), settings, metrics),
            accounts=accounts,
            keys=KeyGuard(accounts),
            operators=operators,
            sessions=SessionGuard(operators),
            audit=Audit(engine),
            search=JobSearch(engine),
            edits=JobEdits(engine),
            cards=cards,
            prompts=PromptCheck(),
            streams=streams,
            token_log=token_log,
            workers=Workers(redis),
            live=live,
            pauses=Pauses(engine, live),
            enqueuer=Enqueuer(ledger, streams, metrics),
            follower=Follower(
                ShardSubscription(redis, shard),
                token_log,
                shard,
                report=lambda: live.report_streams(shard, metrics.num_streams),
            ),
            metrics=metrics,
            shard=shard,
            closing=threading.Event(),
            traces=Traces.connect(settings.traces_url, settings.traces_share, "gateway", shard),
        )

    def end_streams(self) -> None:
        """End all event streams: clients resume elsewhere."""
        self.closing.set()
        self.follower.close()

    def close(self) -> None:
        """End streams, confirm what was enqueued, and close all connections, in that order."""
        self.end_streams()
        self.enqueuer.close()
        with contextlib.suppress(QueueUnavailable):  # it lapses
            self.live.forget_streams(self.shard)
        if self.traces is not None:
            self.traces.close()
        self.redis.close()
        self.engine.dispose()
