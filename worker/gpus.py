"""What NVML says of the GPU the engine runs on: sampled once a second, read by the beat.

The engine tells its device's UUID when it is ready (frames.Ready.gpu), which names the same GPU to
NVML whatever CUDA_VISIBLE_DEVICES and a container's numbering made of it.

Invariants:
1. Nothing here harms the worker: no NVML, no GPU, an engine on the CPU or a driver that fails give
   an empty list. Each kind of failure is logged once until it has gone.
2. A figure the device does not have (power of a laptop's, utilisation of a slice) is 0, and the
   others stand.
3. NVML is called from this thread alone: a driver that hangs holds up no lease and no token.

Called by: lifecycle (as a thread of its own), the keeper by way of lifecycle (`figures`).
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable
from typing import Any

from headrace.contract import log
from headrace.contract.wire import GpuFigures

#: Seconds between two samples, as between beats.
SAMPLE_S = 1.0
#: NVML's number for the sensor on the chip (NVML_TEMPERATURE_GPU).
_ON_CHIP = 0


def load_nvml() -> Any:
    """Import NVML's bindings and start them; raises what they raise where there is no driver."""
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml


class GpuSampler:
    """The sampling thread of a worker."""

    def __init__(
        self,
        worker: str,
        uuid: Callable[[], str],  # of the engine's GPU; empty: it has none, or none is known yet
        load: Callable[[], Any] = load_nvml,
    ) -> None:
        self._worker = worker
        self._uuid = uuid
        self._load = load
        self._nvml: Any = None
        self._failing: str | None = None  # what was logged and has not gone
        self._stopped = threading.Event()
        self.figures: tuple[GpuFigures, ...] = ()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        """Sample until stopped."""
        while not self._stopped.is_set():
            self.sample()
            self._stopped.wait(SAMPLE_S)

    def sample(self) -> None:
        """Take one sample; never raises."""
        uuid = self._uuid()
        if not uuid:
            self.figures = ()
            return
        try:
            self.figures = (self._read(uuid),)
            self._failing = None
        except Exception as error:  # noqa: BLE001  the bindings raise classes of their own making
            self.figures = ()
            self._nvml = None  # a driver that was reloaded wants a new start
            self._note(error)

    def _read(self, uuid: str) -> GpuFigures:
        if self._nvml is None:
            self._nvml = self._load()
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = nvml.nvmlDeviceGetName(handle)
        return GpuFigures(
            name=name.decode() if isinstance(name, bytes) else str(name),
            utilization=self._or_zero(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100,
            memory_used_bytes=int(memory.used),
            memory_total_bytes=int(memory.total),
            power_w=self._or_zero(lambda: nvml.nvmlDeviceGetPowerUsage(handle)) / 1000,
            temperature_c=self._or_zero(lambda: nvml.nvmlDeviceGetTemperature(handle, _ON_CHIP)),
        )

    def _or_zero(self, read: Callable[[], float]) -> float:
        try:
            return float(read())
        except self._nvml.NVMLError_NotSupported:
            return 0.0

    def _note(self, error: Exception) -> None:
        what = f"{type(error).__name__}: {error}"
        if what != self._failing:
            log.event("gpu.unreadable", level=logging.WARNING, worker=self._worker, why=what)
        self._failing = what
