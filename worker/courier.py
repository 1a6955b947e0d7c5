"""The courier's loop: frames in from the engine, tokens out to log and subscribers.

It is the one owner of all running jobs; other threads reach them through `deliver` and `tell`. A
turn of the loop: wait, obey, receive, expire, flush, watch.

Invariants:
1. A job's tokens are appended to its log in order, and before anyone sees them (tokens.append).
2. A job is handed to `endings` only when all its tokens are logged; if Redis stays away for long,
   its result is committed without: Postgres is the authority, subscribers read it there.
3. A stale attempt writes nothing more: what log or lease refuses is dropped here and canceled in
   the engine.
4. The loop never waits for Postgres, and for Redis only within one flush; the engine never waits
   for the loop.

Size: one owner of one state; each act on it is short, and they are read against one another.

Called by: lifecycle, in the main thread (engine processes end with the thread that started them).
"""

from __future__ import annotations

import math
import os
import queue
import re
import select
import time
from collections.abc import Callable
from typing import Any

from headrace.contract import log
from headrace.contract.errors import EngineRefused, Unavailable
from headrace.contract.streams import JobStreams
from headrace.contract.tokens import Append, TokenLog
from headrace.contract.wire import FinishReason, JobStatus, TokenLogprobs
from headrace.worker.early_cancels import EarlyCancels
from headrace.worker.emit import Emitter
from headrace.worker.endings import Endings
from headrace.worker.engine_link import EngineLink, admission
from headrace.worker.frames import Cancel, Failure, Fatal, Ready, Reason, StepFrame, StepStats
from headrace.worker.held import Held
from headrace.worker.latencies import Latencies
from headrace.worker.metrics import Metrics
from headrace.worker.room import Room
from headrace.worker.running import RunningJob
from headrace.worker.totals import EngineTotals

#: Seconds between flushes that failed.
RETRY_S = 0.2
#: Seconds the loop waits when nothing is to be done.
IDLE_S = 0.5


class Courier:
    """The loop and what it owns: the running jobs and the engine."""

    def __init__(
        self,
        *,
        model: str,
        worker: str,
        flush_ms: float,
        link: EngineLink,
        streams: JobStreams,
        tokens: TokenLog,
        endings: Endings,
        held: Held,
        room: Room,
        metrics: Metrics,
        latencies: Latencies,
        ring: Callable[[], None],  # room has come free
    ) -> None:
        self._model = model
        self._worker = worker
        self._flush_s = flush_ms / 1000
        self._link = link
        self._streams = streams
        self._endings = endings
        self._held = held
        self._room = room
        self._metrics = metrics
        self._latencies = latencies
        self._ring = ring
        self._jobs: dict[int, RunningJob] = {}  # by sequence id
        self._by_id: dict[str, RunningJob] = {}
        self._failures: dict[int, Failure] = {}
        self._early_cancels = EarlyCancels()
        self._leaving: dict[int, str] = {}  # sequences the engine has still, their jobs have left
        self._next_deadline_ms = math.inf  # Unix ms
        self._next_seq_id = 1
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_r, False)
        os.set_blocking(self._wake_w, False)
        self._flush_at = 0.0  # monotonic s; 0 = nothing to flush
        self._frame_at = 0.0  # monotonic s, of the engine's last frame
        self._emitter = Emitter(model=model, worker=worker, tokens=tokens, metrics=metrics)
        self.stats = StepStats()
        self.totals = EngineTotals()
        self.fatal: Fatal | None = None

    # -- for other threads -------------------------------------------------------------------

    def deliver(self, job: RunningJob) -> None:
        """Take over a job that intake has begun."""
        self._order(lambda: self._admit(job))

    def tell(self, state: str, job: str, attempt: int) -> None:
        """Act on what a renewal found: cancel, lost or gone."""
        acts = {"cancel": self._cancel, "lost": self._lose, "gone": self._restore}
        self._order(lambda: acts[state](job, attempt))

    def cancel(self, job: str) -> None:
        """End a job as canceled, whatever its attempt."""
        self._order(lambda: self._cancel(job, None))

    def wake(self) -> None:
        """Let the loop turn once."""
        self._order(lambda: None)

    def _order(self, act: Callable[[], None]) -> None:
        self._orders.put(act)
        try:
            os.write(self._wake_w, b"\0")
        except BlockingIOError:
            return  # a full pipe wakes it too

    # -- the turn ----------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        return len(self._by_id)

    def turn(self) -> bool:
        """Run one turn; False when the engine is gone."""
        self._wait()
        self._obey()
        is_alive = self._receive()
        self._expire()
        if self._flush_at and time.monotonic() >= self._flush_at:
            self.flush()
        return is_alive

    def _wait(self) -> None:
        timeout_s = IDLE_S
        if self._flush_at:
            timeout_s = min(IDLE_S, max(0.0, self._flush_at - time.monotonic()))
        engine = [self._link] if self._link.fileno() >= 0 else []
        select.select([self._wake_r, *engine], [], [], timeout_s)
        try:
            os.read(self._wake_r, 4096)
        except BlockingIOError:
            return

    def _obey(self) -> None:
        while True:
            try:
                act = self._orders.get_nowait()
            except queue.Empty:
                return
            act()

    def _receive(self) -> bool:
        notices, is_alive = self._link.receive()
        for notice in notices:
            match notice:
                case StepFrame():
                    self._step(notice)
                case Failure():
                    self._failures[notice.seq_id] = notice
                case Ready():
                    self._open(notice)
                case Fatal():
                    self.fatal = notice
        return is_alive

    def _open(self, ready: Ready) -> None:
        """Let work in, and tell where the start's seconds and bytes went."""
        tokens = ready.num_blocks * ready.block_size
        self._room.opened(tokens, ready.max_seq_tokens, ready.max_num_seqs)
        # Until its first step: what the engine before said last is true no more.
        self.stats = StepStats(free_blocks=ready.num_blocks, total_blocks=ready.num_blocks)
        self.totals.opened()
        self._metrics.started(ready.stages, ready.block_size)
        told: dict[str, Any] = {}
        for stage in ready.stages:
            name = re.sub(r"\W+", "_", stage.name.lower()).strip("_")
            told |= {f"{name}_s": stage.seconds, f"{name}_bytes": stage.num_bytes}
        log.event("engine.opened", worker=self._worker, device=ready.device, **told)
        self._ring()

    def _step(self, frame: StepFrame) -> None:
        """Take the tokens of one engine step."""
        self.stats = frame.stats
        self._metrics.step(frame.stats)
        self.totals.step(frame)
        self._latencies.stepped(frame)
        if self._room.reported(frame.stats.room_tokens, frame.stats.num_admits_total):
            self._ring()
        self._frame_at = time.monotonic()
        logprobs = iter(frame.logprobs)
        # As tuples: a numpy scalar a field costs more than all else a token does here.
        for seq_id, token, index, cached_tokens, reason, num_logprobs, _ in frame.entries.tolist():
            values = next(logprobs) if num_logprobs >= 0 else None
            job = self._jobs.get(seq_id)
            if reason != Reason.GOING_ON:
                self._left_engine(seq_id, job)
            if job is not None and job.ending is None:
                job.cached_tokens = cached_tokens
                self._take(job, token, index, Reason(reason), values)

    def _left_engine(self, seq_id: int, job: RunningJob | None) -> None:
        """Note that the engine has told a sequence's one end."""
        if job is not None:
            job.is_in_engine = False
        elif self._leaving.pop(seq_id, None) is not None and self._room.gone(seq_id):
            self._ring()

    def _take(
        self,
        job: RunningJob,
        token: int,  # -1 = an end without a token
        index: int,
        reason: Reason,
        values: tuple[float, list[tuple[int, float]]] | None,  # logprobs, where asked for
    ) -> None:
        if token >= 0:
            if index != len(job.ids):
                raise RuntimeError(
                    f"{job.job}: the engine sent token {index}, expected {len(job.ids)}"
                )
            asked = None if values is None else TokenLogprobs(values[0], tuple(values[1]))
            job.take(token, is_last=reason is not Reason.GOING_ON, logprobs=asked)
            if index == 0:
                self._latencies.first_token(job.job)
        match reason:
            case Reason.STOP_TOKEN:
                job.end(JobStatus.SUCCEEDED, FinishReason.STOP)
            case Reason.LENGTH:
                job.end(JobStatus.SUCCEEDED, FinishReason.LENGTH)
            case Reason.FAILED:
                failure = self._failures.pop(job.seq_id, None)
                text = failure.text if failure else "the engine could not run it"
                code = failure.code if failure else EngineRefused.code
                job.end(JobStatus.FAILED, FinishReason.ERROR, error_code=code, error_text=text)
            case Reason.GOING_ON | Reason.CANCELED:
                if job.ending is not None:  # a stop string: the engine does not know of it
                    self._link.send(Cancel(job.seq_id))
        self._schedule_flush(job)

    def _schedule_flush(self, job: RunningJob) -> None:
        is_awaited = job.ending is not None or job.num_logged == 0  # an end, or the first tokens
        at = time.monotonic() + (0.0 if is_awaited else self._flush_s)
        if not self._emitter.is_delayed and (not self._flush_at or at < self._flush_at):
            self._flush_at = at

    def _expire(self) -> None:
        """End the jobs whose deadline has passed; looks at them only when one has."""
        now_ms = time.time() * 1000
        if now_ms < self._next_deadline_ms:
            return
        self._next_deadline_ms = math.inf
        for job in self._by_id.values():
            deadline = job.spec.deadline_ms
            if deadline is None or job.ending is not None:
                continue
            if now_ms < deadline:
                self._next_deadline_ms = min(self._next_deadline_ms, deadline)
            else:
                job.expire(f"the job's deadline passed after {len(job.ids)} tokens")
                self._link.send(Cancel(job.seq_id))
                self._schedule_flush(job)

    def flush(self) -> None:
        """Append and publish all new tokens in one command; pass on the jobs that have ended."""
        self._flush_at = 0.0
        for job, state in self._emitter.log(self._by_id.values(), self._frame_at):
            if state is Append.STALE:
                self._lose(job.job, job.attempt)
                continue
            if state is Append.BROKEN:
                self._restore(job.job, job.attempt)
            self._flush_at = time.monotonic() + (RETRY_S if state is Append.BROKEN else 0.0)
        if self._emitter.is_delayed:
            self._flush_at = time.monotonic() + RETRY_S
        for job in [j for j in self._by_id.values() if j.ending is not None]:
            if job.num_logged == len(job.ids) or self._emitter.is_impatient:
                self._forget(job)
                self._endings.put(job)

    # -- orders ------------------------------------------------------------------------------

    def _admit(self, job: RunningJob) -> None:
        """Give a job to the engine, or straight to the endings when it has ended already."""
        older = self._by_id.get(job.job)
        if older is not None:  # our own lease ran out and we claimed it again
            self._drop(older)
        self._metrics.begun(job)
        job.seq_id, self._next_seq_id = self._next_seq_id, self._next_seq_id + 1
        self._by_id[job.job] = self._jobs[job.seq_id] = job
        if self._early_cancels.take(job.job):
            job.end(JobStatus.CANCELED, FinishReason.CANCELED)
        if job.ending is not None:
            self._schedule_flush(job)
            return
        if job.spec.deadline_ms is not None:
            self._next_deadline_ms = min(self._next_deadline_ms, job.spec.deadline_ms)
        job.stamps.admitted_at = time.monotonic()
        job.is_in_engine = self._link.send(admission(job))
        self._room.admitted(job.job)

    def _cancel(self, job_id: str, attempt: int | None) -> None:
        job = self._by_id.get(job_id)
        if job is None and attempt is None:
            self._early_cancels.note(job_id)
        if job is None or (attempt is not None and job.attempt != attempt):
            return
        job.end(JobStatus.CANCELED, FinishReason.CANCELED)
        self._link.send(Cancel(job.seq_id))
        self._schedule_flush(job)

    def _lose(self, job_id: str, attempt: int) -> None:
        """A newer attempt has the job: stop working on it, write nothing."""
        self._held.remove(job_id, attempt)
        job = self._by_id.get(job_id)
        if job is not None and job.attempt == attempt:
            log.event("job.lost", job=job_id, worker=self._worker, attempt=attempt)
            self._drop(job)

    def _restore(self, job_id: str, attempt: int) -> None:
        """Redis has forgotten the job: put back lease, fence and log from memory."""
        job = self._by_id.get(job_id)
        if job is None or job.attempt != attempt:
            return
        try:
            is_ours = self._streams.restore(
                job.spec,
                self._worker,
                job.claim.cost_tokens,
                attempt=attempt,
                gen=job.gen,
                log=job.logged_chunks(),
                suspect=job.claim.suspect,
            )
        except Unavailable:
            return  # the next renewal says so again
        log.event("job.restored", job=job_id, worker=self._worker, is_ours=is_ours)
        if not is_ours:
            self._metrics.refused("restore")
            self._lose(job_id, attempt)

    def _drop(self, job: RunningJob) -> None:
        self._link.send(Cancel(job.seq_id))
        self._forget(job)

    def _forget(self, job: RunningJob) -> None:
        self._jobs.pop(job.seq_id, None)
        if job.is_in_engine:
            self._leaving[job.seq_id] = job.job
            self._room.leaves(job.seq_id)
        if self._by_id.get(job.job) is job:
            del self._by_id[job.job]
            self._room.release(job.job)
        self._ring()

    def lose_engine(self) -> frozenset[str]:
        """Note that there is no engine; returns the jobs whose sequences it had."""
        in_engine = [job for job in self._by_id.values() if job.is_in_engine]
        had = frozenset({job.job for job in in_engine} | set(self._leaving.values()))
        for job in in_engine:
            job.is_in_engine = False
        self._leaving.clear()
        return had

    def take_all(self) -> list[RunningJob]:
        """Give up all jobs (drain's deadline, or the engine died); returns those to hand back.

        What the engine made is logged first; a job that has ended goes to the endings.
        """
        self._obey()
        self.flush()
        jobs = list(self._by_id.values())
        for job in jobs:
            self._drop(job)
            if job.ending is not None:
                self._endings.put(job)
        return [job for job in jobs if job.ending is None]
