"""The parts of one worker, made and joined: who is given what, and nothing else.

Nothing is started or connected here (clients are lazy); lifecycle.py starts and stops the parts in
the order that matters. A name's type says what a part is; its file says what it does.

Called by: lifecycle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from headrace.contract import database, redis_client
from headrace.contract.accounts import Accounts
from headrace.contract.crashes import Crashes
from headrace.contract.ledger import Ledger
from headrace.contract.orders import WorkerOrders
from headrace.contract.prompts import Prompts
from headrace.contract.settings import WorkerSettings
from headrace.contract.streams import JobStreams, WakeSubscription, Workers
from headrace.contract.tokens import TokenLog
from headrace.contract.tracing import Traces
from headrace.worker.beats import Beats
from headrace.worker.courier import Courier
from headrace.worker.duty import Duty
from headrace.worker.endings import Endings
from headrace.worker.engine_link import EngineLink, config_of
from headrace.worker.engine_watch import EngineWatch
from headrace.worker.gpus import GpuSampler
from headrace.worker.hand_back import HandBack
from headrace.worker.health import WorkerHealth
from headrace.worker.held import Held
from headrace.worker.intake import Intake
from headrace.worker.keeper import Keeper
from headrace.worker.latencies import Latencies
from headrace.worker.metrics import Metrics
from headrace.worker.order_watch import OrderWatch
from headrace.worker.room import Room
from headrace.worker.spans import JobSpans
from headrace.worker.suspicion import Suspicion

#: One for each thread that uses it: intake, endings, inquests, the loop, the watch of orders; and
#: one more.
DB_POOL_SIZE = 6


class Parts:
    """All parts of one worker process."""

    def __init__(
        self,
        settings: WorkerSettings,
        environ: Mapping[str, str],
        prompts: Prompts,
        model: str,
        name: str,
    ) -> None:
        self._client = redis_client.connect(settings.redis_url.get_secret_value())
        self._db = database.connect(
            settings.database_url.get_secret_value(), pool_size=DB_POOL_SIZE
        )
        self._shared: dict[str, Any] = {
            "model": model,
            "worker": name,
            "streams": JobStreams(self._client),
        }
        self._ledger, self._tokens = Ledger(self._db), TokenLog(self._client)
        self._latencies, self._room = Latencies(), Room()
        self.accounts = Accounts(self._db)
        self.wake = WakeSubscription(self._client, model)
        self.held, self.metrics = Held(), Metrics(model, name)
        self.link = EngineLink(config_of(settings, name), environ)
        self.duty = Duty(settings.drain_s)
        self.traces = Traces.connect(settings.traces_url, settings.traces_share, "worker", name)
        self._join_way_of_jobs(settings, prompts, JobSpans(self.traces, model, name))
        self.engine = EngineWatch(
            worker=name,
            step_timeout_s=settings.step_timeout_s,
            link=self.link,
            courier=self.courier,
            room=self._room,
            metrics=self.metrics,
            hand_back=self.hand_back.all,
            hand_back_dead=self.hand_back.after_death,
            next_engine=lambda is_sane: self.hand_back.inquests.next_engine(is_sane=is_sane),
        )
        self.orders = OrderWatch(name, WorkerOrders(self._db), self.courier.wake)
        self.gpus = GpuSampler(name, lambda: self.engine.gpu)
        self._join_what_tells(settings, model, name)

    def _join_way_of_jobs(
        self, settings: WorkerSettings, prompts: Prompts, spans: JobSpans
    ) -> None:
        """Make what a job goes through: intake, the courier, then endings or the way back."""
        suspicion = Suspicion(
            **self._shared, crashes=Crashes(self._db), ledger=self._ledger, metrics=self.metrics
        )
        self.endings = Endings(
            **self._shared,
            ledger=self._ledger,
            tokens=self._tokens,
            held=self.held,
            metrics=self.metrics,
            latencies=self._latencies,
            spans=spans,
        )
        self.courier = Courier(
            **self._shared,
            flush_ms=settings.flush_ms,
            link=self.link,
            tokens=self._tokens,
            endings=self.endings,
            held=self.held,
            room=self._room,
            metrics=self.metrics,
            latencies=self._latencies,
            ring=lambda: self.intake.bell.set(),
        )
        self.intake = Intake(
            **self._shared,
            lease_ms=int(settings.lease_s * 1000),
            tokens=self._tokens,
            ledger=self._ledger,
            prompts=prompts,
            held=self.held,
            room=self._room,
            suspicion=suspicion,
            metrics=self.metrics,
            deliver=self.courier.deliver,
        )
        self.hand_back = HandBack(
            **self._shared,
            courier=self.courier,
            endings=self.endings,
            suspicion=suspicion,
            ledger=self._ledger,
            held=self.held,
            spans=spans,
        )

    def _join_what_tells(self, settings: WorkerSettings, model: str, name: str) -> None:
        """Make what says of the others how they are: beats (with the leases), checks, metrics."""
        beats = Beats(
            model=model,
            worker=name,
            step_timeout_s=settings.step_timeout_s,
            duty=self.duty,
            courier=self.courier,
            engine=self.engine,
            link=self.link,
            held=self.held,
            latencies=self._latencies,
            gpus=lambda: self.gpus.figures,
        )
        self.keeper = Keeper(
            **self._shared,
            lease_s=settings.lease_s,
            workers=Workers(self._client),
            held=self.held,
            beat=beats.make,
            tell=self.courier.tell,
            redis_was_away=self.intake.redis_was_away,
        )
        self.health = WorkerHealth(
            worker=name,
            model=model,
            step_timeout_s=settings.step_timeout_s,
            state=lambda: self.duty.state,
            has_engine=lambda: self.link.ready is not None,
            step_age_s=lambda: self.engine.step_age_s,
            num_held=lambda: len(self.held),
        )
        self.metrics.watch(
            state=lambda: self.duty.state,
            gpus=lambda: self.gpus.figures,
            num_held=lambda: len(self.held),
            processes=self._processes,
        )

    def _processes(self) -> list[tuple[str, int]]:
        pid = self.link.pid
        return [("courier", os.getpid()), *([] if pid is None else [("engine", pid)])]
