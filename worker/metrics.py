"""The worker's Prometheus metrics: names with units, one registry a process.

Called by: lifecycle (makes and serves them), the courier's threads (write them).
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from headrace.worker.frames import StartStage, StepStats


class Metrics:
    """All metrics of one worker."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.jobs_ended = Counter(
            "headrace_worker_jobs_ended", "Jobs ended by this worker.", ["status"], registry=r
        )
        self.tokens = Counter("headrace_worker_output_tokens", "Tokens logged.", registry=r)
        self.stale_writes = Counter(
            "headrace_worker_stale_writes", "Writes a newer attempt refused.", ["at"], registry=r
        )
        self.engine_restarts = Counter(
            "headrace_worker_engine_restarts", "Engines started after the first.", registry=r
        )
        self.flush_seconds = Histogram(
            "headrace_worker_flush_seconds",
            "One fenced append + publish of all jobs.",
            buckets=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 5),
            registry=r,
        )
        self.step_seconds = Histogram(
            "headrace_engine_step_seconds",
            "Engine steps.",
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10),
            registry=r,
        )
        self.host_seconds = Histogram(
            "headrace_engine_host_seconds",
            "The engine's own work for a step, without waiting for results.",
            buckets=(0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
            registry=r,
        )
        self.start_seconds = Gauge(
            "headrace_engine_start_seconds", "Of the last start.", ["stage"], registry=r
        )
        self.start_bytes = Gauge(
            "headrace_engine_start_bytes", "Memory kept by the last start.", ["stage"], registry=r
        )
        self.decodes = Gauge("headrace_engine_decodes", "Decoded in the last step.", registry=r)
        self.running = Gauge("headrace_engine_sequences_running", "In the batch.", registry=r)
        self.waiting = Gauge("headrace_engine_sequences_waiting", "Admitted, not run.", registry=r)
        self.free_blocks = Gauge("headrace_engine_kv_blocks_free", "KV blocks free.", registry=r)
        self.total_blocks = Gauge("headrace_engine_kv_blocks", "KV blocks in all.", registry=r)
        self.preemptions = Gauge("headrace_engine_preemptions", "Preempted so far.", registry=r)
        self.prefix_hits = Gauge(
            "headrace_engine_prefix_hit_tokens", "Prompt tokens found in the cache.", registry=r
        )

    def started(self, stages: Sequence[StartStage]) -> None:
        """Take over the stages of an engine's start; those of the one before are gone."""
        self.start_seconds.clear()
        self.start_bytes.clear()
        for stage in stages:
            self.start_seconds.labels(stage.name).set(stage.seconds)
            self.start_bytes.labels(stage.name).set(stage.num_bytes)

    def step(self, stats: StepStats) -> None:
        """Take over the figures of one engine step."""
        self.step_seconds.observe(stats.step_us / 1e6)
        self.host_seconds.observe(stats.host_us / 1e6)
        self.decodes.set(stats.num_decodes)
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.free_blocks.set(stats.free_blocks)
        self.total_blocks.set(stats.total_blocks)
        self.preemptions.set(stats.num_preempted_total)
        self.prefix_hits.set(stats.prefix_hit_tokens_total)

    def serve(self, bind: str) -> None:
        """Serve /metrics at `host:port` from a thread."""
        host, _, port = bind.rpartition(":")
        start_http_server(int(port), addr=host or "127.0.0.1", registry=self.registry)
