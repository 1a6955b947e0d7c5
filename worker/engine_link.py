"""The courier's end of its engine: start the process, send commands, receive frames, end it.

Invariants:
1. One engine at a time; its process ends with this one, even when this one is killed (the engine
   sees the socket close and asks the kernel for a signal; so `start` is called by the main thread).
2. Nothing here waits: what the socket does not take is kept, what has not come is not waited for.
3. The engine gets no address and no secret: its environment has no HEADRACE_ variable.
4. Ending an engine takes END_S + KILL_S at most, also one that the kernel cannot end: `remains`
   names it then.
5. Once an engine was ready on a device, those after it run there or not at all: a GPU that was lost
   must not turn a fast worker into a slow one on the CPU, where nobody notices.

Owned by the courier's loop.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import msgspec
import numpy as np

from headrace.contract.settings import WorkerSettings
from headrace.contract.wire import JobClass
from headrace.worker.frames import (
    Admit,
    Command,
    EngineConfig,
    Failure,
    Fatal,
    FrameError,
    FrameReader,
    FrameWriter,
    Ready,
    SamplingParams,
    StepFrame,
    pack_command,
    unpack,
)
from headrace.worker.running import RunningJob
from headrace.worker.stacks import StackFile, ThreadStack

Notice = Ready | Fatal | Failure | StepFrame
#: Seconds an engine has to end by itself after its socket was closed.
END_S = 2.0
#: Seconds in which a killed process must be gone; one that hangs in a driver never is.
KILL_S = 10.0


class EngineLink:
    """One engine process and the socket to it."""

    def __init__(self, config: EngineConfig, environ: Mapping[str, str]) -> None:
        self._config = config
        self._environ = {k: v for k, v in environ.items() if not k.startswith("HEADRACE_")}
        if config.num_threads:
            self._environ["OMP_NUM_THREADS"] = str(config.num_threads)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._writer: FrameWriter | None = None
        self._stacks: StackFile | None = None
        self._last_stacks: list[ThreadStack] = []
        self.remains: int | None = None  # pid of an engine that SIGKILL did not end
        self.ready: Ready | None = None
        self.ready_at = 0.0  # monotonic s
        self.last_frame_at = 0.0  # monotonic s

    @property
    def is_started(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 while there is no engine."""
        return -1 if self._socket is None else self._socket.fileno()

    def start(self) -> None:
        """Start the engine process; `ready` is set when its READY frame has come."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        config = json.dumps(msgspec.to_builtins(self._config))
        command = [sys.executable, "-m", "headrace.worker.engine.loop"]
        command += ["--fd", str(theirs.fileno()), "--config", config]
        self._stacks = StackFile()
        command += ["--stacks-fd", str(self._stacks.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno(), self._stacks.fileno()],
                env=self._environ,
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._reader, self._writer = FrameReader(), FrameWriter(ours)
        self.ready = None
        self.last_frame_at = time.monotonic()

    def send(self, command: Command) -> bool:
        """Queue a command; False when the engine is gone."""
        if self._writer is None:
            return False
        try:
            self._writer.send(pack_command(command))
        except OSError:
            return False
        return True

    def receive(self) -> tuple[list[Notice], bool]:
        """Return the frames that have come, and whether the engine is still there."""
        if self._socket is None or self._writer is None:
            return [], False
        notices: list[Notice] = []
        try:
            is_alive = self._reader.receive(self._socket)
            for frame in self._reader.frames():
                notice = unpack(*frame)
                if isinstance(notice, Notice):
                    notices.append(notice)
                    self.last_frame_at = time.monotonic()
                if isinstance(notice, Ready):
                    self.ready, self.ready_at = notice, self.last_frame_at
                    self._config = msgspec.structs.replace(self._config, device=notice.device)
            if is_alive:
                self._writer.flush()
        except (FrameError, OSError):
            return notices, False  # what came before may say why
        return notices, is_alive

    def ask_stacks(self) -> list[ThreadStack]:
        """Let a live engine say where its threads stand."""
        if self._process is None or self._stacks is None:
            return []
        return self._stacks.ask(self._process.pid)

    def last_stacks(self) -> list[ThreadStack]:
        """Return what the engine that ended wrote: when asked, or as it died of a signal."""
        return self._last_stacks

    def end(self, *, at_once: bool = False) -> int | None:
        """Close the socket and end the process; returns its status, None if it took force.

        `at_once`: it stands still, so that it is not waited for.
        """
        if self._socket is not None:
            self._socket.close()
        self._socket = self._writer = None
        self.ready = None
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            return self._wait_for(process, 0 if at_once else END_S)
        finally:
            if self._stacks is not None:
                self._last_stacks = self._stacks.read()
                self._stacks.close()
            self._stacks = None

    def _wait_for(self, process: subprocess.Popen[bytes], patience_s: float) -> int | None:
        try:
            return process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
        try:
            process.wait(KILL_S)
        except subprocess.TimeoutExpired:
            self.remains = process.pid
        return None


def config_of(settings: WorkerSettings, worker: str = "") -> EngineConfig:
    """Cut the engine's slice out of the settings; `auto` is left to the engine."""
    kv_mb, target_ms = settings.kv_cache_mb, settings.target_step_ms
    return EngineConfig(
        model_folder=os.path.abspath(settings.model),
        device=settings.device,
        dtype=settings.dtype,
        kv_dtype=settings.kv_dtype,
        weights_dtype=settings.weights_dtype,
        num_threads=settings.engine_threads or max(1, len(os.sched_getaffinity(0)) // 2),
        kv_bytes=None if kv_mb == "auto" else kv_mb << 20,
        gpu_memory_fraction=settings.gpu_memory_fraction,
        block_size=settings.block_size,
        max_seq_tokens=settings.max_seq_tokens or None,
        max_num_seqs=0 if settings.max_num_seqs == "auto" else settings.max_num_seqs,
        max_step_tokens=0 if settings.max_step_tokens == "auto" else settings.max_step_tokens,
        target_step_ms=None if target_ms == "auto" else target_ms,
        runner=settings.runner,
        stub_step_ms=settings.stub_step_ms,
        stub_lost_steps=settings.stub_lost_steps,
        stub_poison=settings.stub_poison,
        stub_broken_by=settings.stub_broken_by,
        log_format=settings.log_format,
        worker=worker,
    )


def admission(job: RunningJob) -> Admit:
    """Say to the engine what it must know of a job: ids and numbers, no text, no name."""
    sampling = job.spec.sampling
    return Admit(
        seq_id=job.seq_id,
        prompt=np.asarray(job.prompt_ids, dtype="<i4").tobytes(),
        output=np.asarray(job.ids, dtype="<i4").tobytes(),
        params=SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
            logprobs=sampling.logprobs,
        ),
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(job.stop_token_ids),
        is_batch=job.spec.job_class is JobClass.BATCH,
        salt=job.spec.tenant.encode(),
    )
