"""What an engine starts with where nobody said, and where its start's seconds and bytes went.

`fill_limits` is the one place that knows what a device suits; all else reads the filled config:

                      GPU           CPU
    max_num_seqs      256 (<= 1024) 64
    max_step_tokens   8192          512
    target_step_ms    50            off

A GPU computes thousands of prompt tokens while it reads the weights once, so that its limits are
wide and the target keeps running streams smooth; a CPU's step is short by its own budget.

Invariants:
1. A filled config names its device and every limit; filling it again changes nothing.
2. A limit that somebody named is kept or refused, never changed; one that nobody named gives way.
3. A ledger's stages are in the order of the start and do not overlap.

Called by: runner.py (both), loop.py (sends ledger and UUID on); gpu_start.py (its stages).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from headrace.worker.frames import EngineConfig, StartStage

if TYPE_CHECKING:  # loaded where there is a device only: a stub starts without it
    import torch

#: sequences that a GPU's tables and graphs are made for at most.
MAX_GPU_SEQS = 1024
#: sequences, tokens of a step and its target in ms, where none are named.
GPU_LIMITS = (256, 8192, 50.0)
CPU_LIMITS = (64, 512, 0.0)
#: shares of a GPU's memory: below, no model fits; above, the driver and the graphs have no room.
MEMORY_FRACTIONS = (0.1, 0.98)


def fill_limits(config: EngineConfig) -> EngineConfig:
    """Fill in by device what is not named; raise ValueError for what cannot be.

    A device of `auto` counts as a CPU here: runner.resolve_config has looked for a GPU before.
    """
    is_gpu = config.device == "cuda"
    num_seqs, step_tokens, target_ms = GPU_LIMITS if is_gpu else CPU_LIMITS
    if config.max_step_tokens and not config.max_num_seqs:
        num_seqs = min(num_seqs, config.max_step_tokens)
    filled = msgspec.structs.replace(
        config,
        max_num_seqs=config.max_num_seqs or num_seqs,
        max_step_tokens=config.max_step_tokens or max(step_tokens, config.max_num_seqs),
        target_step_ms=target_ms if config.target_step_ms is None else config.target_step_ms,
    )
    _refuse_limits(filled)
    if not is_gpu:
        _refuse_fp8(filled)
    return filled


def gpu_uuid(config: EngineConfig) -> str:
    """Return the engine's GPU as NVML names it, for the courier to watch; empty without one."""
    if config.device != "cuda" or config.runner == "stub":
        return ""  # the stub touches no device
    import torch

    if not torch.cuda.is_available():
        return ""  # Triton's interpreter has none
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return "GPU-" + uuid.removeprefix("GPU-")


def _refuse_limits(config: EngineConfig) -> None:
    if config.max_num_seqs < 1 or config.max_step_tokens < config.max_num_seqs:
        raise ValueError(
            f"max_num_seqs is {config.max_num_seqs}, max_step_tokens {config.max_step_tokens}; a "
            "step must have room for one token of each sequence: raise max_step_tokens or lower "
            "max_num_seqs"
        )
    if config.device == "cuda" and config.max_num_seqs > MAX_GPU_SEQS:
        raise ValueError(
            f"max_num_seqs is {config.max_num_seqs}; a GPU engine runs at most {MAX_GPU_SEQS} "
            "sequences at once: lower it, and start more workers for more"
        )
    least, most = MEMORY_FRACTIONS
    if not least <= config.gpu_memory_fraction <= most:
        raise ValueError(
            f"gpu_memory_fraction is {config.gpu_memory_fraction}; {least} to {most} can be had: "
            "the rest is for the driver and what else uses the GPU"
        )


def _refuse_fp8(config: EngineConfig) -> None:
    asked = {"kv_dtype": config.kv_dtype, "weights_dtype": config.weights_dtype}
    if names := [name for name, value in asked.items() if value == "fp8"]:
        raise ValueError(
            f"{' and '.join(names)} fp8 asked; the device is a CPU, which computes in float32 or "
            "bfloat16: set auto, or run on a GPU"
        )


@dataclass(slots=True)
class StartupLedger:
    """Stages of a start, in order."""

    device: torch.device | None = None  # None: a CPU
    entries: list[StartStage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, num_bytes: int = 0) -> Iterator[None]:
        """Time what is done inside, device work included, and what memory it keeps.

        On a GPU the bytes are measured. A CPU's are told by the caller: the system gives pages on
        first use, so that what a process holds now says little of what it has asked for.
        """
        started_s, before = time.monotonic(), self._bytes_used()
        yield
        kept = self._bytes_used() - before if self._is_on_gpu else num_bytes
        self.entries.append(StartStage(name, time.monotonic() - started_s, kept))

    def note_imports(self) -> None:
        """Begin with what went before: the process and its imports."""
        self.entries.insert(0, StartStage("process and imports", _process_age_s(), 0))

    @property
    def _is_on_gpu(self) -> bool:
        return self.device is not None and self.device.type == "cuda"

    def _bytes_used(self) -> int:
        if not self._is_on_gpu:
            return 0
        import torch

        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def lines(self) -> list[str]:
        """Return the ledger as text, one stage a line and the sum last."""
        total_s = sum(entry.seconds for entry in self.entries)
        total_bytes = sum(entry.num_bytes for entry in self.entries)
        return [
            f"{row.name:<28}{row.seconds:8.2f} s{row.num_bytes / 2**30:9.2f} GiB"
            for row in (*self.entries, StartStage("total", total_s, total_bytes))
        ]


def _process_age_s() -> float:
    """Return seconds since this process was started; where the system does not say, since it ran.

    The second is CPU time, the best that is left: an import is work more than it is waiting.
    """
    if not sys.platform.startswith("linux"):
        return time.process_time()
    # Field 22 of proc(5)'s stat, counted behind the name, which may hold spaces and brackets.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s
