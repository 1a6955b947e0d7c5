"""A worker's life: start, run, quiet, stop. It builds the threads and owns their order.

    starting -> ready      the engine's READY frame has come
    ready    -> draining   SIGTERM or SIGINT: `quiet`, then jobs finish or are handed back
    any      -> starting   the engine died: its jobs are handed back, a new engine is started
    any      -> stopped    it died of its device for the second time: EngineBroken, after the stop

The order of stopping, and why: intake first (nothing new), then the running jobs (finished, or
handed back at the deadline, while leases are still renewed), then the engine (nobody needs it),
then endings (all results committed and acknowledged), last the keeper (leases and heartbeat must
outlive the rest, or another worker would take over what is being finished).

Called by: worker/__main__.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

from headrace.contract import database, log, redis_client
from headrace.contract.accounts import Accounts
from headrace.contract.errors import ConfigurationError, Unavailable
from headrace.contract.ids import uuid7_hex
from headrace.contract.ledger import Ledger
from headrace.contract.prompts import Prompts
from headrace.contract.settings import WorkerSettings
from headrace.contract.streams import JobStreams, WakeSubscription, Workers
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import ModelCard, WorkerBeat
from headrace.worker.courier import Courier
from headrace.worker.endings import Endings
from headrace.worker.engine_link import EngineLink, config_of
from headrace.worker.frames import Ready, Stop
from headrace.worker.held import Held
from headrace.worker.intake import Intake
from headrace.worker.keeper import Keeper
from headrace.worker.metrics import Metrics
from headrace.worker.restarts import Restarts
from headrace.worker.room import Room

#: Seconds the model may take to load.
LOAD_TIMEOUT_S = 900.0
#: Seconds the endings may take to commit the last results when the worker stops.
SETTLE_S = 15.0


class EngineBroken(RuntimeError):
    """No engine lives long on this device; everything in hand was handed back."""


class Worker:
    """All parts of one worker process; `run` is its main thread."""

    def __init__(
        self,
        settings: WorkerSettings,
        environ: Mapping[str, str],
        prompts: Prompts,
        model: str,
        name: str,
    ) -> None:
        self.settings = settings
        self.prompts = prompts
        self.model = model
        self.name = name
        self.state = "starting"
        redis_url = settings.redis_url.get_secret_value()
        client = redis_client.connect(redis_url)
        engine = database.connect(settings.database_url.get_secret_value(), pool_size=4)
        self._ledger, self._accounts = Ledger(engine), Accounts(engine)
        self._streams, self._tokens = JobStreams(client), TokenLog(client)
        self._wake = WakeSubscription(client, self.model)
        self._held, self._metrics = Held(), Metrics()
        self._room = Room()
        self._link = EngineLink(config_of(settings), environ)
        self._deadline: float | None = None  # monotonic s at which running jobs are handed back
        self._started_ms = int(time.time() * 1000)
        self._restarts = Restarts()
        self._broken: str | None = None  # why no engine is started any more
        self._num_signals = self._num_heeded = 0
        self._is_stopped = threading.Event()
        shared = {"model": self.model, "worker": self.name, "streams": self._streams}
        self._endings = Endings(
            **shared,
            ledger=self._ledger,
            tokens=self._tokens,
            held=self._held,
            metrics=self._metrics,
        )
        self._courier = Courier(
            **shared,
            flush_ms=settings.flush_ms,
            link=self._link,
            tokens=self._tokens,
            endings=self._endings,
            held=self._held,
            room=self._room,
            metrics=self._metrics,
            ring=lambda: self._intake.bell.set(),
        )
        self._intake = Intake(
            **shared,
            lease_ms=int(settings.lease_s * 1000),
            tokens=self._tokens,
            ledger=self._ledger,
            prompts=prompts,
            held=self._held,
            room=self._room,
            deliver=self._courier.deliver,
        )
        self._keeper = Keeper(
            **shared,
            lease_s=settings.lease_s,
            workers=Workers(client),
            held=self._held,
            beat=self._beat,
            tell=self._courier.tell,
        )

    # -- run, quiet, stop --------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `quiet` was called and everything in hand is done or handed back.

        ConfigurationError if the engine cannot start; EngineBroken if it cannot live.
        """
        if self.settings.metrics_bind:
            self._metrics.serve(self.settings.metrics_bind)
        self._start_engine()
        threads = {
            run: _thread(name, run)
            for name, run in (
                ("keeper", self._keeper.run),
                ("endings", self._endings.run),
                ("intake", self._intake.run),
                ("wake", self._listen),
            )
        }
        try:
            while not self._is_done():
                self._heed_signals()
                is_alive = self._courier.turn()
                self._watch(is_alive)
            self._stop(threads)
        except BaseException:
            # What is in hand stays leased and is taken over; nobody is told that we are well.
            self._keeper.stop()
            self._link.end()
            raise
        if self._broken is not None:
            raise EngineBroken(self._broken)

    def on_signal(self) -> None:
        """Ask for `quiet`; safe in a signal handler, which may interrupt a lock it would need."""
        self._num_signals += 1
        self._courier.wake()

    def _heed_signals(self) -> None:
        while self._num_heeded < self._num_signals:
            self._num_heeded += 1
            self.quiet()

    def quiet(self) -> None:
        """Claim nothing more; give running jobs `drain_s`. A second call: hand back at once."""
        now = time.monotonic()
        self._deadline = now if self._deadline is not None else now + self.settings.drain_s
        self.state = "draining"
        self._intake.quiet()

    def _is_done(self) -> bool:
        if self._broken is not None:
            return True
        if self._deadline is None:
            return False
        is_empty = self._courier.num_jobs == 0 and len(self._held) == 0
        return is_empty or time.monotonic() >= self._deadline

    def _stop(self, threads: Mapping[Callable[[], None], threading.Thread]) -> None:
        self._intake.quiet()
        threads[self._intake.run].join(SETTLE_S)
        self._hand_back("drain")
        self._link.send(Stop())
        self._link.end()
        settle_by = time.monotonic() + SETTLE_S
        while self._endings.num_open and time.monotonic() < settle_by:
            self._is_stopped.wait(0.02)
        self._endings.stop()
        threads[self._endings.run].join(SETTLE_S)
        self._is_stopped.set()
        self._keeper.stop()
        threads[self._keeper.run].join(SETTLE_S)
        log.event("worker.stopped", worker=self.name)

    def _hand_back(self, why: str) -> None:
        """Return every running job to the queue; the next claim of any worker takes it first."""
        for job in self._courier.take_all():
            try:
                if self._ledger.hand_back(job.job, job.attempt):
                    self._streams.hand_back(self.model, job.job, job.attempt)
                log.event("job.handed_back", job=job.job, worker=self.name, reason=why)
            except Unavailable as error:  # its lease runs out instead
                log.event("handback.failed", level=logging.WARNING, job=job.job, code=error.code)
            self._held.remove(job.job, job.attempt)

    # -- the engine --------------------------------------------------------------------------

    def _start_engine(self) -> None:
        self._link.start()
        self._courier.fatal = None
        log.event("engine.started", worker=self.name, pid=self._link.pid)

    def _watch(self, is_alive: bool) -> None:
        """Restart an engine that died or stands still; note when it is ready."""
        now = time.monotonic()
        if not self._link.is_started:
            if self._courier.num_jobs:  # claimed before the engine died, delivered after
                self._hand_back("no engine")
            if now >= self._restarts.next_at and self._deadline is None:
                self._start_engine()
            return
        if is_alive and self._link.ready is not None and self.state == "starting":
            self._opened(self._link.ready)
        has_work = self._courier.num_jobs > 0
        limit_s = self.settings.step_timeout_s if self._link.ready else LOAD_TIMEOUT_S
        if is_alive and not has_work and self._link.ready:
            self._link.last_frame_at = now  # an idle engine is silent
        if not is_alive or now - self._link.last_frame_at > limit_s:
            self._engine_died("stuck" if is_alive else "ended")

    def _engine_died(self, why: str) -> None:
        fatal, was_ready = self._courier.fatal, self._link.ready is not None
        now = time.monotonic()
        served_s = now - self._link.ready_at if was_ready else 0.0
        status = self._link.end()
        self._room.closed()
        text = fatal.text if fatal else f"status {status}"
        log.event("engine.died", level=logging.ERROR, worker=self.name, why=why, text=text)
        self._hand_back("engine died")
        if not was_ready and self._restarts.num_deaths == 0:
            raise ConfigurationError(f"the engine cannot start: {text}")
        if self.state == "ready":
            self.state = "starting"
        if self._restarts.died(fatal and fatal.code, served_s, now):
            self._metrics.engine_restarts.inc()
        else:
            self._broken = f"the engine died twice of what a restart does not cure: {text}"

    def _opened(self, ready: Ready) -> None:
        """The engine is ready: say what this worker serves."""
        card = ModelCard(
            name=self.model,
            folder=os.path.abspath(self.settings.model),
            max_seq_tokens=ready.max_seq_tokens,
            vocab_size=ready.vocab_size,
            dtype=ready.dtype,
            has_chat_template=self.prompts.template is not None,
        )
        try:
            self._accounts.register_model(card)
        except Unavailable as error:
            log.event("model.delayed", level=logging.WARNING, code=error.code)
            return  # the next turn tries again
        self.state = "ready"
        log.event(
            "worker.ready",
            worker=self.name,
            model=self.model,
            dtype=ready.dtype,
            kv_tokens=ready.num_blocks * ready.block_size,
            max_seq_tokens=ready.max_seq_tokens,
            load_s=ready.load_s,
            device=ready.device,
            max_num_seqs=ready.max_num_seqs,
        )

    # -- threads -----------------------------------------------------------------------------

    def _listen(self) -> None:
        """Pass wake messages on: new work to intake, cancellations to the loop."""
        while not self._is_stopped.is_set():
            try:
                message = self._wake.wait(1.0)
            except Unavailable as error:
                log.event("wake.lost", level=logging.WARNING, worker=self.name, code=error.code)
                self._is_stopped.wait(1.0)
                continue
            if message == "work":
                self._intake.bell.set()
            elif message is not None and message.startswith("cancel "):
                self._courier.cancel(message.removeprefix("cancel "))

    def _beat(self) -> WorkerBeat:
        stats = self._courier.stats
        has_work = self._courier.num_jobs > 0
        age_s = time.monotonic() - self._link.last_frame_at if has_work else 0.0
        return WorkerBeat(
            worker=self.name,
            model=self.model,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self.state,
            started_ms=self._started_ms,
            step=stats.step,
            step_age_ms=int(age_s * 1000),
            num_running=stats.num_running if has_work else 0,
            num_waiting=stats.num_waiting if has_work else 0,
            free_blocks=stats.free_blocks,
            total_blocks=stats.total_blocks,
            engine_restarts=self._restarts.num_deaths,
        )


def build(settings: WorkerSettings, environ: Mapping[str, str]) -> Worker:
    """Read the model's folder and put a worker together; nothing is started yet."""
    if not settings.model:
        raise ConfigurationError(
            "HEADRACE_MODEL is empty: name a model folder in transformers format "
            "(`headrace worker` uses the embedded model by itself)"
        )
    folder = os.path.abspath(settings.model)
    model = settings.model_name or os.path.basename(folder)
    name = settings.worker_id or f"{socket.gethostname()}-{uuid7_hex()[-8:]}"
    return Worker(settings, environ, Prompts.load(folder), model, name)


def _thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start a thread whose unexpected end ends the process: half a worker helps nobody."""

    def guarded() -> None:
        try:
            run()
        except Exception:  # noqa: BLE001  outermost loop of the thread
            log.logger.exception("thread.died name=%s", name)
            os._exit(70)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread
