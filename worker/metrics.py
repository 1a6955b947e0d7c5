"""The worker's Prometheus metrics, courier and engine: names with units, one registry a process.

What the engine counts itself is not copied frame by frame: its last figures are kept, and series
are made of them when Prometheus asks. Job times are cut from Stamps when a job has ended. All
series carry the labels `model` and `worker`.

Invariants:
1. A counter never falls while the process lives: what an engine had counted is added up when the
   next one opens.
2. A worker without work shows no running and no waiting sequence, whatever its last frame said.
3. A job's time to the first token is counted once, by the attempt that made token 0.

Called by: lifecycle (makes and serves them), the courier's threads (write them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from headrace.contract import exposition
from headrace.contract.wire import GpuFigures
from headrace.worker.engine_figures import EngineFigures
from headrace.worker.frames import StartStage, StepStats
from headrace.worker.running import RunningJob
from headrace.worker.vllm_names import VllmNames

#: Bounds of what a client waits for, seconds: vLLM's, so that its boards fit.
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
#: Between two tokens: vLLM's, and below them what a small model on a GPU needs.
TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
#: Whole jobs and their parts: vLLM's, and below them what a queue that is empty takes.
JOB_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0),
    *(10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
#: Tokens of a prompt or an output.
TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))


class Metrics:
    """All metrics of one worker."""

    def __init__(self, model: str = "", worker: str = "") -> None:
        self._model = model
        self.registry = CollectorRegistry()
        r = self.registry
        self.jobs_ended = Counter(
            "headrace_worker_jobs_ended",
            "Jobs ended by this worker.",
            ["status", "reason"],
            registry=r,
        )
        self.attempts = Counter(
            "headrace_worker_attempts",
            "Attempts begun: the first of a job, after a hand-back, or after a worker's death.",
            ["kind"],
            registry=r,
        )
        self.resumed_tokens = Counter(
            "headrace_worker_resumed_tokens",
            "Tokens found in the logs of jobs taken over: prefilled, not made again.",
            registry=r,
        )
        self.tokens = Counter("headrace_worker_output_tokens", "Tokens logged.", registry=r)
        self.prompt_tokens = Counter(
            "headrace_worker_prompt_tokens", "Prompt tokens of jobs begun.", registry=r
        )
        self.stale_writes = Counter(
            "headrace_worker_stale_writes", "Writes a newer attempt refused.", ["at"], registry=r
        )
        self.engine_restarts = Counter(
            "headrace_worker_engine_restarts", "Engines started after the first.", registry=r
        )
        self.dead_letters = Counter(
            "headrace_dead_letters",
            "Jobs that killed their engine when they ran alone, and failed for it.",
            registry=r,
        )
        self.engine_deaths = Counter(
            "headrace_worker_engine_deaths",
            "Deaths of an engine; certain: what ran is to blame.",
            ["evidence"],
            registry=r,
        )
        for evidence in ("certain", "uncertain"):  # a series that is there can be watched
            self.engine_deaths.labels(evidence)
        self.flush_seconds = Histogram(
            "headrace_worker_flush_seconds",
            "One fenced append + publish of all jobs.",
            buckets=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 5),
            registry=r,
        )
        self._make_engines()
        self._make_jobs()
        self._exposition = CollectorRegistry()
        labels = {"model": model, "worker": worker}
        self._exposition.register(exposition.Labelled(self.registry, labels))
        self._exposition.register(exposition.BuildInfo("worker"))
        self._exposition.register(VllmNames(self.registry, model))

    def _make_engines(self) -> None:
        r = self.registry
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
        self.engine = EngineFigures()
        r.register(self.engine)
        self.inter_token = exposition.Gaps(
            "headrace_job_inter_token_seconds",
            "Gap before a token of a running sequence: the time of its step.",
            TOKEN_S,
        )
        r.register(self.inter_token)

    def _make_jobs(self) -> None:
        def histogram(
            name: str, text: str, labels: Sequence[str], buckets: Sequence[float]
        ) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self.first_token_seconds = histogram(
            "headrace_job_first_token_seconds",
            "From acceptance to the engine's first token.",
            (),
            FIRST_TOKEN_S,
        )
        self.job_seconds = histogram(
            "headrace_job_seconds", "From acceptance to the committed result.", ["status"], JOB_S
        )
        self.part_seconds = histogram(
            "headrace_job_part_seconds",
            "Where an attempt's time went: queue or lost, prepare, prefill, decode, publish.",
            ["part"],
            JOB_S,
        )
        self.per_token_seconds = histogram(
            "headrace_job_per_token_seconds",
            "Mean of an attempt: its decode by the tokens after the first.",
            (),
            TOKEN_S,
        )
        self.job_prompt_tokens = histogram(
            "headrace_job_prompt_tokens", "Prompt of an ended job.", (), TOKENS
        )
        self.job_output_tokens = histogram(
            "headrace_job_output_tokens", "Output of an ended job.", (), TOKENS
        )

    def watch(
        self,
        *,
        state: Callable[[], str],
        num_held: Callable[[], int],
        gpus: Callable[[], Sequence[GpuFigures]],
        processes: Callable[[], list[tuple[str, int]]],
    ) -> None:
        """Show what lifecycle knows: the worker's state, what it holds, its processes."""
        self.engine.watch(state, num_held, gpus)
        self._exposition.register(exposition.Processes(processes))

    # -- the engine --------------------------------------------------------------------------

    def started(self, stages: Sequence[StartStage], block_size: int = 0) -> None:
        """Take over the stages of an engine's start; those of the one before are gone."""
        self.engine.opened(block_size)
        self.start_seconds.clear()
        self.start_bytes.clear()
        for stage in stages:
            self.start_seconds.labels(stage.name).set(stage.seconds)
            self.start_bytes.labels(stage.name).set(stage.num_bytes)

    def step(self, stats: StepStats) -> None:
        """Take over the figures of one engine step."""
        step_s = stats.step_us / 1e6
        self.step_seconds.observe(step_s)
        self.host_seconds.observe(stats.host_us / 1e6)
        if stats.num_decodes:
            self.inter_token.observe(step_s, stats.num_decodes)
        self.engine.step(stats)

    # -- jobs --------------------------------------------------------------------------------

    def begun(self, job: RunningJob) -> None:
        """Count an attempt that this worker begins."""
        if job.attempt == 1:
            kind = "first"
        else:
            kind = "takeover" if job.stamps.was_lost else "handed_back"
        self.attempts.labels(kind).inc()
        self.prompt_tokens.inc(len(job.prompt_ids))
        self.resumed_tokens.inc(job.num_logged)

    def ended(self, job: RunningJob, status: str, reason: str) -> None:
        """Count a job whose result is committed, and where its time went."""
        self.jobs_ended.labels(status, reason).inc()
        stamps = job.stamps
        for part, begin, end in stamps.points():
            self.part_seconds.labels(part).observe(end - begin)
        first, last = stamps.first_token_at, stamps.last_token_at
        num_own = len(job.ids) - sum(len(chunk.ids) for chunk in job.resumed)
        if first is not None and not job.resumed:
            self.first_token_seconds.observe(stamps.since_accepted_s(first))
        if first is not None and last is not None and num_own > 1:
            self.per_token_seconds.observe((last - first) / (num_own - 1))
        if stamps.committed_at is not None:
            self.job_seconds.labels(status).observe(stamps.since_accepted_s(stamps.committed_at))
        self.job_prompt_tokens.observe(len(job.prompt_ids))
        self.job_output_tokens.observe(len(job.ids))

    def refused(self, at: str) -> None:
        """Count a write that a newer attempt's fence refused."""
        self.stale_writes.labels(at=at).inc()

    def serve(self, bind: str, checks: exposition.Checks | None = None) -> None:
        """Serve /metrics, and the worker's checks, at `host:port` from a thread."""
        exposition.serve(bind, self._exposition, checks)
