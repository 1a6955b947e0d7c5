"""The engine's last figures as Prometheus series, made when they are asked for.

Invariants:
1. What grows is a counter, and does not fall when an engine dies: the next one's counts are added.
2. Gauges of work are 0 while the worker holds no job: an idle engine sends no frame that says so.

Owned by: worker/metrics; written by the courier's loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from headrace.contract.wire import GpuFigures
from headrace.worker.frames import StepStats


class EngineFigures(Collector):
    """Gauges of the last step, counters over all steps of all engines of this worker."""

    def __init__(self) -> None:
        self._stats = StepStats()
        self._block_size = 0
        # Counted here, frame by frame:
        self._num_steps = self._num_prefilled = self._num_decoded = 0
        # Counted by the engine itself: those of the engines before this one.
        self._num_preempted = self._num_hits = 0
        self._state: Callable[[], str] = lambda: "starting"
        self._num_held: Callable[[], int] = lambda: 0
        self._gpus: Callable[[], Sequence[GpuFigures]] = tuple

    def watch(
        self,
        state: Callable[[], str],
        num_held: Callable[[], int],
        gpus: Callable[[], Sequence[GpuFigures]],
    ) -> None:
        self._state, self._num_held, self._gpus = state, num_held, gpus

    def opened(self, block_size: int) -> None:
        """A new engine is ready: its counts begin at zero."""
        last = self._stats
        self._num_preempted += last.num_preempted_total
        self._num_hits += last.prefix_hit_tokens_total
        self._stats, self._block_size = StepStats(), block_size

    def step(self, stats: StepStats) -> None:
        """Take over a frame."""
        self._stats = stats
        self._num_steps += 1
        self._num_prefilled += stats.prefill_tokens
        self._num_decoded += stats.num_decodes

    def collect(self) -> Iterator[Metric]:
        stats, num_held = self._stats, self._num_held()
        works = num_held > 0
        used = 1 - stats.free_blocks / stats.total_blocks if stats.total_blocks else 0.0
        hits = self._num_hits + stats.prefix_hit_tokens_total
        gauges = {
            "headrace_worker_jobs_held": ("Jobs leased to this worker.", num_held),
            "headrace_engine_decodes": (
                "Sequences decoded in the last step.",
                stats.num_decodes * works,
            ),
            "headrace_engine_sequences_running": ("In the batch.", stats.num_running * works),
            "headrace_engine_sequences_waiting": ("Admitted, not run.", stats.num_waiting * works),
            "headrace_engine_kv_blocks": ("KV blocks in all.", stats.total_blocks),
            "headrace_engine_kv_blocks_free": ("KV blocks free or cached.", stats.free_blocks),
            "headrace_engine_kv_blocks_cached": ("Of those, with a prefix.", stats.cached_blocks),
            "headrace_engine_kv_used_ratio": ("KV blocks that sequences own, 0 to 1.", used),
            "headrace_engine_kv_block_tokens": ("Tokens in a KV block.", self._block_size),
        }
        counters = {
            "headrace_engine_steps": ("Frames of the engine.", self._num_steps),
            "headrace_engine_prefill_tokens": ("Prompt tokens computed.", self._num_prefilled),
            "headrace_engine_decode_tokens": ("Tokens computed one by one.", self._num_decoded),
            "headrace_engine_preemptions": (
                "Sequences put back for want of KV blocks.",
                self._num_preempted + stats.num_preempted_total,
            ),
            "headrace_engine_prefix_hit_tokens": ("Prompt tokens found in the cache.", hits),
            "headrace_engine_prefix_query_tokens": (
                "Prompt tokens looked for in the cache.",
                hits + self._num_prefilled,
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
        state = GaugeMetricFamily(
            "headrace_worker_state", "1 for the state that the worker is in.", labels=["state"]
        )
        state.add_metric([self._state()], 1)
        yield state
        yield from _of_gpus(self._gpus())


def _of_gpus(gpus: Sequence[GpuFigures]) -> Iterator[Metric]:
    """Show the last sample of each GPU; the families are there without one, too."""
    shown = {
        "headrace_gpu_utilization_ratio": ("Share of the last second a kernel ran.", "utilization"),
        "headrace_gpu_memory_used_bytes": ("Memory in use.", "memory_used_bytes"),
        "headrace_gpu_memory_bytes": ("Memory in all.", "memory_total_bytes"),
        "headrace_gpu_power_watts": ("Power drawn.", "power_w"),
        "headrace_gpu_temperature_celsius": ("On the chip.", "temperature_c"),
    }
    for name, (text, figure) in shown.items():
        family = GaugeMetricFamily(name, text, labels=["gpu", "name"])
        for number, gpu in enumerate(gpus):
            family.add_metric([str(number), gpu.name], getattr(gpu, figure))
        yield family
