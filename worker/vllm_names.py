"""The worker's metrics under vLLM's names, so that its boards, autoscalers and routers work here.

Each is one of ours under another name: nothing is counted for it. Names, units and meanings are
those of vLLM's V1 engine (as 0.25 shows them); names it has given up and boards still ask for
(`gpu_cache_usage_perc`, `time_per_output_token_seconds`) are there too.
Labels as there: `model_name`, and `engine`, which is always 0.

Invariants:
1. What is shown is a reading of our series at the same moment, so the two cannot disagree.

Owned by: worker/metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

#: vLLM's name -> our family, and the labels that a sample of it must have.
NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "vllm:num_requests_running": ("headrace_engine_sequences_running", {}),
    "vllm:num_requests_waiting": ("headrace_engine_sequences_waiting", {}),
    "vllm:kv_cache_usage_perc": ("headrace_engine_kv_used_ratio", {}),
    "vllm:gpu_cache_usage_perc": ("headrace_engine_kv_used_ratio", {}),
    "vllm:num_preemptions": ("headrace_engine_preemptions", {}),
    "vllm:prefix_cache_queries": ("headrace_engine_prefix_query_tokens", {}),
    "vllm:prefix_cache_hits": ("headrace_engine_prefix_hit_tokens", {}),
    "vllm:gpu_prefix_cache_queries": ("headrace_engine_prefix_query_tokens", {}),
    "vllm:gpu_prefix_cache_hits": ("headrace_engine_prefix_hit_tokens", {}),
    "vllm:prompt_tokens": ("headrace_worker_prompt_tokens", {}),
    "vllm:generation_tokens": ("headrace_worker_output_tokens", {}),
    "vllm:time_to_first_token_seconds": ("headrace_job_first_token_seconds", {}),
    "vllm:inter_token_latency_seconds": ("headrace_job_inter_token_seconds", {}),
    "vllm:time_per_output_token_seconds": ("headrace_job_inter_token_seconds", {}),
    "vllm:request_time_per_output_token_seconds": ("headrace_job_per_token_seconds", {}),
    "vllm:e2e_request_latency_seconds": ("headrace_job_seconds", {"status": "succeeded"}),
    "vllm:request_queue_time_seconds": ("headrace_job_part_seconds", {"part": "queue"}),
    "vllm:request_prefill_time_seconds": ("headrace_job_part_seconds", {"part": "prefill"}),
    "vllm:request_decode_time_seconds": ("headrace_job_part_seconds", {"part": "decode"}),
    "vllm:request_prompt_tokens": ("headrace_job_prompt_tokens", {}),
    "vllm:request_generation_tokens": ("headrace_job_output_tokens", {}),
}
#: Our reasons of an end as vLLM's `finished_reason`.
FINISHED = {
    "stop": "stop",
    "length": "length",
    "canceled": "abort",
    "expired": "abort",
    "error": "error",
}


@dataclass(frozen=True, eq=False)
class VllmNames(Collector):
    """A reading of our registry under vLLM's names."""

    ours: CollectorRegistry
    model: str

    def collect(self) -> Iterator[Metric]:
        found = {metric.name: metric for metric in self.ours.collect()}
        labels = {"model_name": self.model, "engine": "0"}
        for name, (our_name, wanted) in NAMES.items():
            metric = found[our_name]
            shown = Metric(name, metric.documentation, metric.type)
            for sample in metric.samples:
                if wanted.items() <= sample.labels.items() and not sample.name.endswith("_created"):
                    others = {k: v for k, v in sample.labels.items() if k not in wanted}
                    suffix = sample.name.removeprefix(our_name)
                    shown.add_sample(name + suffix, labels | others, sample.value)
            yield shown
        yield self._successes(found["headrace_worker_jobs_ended"], labels)
        yield self._cache(found, labels)

    @staticmethod
    def _successes(ended: Metric, labels: dict[str, str]) -> Metric:
        totals = dict.fromkeys(FINISHED.values(), 0.0)
        for sample in ended.samples:
            if sample.name.endswith("_total"):
                totals[FINISHED.get(sample.labels["reason"], "error")] += sample.value
        shown = Metric("vllm:request_success", ended.documentation, "counter")
        for reason, value in totals.items():
            sample_labels = labels | {"finished_reason": reason}
            shown.add_sample("vllm:request_success_total", sample_labels, value)
        return shown

    @staticmethod
    def _cache(found: dict[str, Metric], labels: dict[str, str]) -> Metric:
        """Show the pool's size as vLLM does: in the labels of a 1."""
        size = found["headrace_engine_kv_block_tokens"].samples[0].value
        blocks = found["headrace_engine_kv_blocks"].samples[0].value
        given = labels | {"block_size": str(int(size)), "num_gpu_blocks": str(int(blocks))}
        shown = GaugeMetricFamily("vllm:cache_config_info", "The KV pool.", labels=list(given))
        shown.add_metric(list(given.values()), 1)
        return shown
