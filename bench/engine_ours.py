"""Our engine as its users have it: the real process at the other end of a socketpair.

The benchmark takes the courier's place: it starts `headrace.worker.engine.loop`, sends an Admit a
request, and stamps each step's frame when it is read. worker/engine_link.py does the same for the
courier, but imports its stores' clients, which a machine with nothing but a GPU need not have.

Invariants:
1. The weights are those of the folder where it has some; else the engine makes random ones on its
   device, and no checkpoint is written or read.
2. No stop token is named, so every request gets exactly the tokens it asks for.
3. A sequence id is never used twice in an engine's life.
4. A run finds nothing of an earlier one in the prefix cache: the workloads begin with the same
   tokens in places, so each run has a salt of its own.

Called by: engine.py.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.bench.children import child_environ
from headrace.bench.engine_log import RunError, RunLog
from headrace.bench.roofline import Request
from headrace.worker import frames
from headrace.worker.frames import Admit, EngineConfig, Fatal, Ready, SamplingParams, StepFrame

#: seconds an engine has to end once its socket is closed.
END_S = 10.0
#: what this build's engine can be asked for.
CONFIG_FIELDS = EngineConfig.__struct_fields__


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What a run asks of the engine; None = the engine's own default."""

    device: str = "auto"  # "auto" = a GPU if there is one, "cpu", "cuda"
    dtype: str = "bfloat16"
    kv_dtype: str | None = None  # "fp8"
    weights_dtype: str | None = None  # "fp8" = W8A8
    max_num_seqs: int = 1024
    max_step_tokens: int = 8192
    block_size: int | None = None
    kv_bytes: int | None = None
    target_step_ms: float | None = None
    num_threads: int | None = None
    start_s: float = 300.0  # to be ready in
    run_s: float = 300.0  # to end a workload in


def build_config(model_folder: Path, options: EngineOptions) -> EngineConfig:
    """Make the engine's config; raise ValueError for what this build's engine does not have."""
    asked: dict[str, Any] = {
        "model_folder": str(model_folder),
        "device": options.device,
        "dtype": options.dtype,
        "max_num_seqs": options.max_num_seqs,
        "max_step_tokens": options.max_step_tokens,
        "random_weights": None if any(model_folder.glob("*.safetensors")) else True,
        "kv_dtype": options.kv_dtype,
        "weights_dtype": options.weights_dtype,
        "block_size": options.block_size,
        "kv_bytes": options.kv_bytes,
        "target_step_ms": options.target_step_ms,
        "num_threads": options.num_threads,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if unknown := sorted(asked.keys() - set(CONFIG_FIELDS)):
        raise ValueError(
            f"{', '.join(unknown)} asked of the engine; its config has "
            f"{', '.join(CONFIG_FIELDS)}: leave the option out, or give a folder "
            "with weights where it is random_weights"
        )
    return msgspec.convert(asked, EngineConfig)


class OursDriver:
    """One engine process, from its start to its end; a context manager."""

    def __init__(self, model_folder: Path, options: EngineOptions) -> None:
        self._options = options
        self._next_seq_id = 1
        self._reader = frames.FrameReader()
        started_s = time.monotonic()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        config = json.dumps(msgspec.to_builtins(build_config(model_folder, options)))
        command = [sys.executable, "-m", "headrace.worker.engine.loop"]
        command += ["--fd", str(theirs.fileno()), "--config", config]
        environ = {k: v for k, v in child_environ().items() if not k.startswith("HEADRACE_")}
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environ)
        self._socket = ours
        self._writer = frames.FrameWriter(ours)
        try:
            self.ready = self._await_ready(started_s + options.start_s)
        except BaseException:
            self.close()
            raise
        self.start_s = time.monotonic() - started_s

    def __enter__(self) -> OursDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and with it all that it holds of the device."""
        self._socket.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def kv_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.ready.num_blocks * self.ready.block_size

    def stages(self) -> dict[str, dict[str, float]]:
        """Return where the start's seconds and bytes went, in order."""
        return {
            stage.name: {"seconds": round(stage.seconds, 3), "num_bytes": stage.num_bytes}
            for stage in self.ready.stages
        }

    def run(self, requests: Sequence[Request]) -> RunLog:
        """Have all requests computed at once; return when the last has ended."""
        first_id = self._next_seq_id
        self._next_seq_id += len(requests)
        commands = [
            frames.pack_command(
                Admit(
                    seq_id=first_id + index,
                    prompt=np.asarray(prompt, "<i4").tobytes(),
                    output=b"",
                    params=SamplingParams(temperature=0.0),
                    max_tokens=num_output,
                    salt=b"run %d" % first_id,
                )
            )
            for index, (prompt, num_output) in enumerate(requests)
        ]
        started_s = time.monotonic()
        for command in commands:
            self._writer.send(command)
        received: list[tuple[float, StepFrame]] = []
        num_left = len(requests)
        while num_left:
            for time_s, frame in self._receive(started_s + self._options.run_s):
                received.append((time_s, frame))
                num_left -= int((frame.entries["reason"] != frames.Reason.GOING_ON).sum())
        return _log_of(received, first_id, started_s)

    def _await_ready(self, deadline_s: float) -> Ready:
        while True:
            for _, notice in self._notices(deadline_s):
                if isinstance(notice, Ready):
                    return notice

    def _receive(self, deadline_s: float) -> list[tuple[float, StepFrame]]:
        steps: list[tuple[float, StepFrame]] = []
        for time_s, notice in self._notices(deadline_s):
            if isinstance(notice, frames.Failure):
                raise RunError(f"our engine refused a request: {notice.code}: {notice.text}")
            if isinstance(notice, StepFrame):
                steps.append((time_s, notice))
        return steps

    def _notices(self, deadline_s: float) -> Sequence[tuple[float, object]]:
        """Wait for what comes next, and stamp it; raise RunError at the deadline or the end."""
        left_s = deadline_s - time.monotonic()
        writing = [self._socket] if self._writer.backlog_bytes else []
        if left_s <= 0 or not any(select.select([self._socket], writing, [], left_s)):
            raise RunError("our engine did not answer in time: see its log above")
        is_alive = self._reader.receive(self._socket)
        now_s = time.monotonic()
        notices = [(now_s, frames.unpack(*frame)) for frame in self._reader.frames()]
        for _, notice in notices:
            if isinstance(notice, Fatal):
                raise RunError(f"our engine ended: {notice.code}: {notice.text}")
        if not is_alive:
            raise RunError("our engine ended without a word: see its log above")
        self._writer.flush()
        return notices


def _log_of(received: list[tuple[float, StepFrame]], first_id: int, started_s: float) -> RunLog:
    """Lay the received steps out flat."""
    counts = [(frame.entries["token"] >= 0) for _, frame in received]
    tokens = [frame.entries[has] for (_, frame), has in zip(received, counts, strict=True)]
    num_tokens = [len(entries) for entries in tokens]
    stats = [frame.stats for _, frame in received]
    step_us = np.array([s.step_us for s in stats])
    return RunLog(
        started_s=started_s,
        ended_s=received[-1][0],
        requests=np.concatenate(tokens)["seq_id"].astype(np.int64) - first_id,
        times_s=np.repeat([time_s for time_s, _ in received], num_tokens),
        steps=np.repeat([s.step for s in stats], num_tokens),
        submitted_s=np.array([s.time_ns for s in stats]) / 1e9 - step_us / 1e6,
        step_us=step_us,
        host_us=np.array([s.host_us for s in stats]),
        num_decodes=np.array([s.num_decodes for s in stats]),
        num_prefill_tokens=np.array([s.prefill_tokens for s in stats]),
    )
