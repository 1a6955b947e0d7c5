"""Whether kernels are to be compiled before an engine's first step, and the processes that do it.

Compiled one by one, as they are met, the kernels of a first start take half a minute on one core.
So a start without a stamp has gpu_compile.py compile them on other cores while the weights load.
The stamp lies in Triton's cache, named by all that decides which kernels there are: it goes when
the cache goes.

Invariants:
 1. With the stamp nothing is started; without a GPU neither.
 2. The stamp is written when the start has launched all it captures, so those kernels are in the
    cache whatever failed here.
 3. What is not compiled here (a failure, a limit of time) is compiled when it is met.
 4. No process outlives the `with` that they are used in, nor the engine.

Called by: gpu_start.py.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import msgspec
import torch

from headrace.kernels.precompile import cache_folder, sources_digest
from headrace.worker.engine.architecture import Architecture
from headrace.worker.frames import EngineConfig

#: processes at most. All kernels take some 36 s of one core, the slowest 3 s.
MAX_JOBS = 16
#: how long the first step waits for them, s. Alone, one core takes less.
LIMIT_S = 90.0
#: fields of the config that decide which kernels there are and how they are launched.
DECIDING = (
    *("dtype", "kv_dtype", "weights_dtype", "block_size"),
    *("max_seq_tokens", "max_num_seqs", "max_step_tokens"),
)


@dataclass(slots=True)
class Compilers:
    """The compiling processes of one start; without a command, none."""

    stamp_path: Path | None = None  # None = nothing to say
    command: list[str] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None
    _told: IO[bytes] | None = None

    def __enter__(self) -> Compilers:
        if self.command:
            self._told = tempfile.TemporaryFile()
            # Its stdin is never written: it ends when this process does.
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=self._told, stderr=subprocess.STDOUT,
                process_group=0,
            )  # fmt: skip
        return self

    def wait(self, limit_s: float = LIMIT_S) -> list[str]:
        """Wait until all is compiled or the time is up; return what there is to say, as lines."""
        if self._process is None or self._told is None:
            return []
        try:
            status = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._end()
            return [f"kernels: not all compiled within {limit_s:.0f} s; the rest as they are met"]
        self._told.seek(0)
        lines = self._told.read().decode(errors="replace").splitlines()
        if status == 0:
            return [f"kernels: {line}" for line in lines[-1:]]
        return [
            f"kernels: compiling ahead ended with status {status}, compiled as they are met:",
            *(f"kernels: {line}" for line in lines[-8:]),
        ]

    def stamp(self) -> None:
        """Say to later starts that everything is compiled."""
        if self.stamp_path is not None and self.command:
            self.stamp_path.parent.mkdir(parents=True, exist_ok=True)
            self.stamp_path.touch()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        if self._told is not None:
            self._told.close()

    def _end(self) -> None:
        """End the process and what it has forked."""
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def start_compilers(config: EngineConfig, arch: Architecture, device: torch.device) -> Compilers:
    """Return the processes that this start needs, to be started by `with`."""
    if device.type != "cuda":
        return Compilers()
    name = torch.cuda.get_device_name(device)
    stamp_path = stamp_of(config, arch, name)
    if stamp_path.exists():
        return Compilers(stamp_path)
    num_jobs = min(MAX_JOBS, len(os.sched_getaffinity(0)))
    capability = torch.cuda.get_device_capability(device)
    return Compilers(stamp_path, command_of(config, name, capability, num_jobs))


def command_of(
    config: EngineConfig, device_name: str, capability: tuple[int, int], num_jobs: int
) -> list[str]:
    """Return what gpu_compile.py is started with on a machine with a GPU."""
    return [
        *(sys.executable, "-m", "headrace.worker.engine.gpu_compile", "--launchers"),
        *("--config", msgspec.json.encode(config).decode(), "--device-name", device_name),
        *("--capability", *map(str, capability), "--jobs", str(num_jobs)),
    ]


def stamp_of(config: EngineConfig, arch: Architecture, device_name: str) -> Path:
    """Return the file that exists if an engine like this one has started here before."""
    digest = hashlib.sha256(sources_digest().encode())
    for path in sorted(Path(__file__).parent.glob("gpu_*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    deciding = [(name, getattr(config, name)) for name in DECIDING]
    digest.update(repr((device_name, arch, deciding)).encode())
    return cache_folder() / f"headrace-{digest.hexdigest()}.stamp"
