"""A worker's life: start, run, quiet, stop. It owns the order of its threads.

What the worker is to be at any time (starting, ready, draining, drained, quarantined) is decided in
duty.py, where each transition stands with its function; the engine's own life is engine_watch.py's;
parts.py makes and joins all parts. Here they are run: a turn of the main thread heeds signals,
turns the courier, looks after the engine, and does what duty says (`_do_duty`): let intake claim or
not, hand back what is overdue, replace the engine once nothing is in hand.

    any -> stopped   `quiet` (SIGTERM, SIGINT): jobs finish or are handed back, then `_stop`
    any -> stopped   the engine died of its device for the second time: EngineBroken, after the stop

The order of stopping, and why: intake first (nothing new), then the running jobs (finished, or
handed back at the deadline, while leases are still renewed), then the engine (nobody needs it),
then inquests (what its deaths have left open), then endings (all results committed and
acknowledged), last the keeper (leases and heartbeat must outlive the rest, or another worker would
take over what is being finished).

Called by: worker/__main__.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

from headrace.contract import log
from headrace.contract.errors import ConfigurationError, Unavailable
from headrace.contract.ids import uuid7_hex
from headrace.contract.prompts import Prompts
from headrace.contract.settings import WorkerSettings
from headrace.contract.streams import HEARD
from headrace.contract.wire import ModelCard
from headrace.worker.frames import Ready, Stop
from headrace.worker.parts import Parts

#: Seconds the endings may take to commit the last results when the worker stops.
SETTLE_S = 15.0


class EngineBroken(RuntimeError):
    """No engine lives long on this device; everything in hand was handed back."""


class Worker:
    """One worker process; `run` is its main thread."""

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
        parts = Parts(settings, environ, prompts, model, name)
        self._accounts, self._wake, self._traces = parts.accounts, parts.wake, parts.traces
        self._held, self._metrics = parts.held, parts.metrics
        self._link, self._engine, self._duty = parts.link, parts.engine, parts.duty
        self._intake, self._courier = parts.intake, parts.courier
        self._endings, self._hand_back = parts.endings, parts.hand_back
        self._keeper, self._orders, self._gpus = parts.keeper, parts.orders, parts.gpus
        self._health = parts.health
        self._num_signals = self._num_heeded = 0
        self._is_stopped = threading.Event()

    # -- run, quiet, stop --------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `quiet` was called and everything in hand is done or handed back.

        ConfigurationError if the engine cannot start; EngineBroken if it cannot live.
        """
        if self.settings.metrics_bind:
            self._metrics.serve(self.settings.metrics_bind, self._health.answer)
        self._engine.start()
        threads = {
            run: _thread(name, run)
            for name, run in (
                ("keeper", self._keeper.run),
                ("endings", self._endings.run),
                ("inquests", self._hand_back.inquests.run),
                ("intake", self._intake.run),
                ("wake", self._listen),
                ("orders", self._orders.run),
                ("gpus", self._gpus.run),
            )
        }
        try:
            while not self._is_done():
                self._heed_signals()
                is_alive = self._courier.turn()
                self._engine.turn(is_alive, may_start=not self._duty.is_stopping)
                self._note_engine()
                self._do_duty()
            self._stop(threads)
        except BaseException:
            # What is in hand stays leased and is taken over; nobody is told that we are well.
            self._keeper.stop()
            self._link.end()
            raise
        if self._engine.broken is not None:
            raise EngineBroken(self._engine.broken)

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
        self._duty.stop(time.monotonic())
        self._intake.quiet()

    def _do_duty(self) -> None:
        """Carry out what is wanted of the worker now."""
        now = time.monotonic()
        if self._orders.newest is not None:
            self._duty.obey(self._orders.newest, now)
        if self._duty.may_claim:
            self._intake.resume()
        else:
            self._intake.pause()
        if self._duty.is_stopping:
            return
        if self._courier.num_jobs and self._duty.is_overdue(now):
            self._hand_back.all("ordered")
        self._duty.is_empty = self._intake.is_resting and self._has_nothing
        if self._duty.is_empty and self._duty.wants_restart:
            self._engine.replace()
            self._duty.restarted()
            self._note_engine()

    @property
    def _has_nothing(self) -> bool:
        return self._courier.num_jobs == 0 and len(self._held) == 0

    def _is_done(self) -> bool:
        if self._engine.broken is not None:
            return True
        if not self._duty.is_stopping:
            return False
        return self._has_nothing or self._duty.is_overdue(time.monotonic())

    def _stop(self, threads: Mapping[Callable[[], None], threading.Thread]) -> None:
        self._intake.quiet()
        threads[self._intake.run].join(SETTLE_S)
        self._hand_back.all("drain")
        self._link.send(Stop())
        self._link.end()
        self._hand_back.inquests.close()
        threads[self._hand_back.inquests.run].join(SETTLE_S)
        settle_by = time.monotonic() + SETTLE_S
        while self._endings.num_open and time.monotonic() < settle_by:
            self._is_stopped.wait(0.02)
        self._endings.stop()
        threads[self._endings.run].join(SETTLE_S)
        self._is_stopped.set()
        self._orders.stop()
        self._gpus.stop()
        self._keeper.stop()
        threads[self._keeper.run].join(SETTLE_S)
        if self._traces is not None:
            self._traces.close()
        log.event("worker.stopped", worker=self.name)

    # -- the engine --------------------------------------------------------------------------

    def _note_engine(self) -> None:
        """Tell duty whether an engine serves; a new one's model is written down first."""
        self._duty.is_unsound = self._engine.is_unsound
        ready = self._link.ready
        if ready is None:
            self._duty.has_engine = False
        elif not self._duty.has_engine:
            self._opened(ready)

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
            log.event("model.delayed", level=logging.WARNING, worker=self.name, code=error.code)
            return  # the next turn tries again
        self._duty.has_engine = True
        log.event(
            "worker.ready",
            worker=self.name,
            model=self.model,
            state=self._duty.state,
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
                self._is_stopped.wait(0.2)
                continue
            if message == HEARD:  # what was said until now, nobody here was told
                self._keeper.renew_now()
            if message in (HEARD, "work"):
                self._intake.bell.set()
            elif message is not None and message.startswith("cancel "):
                self._courier.cancel(message.removeprefix("cancel "))


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
    log.identify(worker=name)
    return Worker(settings, environ, Prompts.load(folder), model, name)


def _thread(name: str, run: Callable[[], None]) -> threading.Thread:
    """Start a thread whose unexpected end ends the process: half a worker helps nobody."""

    def guarded() -> None:
        try:
            run()
        except Exception as error:  # noqa: BLE001  outermost loop of the thread
            log.failure("thread.died", error, thread=name)
            os._exit(70)

    thread = threading.Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread
