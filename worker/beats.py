"""What a worker says of itself once a second, put together from the parts that know it.

Called by: the keeper's thread (`make`); each part guards what it shares.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import time
from collections.abc import Callable

from headrace.contract.wire import GpuFigures, WorkerBeat
from headrace.worker.courier import Courier
from headrace.worker.duty import Duty
from headrace.worker.engine_link import EngineLink
from headrace.worker.engine_watch import EngineWatch
from headrace.worker.held import Held
from headrace.worker.latencies import Latencies


class Beats:
    """The maker of one worker's beats."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        step_timeout_s: float,
        duty: Duty,
        courier: Courier,
        engine: EngineWatch,
        link: EngineLink,
        held: Held,
        latencies: Latencies,
        gpus: Callable[[], tuple[GpuFigures, ...]],
    ) -> None:
        self._model = model
        self._worker = worker
        self._step_timeout_ms = int(step_timeout_s * 1000)
        self._duty = duty
        self._courier = courier
        self._engine = engine
        self._link = link
        self._held = held
        self._latencies = latencies
        self._gpus = gpus
        self._started_ms = int(time.time() * 1000)
        self._host, self._version = socket.gethostname(), _version()

    def make(self) -> WorkerBeat:
        """Return the next beat; its means are of the time since the one before."""
        stats, ready = self._courier.stats, self._link.ready
        done = self._courier.totals.since_last()
        has_work = self._courier.num_jobs > 0
        return WorkerBeat(
            worker=self._worker,
            model=self._model,
            host=self._host,
            pid=os.getpid(),
            state=self._duty.state,
            started_ms=self._started_ms,
            step=stats.step,
            step_age_ms=int(self._engine.step_age_s * 1000),
            num_running=stats.num_running if has_work else 0,
            num_waiting=stats.num_waiting if has_work else 0,
            free_blocks=stats.free_blocks,
            total_blocks=stats.total_blocks,
            engine_restarts=self._engine.num_deaths,
            version=self._version,
            engine_pid=self._link.pid or 0,
            engine_died_ms=self._engine.died_ms,
            step_timeout_ms=self._step_timeout_ms,
            gpus=self._gpus(),
            cached_blocks=stats.cached_blocks,
            max_num_seqs=0 if ready is None else ready.max_num_seqs,
            num_held=len(self._held),
            num_preempted=done.num_preempted,
            prompt_tokens_total=done.prompt_tokens_total,
            prefix_hit_tokens_total=done.prefix_hit_tokens_total,
            tokens_total=done.tokens_total,
            tokens_per_s=done.tokens_per_s,
            step_us=done.step_us,
            batch=done.batch,
            latencies=self._latencies.counts(),
        )


def _version() -> str:
    try:
        return importlib.metadata.version("headrace")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "unknown"
