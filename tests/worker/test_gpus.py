"""What NVML says, where there is a GPU; and that nothing happens where there is none.

A machine without a GPU has no driver to ask, so what a driver answers is written here by hand.
"""

from types import SimpleNamespace

import pytest
import torch

from headrace.contract.wire import GpuFigures
from headrace.worker.gpus import GpuSampler, load_nvml

UUID = "GPU-8f1c"


class NVMLError(Exception):
    pass


class NotSupported(NVMLError):
    pass


class Driver:
    """The calls the sampler makes, for one GPU of that UUID."""

    NVMLError_NotSupported = NotSupported

    def __init__(self) -> None:
        self.has_power = True
        self.is_well = True

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != UUID or not self.is_well:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=3 << 30, total=140 << 30, free=137 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=75, memory=10)

    def nvmlDeviceGetPowerUsage(self, handle):
        if not self.has_power:
            raise NotSupported
        return 512_500  # mW

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == 0
        return 61


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_the_engines_gpu_is_read_in_our_units(driver):
    sampler = GpuSampler("w1", lambda: UUID, lambda: driver)
    sampler.sample()
    assert sampler.figures == (
        GpuFigures(
            name="NVIDIA H200",
            utilization=0.75,
            memory_used_bytes=3 << 30,
            memory_total_bytes=140 << 30,
            power_w=512.5,
            temperature_c=61.0,
        ),
    )


def test_invariant_2_a_figure_the_device_does_not_have_is_zero(driver):
    driver.has_power = False
    sampler = GpuSampler("w1", lambda: UUID, lambda: driver)
    sampler.sample()
    (gpu,) = sampler.figures
    assert (gpu.power_w, gpu.temperature_c) == (0.0, 61.0)


def test_an_engine_without_a_gpu_asks_nobody():
    def load():
        raise AssertionError("NVML is not needed")

    sampler = GpuSampler("w1", lambda: "", load)
    sampler.sample()
    assert sampler.figures == ()


def test_invariant_1_a_failure_is_logged_once_until_it_has_gone(driver, caplog):
    sampler = GpuSampler("w1", lambda: UUID, lambda: driver)

    def num_lines() -> int:
        return sum("gpu.unreadable" in record.getMessage() for record in caplog.records)

    driver.is_well = False
    for _ in range(3):
        sampler.sample()
    assert (sampler.figures, num_lines()) == ((), 1)
    driver.is_well = True
    sampler.sample()
    assert sampler.figures
    driver.is_well = False
    sampler.sample()
    assert (sampler.figures, num_lines()) == ((), 2)


def test_the_real_driver_knows_the_device_that_torch_names_and_invariant_1_without_one():
    if not torch.cuda.is_available():
        sampler = GpuSampler("w1", lambda: UUID, load_nvml)
        sampler.sample()
        assert sampler.figures == ()
        return
    properties = torch.cuda.get_device_properties(0)
    sampler = GpuSampler("w1", lambda: f"GPU-{properties.uuid}", load_nvml)
    sampler.sample()
    (gpu,) = sampler.figures
    assert gpu.name == properties.name
    assert 0 <= gpu.utilization <= 1
    assert 0 < gpu.memory_used_bytes <= gpu.memory_total_bytes
    assert gpu.memory_total_bytes == pytest.approx(properties.total_memory, rel=0.1)
    assert 0 < gpu.power_w < 2_000
    assert 0 < gpu.temperature_c < 120
