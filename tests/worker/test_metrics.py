"""The worker's exposition: what is counted, when it counts, and vLLM's names for it."""

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from headrace.contract.errors import ConfigurationError
from headrace.contract.exposition import Gaps
from headrace.contract.wire import GpuFigures
from headrace.fleet.server import free_port
from headrace.tests.worker.conftest import END, MODEL
from headrace.tests.worker.test_courier import Loop
from headrace.worker.frames import Reason, StartStage, StepStats
from headrace.worker.metrics import Metrics

#: What existing boards, autoscalers and routers ask of a vLLM server: name -> type.
VLLM_NAMES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:gpu_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:num_preemptions": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:gpu_prefix_cache_queries": "counter",
    "vllm:gpu_prefix_cache_hits": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:time_per_output_token_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
}


GPU = GpuFigures(
    name="a GPU",
    utilization=0.5,
    memory_used_bytes=1 << 30,
    memory_total_bytes=4 << 30,
    power_w=300.0,
    temperature_c=60.0,
)


class Shown:
    """An exposition, read as Prometheus does."""

    def __init__(self, metrics: Metrics) -> None:
        text = generate_latest(metrics._exposition).decode()
        self.families = {f.name: f for f in text_string_to_metric_families(text)}
        self.samples = {
            (s.name, frozenset(s.labels.items())): s.value
            for f in self.families.values()
            for s in f.samples
        }

    def value(self, series: str, /, **labels: str) -> float | None:
        """Return the one value whose labels include these."""
        wanted = set(labels.items())
        found = [v for (n, have), v in self.samples.items() if n == series and wanted <= have]
        assert len(found) <= 1, f"{series} {labels}: {len(found)} series"
        return found[0] if found else None


@pytest.fixture
def loop(bench) -> Loop:
    bench.metrics = bench.endings._metrics = Metrics(MODEL, bench.name)
    loop = Loop(bench)
    bench.metrics.watch(
        state=lambda: "ready",
        num_held=lambda: len(bench.held),
        gpus=lambda: [GPU],
        processes=lambda: [("me", 1)],
    )
    return loop


def run_job(loop: Loop, text: str = "hi") -> str:
    job_id, seq_id = loop.admit()
    loop.say(seq_id, text)
    loop.link.step((seq_id, END, len(text), Reason.STOP_TOKEN))
    loop.turn(times=2)
    loop.bench.settle()
    return job_id


def test_vllms_names_are_there_from_the_start_with_their_types_and_labels(loop):
    shown = Shown(loop.bench.metrics)
    found = {n: f.type for n, f in shown.families.items() if n.startswith("vllm:")}
    assert found == VLLM_NAMES
    for name, labels in shown.samples:
        if name.startswith("vllm:"):
            assert {("model_name", MODEL), ("engine", "0")} <= labels, name


def test_a_job_is_counted_once_under_both_names(loop):
    run_job(loop)
    shown = Shown(loop.bench.metrics)
    assert shown.value("headrace_worker_jobs_ended_total", status="succeeded", reason="stop") == 1
    assert shown.value("vllm:request_success_total", finished_reason="stop") == 1
    assert shown.value("headrace_worker_attempts_total", kind="first", model=MODEL) == 1
    assert shown.value("vllm:generation_tokens_total") == 3
    assert shown.value("vllm:prompt_tokens_total") == 3  # "abc", a token a byte
    for ours, theirs in (
        ("headrace_job_first_token_seconds", "vllm:time_to_first_token_seconds"),
        ("headrace_job_seconds", "vllm:e2e_request_latency_seconds"),
        ("headrace_job_per_token_seconds", "vllm:request_time_per_output_token_seconds"),
        ("headrace_job_output_tokens", "vllm:request_generation_tokens"),
    ):
        assert shown.value(f"{ours}_count") == shown.value(f"{theirs}_count") == 1
        assert shown.value(f"{ours}_sum") == shown.value(f"{theirs}_sum")


def test_the_parts_of_a_jobs_time_add_up_to_all_of_it(loop):
    run_job(loop)
    shown = Shown(loop.bench.metrics)
    parts = {
        part: shown.value("headrace_job_part_seconds_sum", part=part)
        for part in ("queue", "prepare", "prefill", "decode", "publish")
    }
    assert all(seconds is not None and seconds >= 0 for seconds in parts.values()), parts
    whole = shown.value("headrace_job_seconds_sum", status="succeeded")
    assert sum(parts.values()) == pytest.approx(whole)
    assert shown.value("headrace_job_first_token_seconds_sum") == pytest.approx(
        parts["queue"] + parts["prepare"] + parts["prefill"]
    )


def test_invariant_3_a_takeover_counts_its_resumed_tokens_and_no_second_first_token(loop):
    bench = loop.bench
    job_id = bench.accept()
    bench.ledger.pick_up([job_id], "w0")
    bench.tokens.fence(MODEL, job_id, 1, "w0")
    bench.tokens.append(MODEL, [("t", bench.chunk(job_id, 1, 0, "he"))])
    (job,) = bench.claim()
    loop.courier.deliver(job)
    loop.turn()
    loop.say(job.seq_id, "y", first=2)
    loop.link.step((job.seq_id, END, 3, Reason.STOP_TOKEN))
    loop.turn(times=2)
    bench.settle()
    shown = Shown(bench.metrics)
    assert shown.value("headrace_worker_attempts_total", kind="takeover") == 1
    assert shown.value("headrace_worker_resumed_tokens_total") == 2
    assert shown.value("headrace_job_first_token_seconds_count") == 0
    assert shown.value("headrace_job_part_seconds_count", part="lost") == 1
    assert shown.value("headrace_job_part_seconds_count", part="queue") is None
    assert shown.value("headrace_job_seconds_count", status="succeeded") == 1


def test_invariant_1_counters_go_on_when_an_engine_is_followed_by_another():
    metrics = Metrics("m", "w")
    metrics.step(StepStats(num_preempted_total=3, prefix_hit_tokens_total=64, prefill_tokens=36))
    metrics.started([StartStage("weights", 1.0, 1)], 16)
    metrics.step(StepStats(num_preempted_total=1, prefill_tokens=10, num_decodes=2))
    shown = Shown(metrics)
    assert shown.value("headrace_engine_preemptions_total") == 4
    assert shown.value("vllm:num_preemptions_total") == 4
    assert shown.value("headrace_engine_prefix_hit_tokens_total") == 64
    assert shown.value("headrace_engine_prefix_query_tokens_total") == 64 + 36 + 10
    assert shown.value("headrace_engine_steps_total") == 2
    assert shown.value("vllm:cache_config_info", block_size="16", num_gpu_blocks="0") == 1


def test_invariant_2_a_worker_without_work_shows_none():
    held = [1]
    metrics = Metrics("m", "w")
    metrics.watch(state=str, num_held=lambda: len(held), gpus=list, processes=list)
    metrics.step(StepStats(num_running=5, num_waiting=2, total_blocks=10, free_blocks=4))
    shown = Shown(metrics)
    assert shown.value("vllm:num_requests_running") == 5
    assert shown.value("vllm:num_requests_waiting") == 2
    assert shown.value("vllm:kv_cache_usage_perc") == pytest.approx(0.6)
    held.clear()
    shown = Shown(metrics)
    assert shown.value("vllm:num_requests_running") == 0
    assert shown.value("headrace_engine_sequences_waiting", worker="w") == 0


def test_a_step_counts_its_time_for_each_sequence_it_decoded():
    metrics = Metrics("m", "w")
    metrics.step(StepStats(step_us=20_000, num_decodes=7))
    metrics.step(StepStats(step_us=60_000, num_decodes=0, prefill_tokens=9))  # a prompt alone
    shown = Shown(metrics)
    assert shown.value("vllm:inter_token_latency_seconds_count") == 7
    assert shown.value("vllm:inter_token_latency_seconds_sum") == pytest.approx(0.14)
    assert shown.value("vllm:inter_token_latency_seconds_bucket", le="0.01") == 0
    assert shown.value("vllm:inter_token_latency_seconds_bucket", le="0.025") == 7
    assert shown.value("vllm:inter_token_latency_seconds_bucket", le="+Inf") == 7


def test_gaps_have_inclusive_bounds_as_prometheus_has_them():
    registry, gaps = CollectorRegistry(), Gaps("x_seconds", "t", (1.0, 2.0))
    registry.register(gaps)
    gaps.observe(1.0, 2)
    gaps.observe(5.0, 1)
    values = {(s.name, s.labels.get("le")): s.value for m in registry.collect() for s in m.samples}
    assert values["x_seconds_bucket", "1.0"] == 2
    assert values["x_seconds_bucket", "2.0"] == 2
    assert values["x_seconds_bucket", "+Inf"] == values["x_seconds_count", None] == 3


def test_a_gpus_last_sample_is_shown_with_units(loop):
    shown = Shown(loop.bench.metrics)
    values = {
        "headrace_gpu_utilization_ratio": 0.5,
        "headrace_gpu_memory_used_bytes": 1 << 30,
        "headrace_gpu_memory_bytes": 4 << 30,
        "headrace_gpu_power_watts": 300,
        "headrace_gpu_temperature_celsius": 60,
    }
    for name, value in values.items():
        assert shown.value(name, gpu="0", name="a GPU", worker="w1") == value


def test_it_is_served_with_build_state_and_processes(loop):
    bind = f"127.0.0.1:{free_port()}"
    loop.bench.metrics.serve(bind)
    with urllib.request.urlopen(f"http://{bind}/metrics", timeout=10) as response:
        text = response.read().decode()
    assert f'headrace_worker_state{{model="{MODEL}",state="ready",worker="w1"}} 1.0' in text
    assert 'headrace_build_info{process="worker"' in text
    assert 'process_cpu_seconds_total{pid="1",process="me"}' in text
    with pytest.raises(ConfigurationError, match=r"nothing can listen there.*free port"):
        Metrics().serve(bind)
