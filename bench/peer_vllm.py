"""vLLM's own engine on our requests: greedy, random weights, no tokenizer.

Two setups: `equal` has our engine's bytes of KV, running sequences and tokens a step; `defaults`
has what vLLM itself chooses, but for the graphs of batches that our workloads reach. Prefix caching
is on in both, as in our engine. Throughput is of `LLM.generate`, which hands out whole answers
only; the times of tokens come from a second run of the same requests through the same engine's
steps, with an emptied prefix cache.

Called by: engine_peers.py, in the child.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

import numpy as np

from headrace.bench.engine_log import RunLog
from headrace.bench.engine_peers import PeerJob
from headrace.bench.roofline import Request

#: batch sizes beyond which vLLM runs without graphs unless told otherwise.
DEFAULT_GRAPH_SEQS = 512
#: vLLM's own default of running sequences on this class of device.
DEFAULT_NUM_SEQS = 1024
#: vLLM must not ask a network that is not there, nor use a sampler that may not be installed.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
}


def llm_arguments(job: PeerJob) -> dict[str, Any]:
    """Return what LLM() is called with."""
    arguments: dict[str, Any] = {
        "model": job.model_folder,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": job.max_seq_tokens,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if job.kv_dtype == "fp8":
        arguments["kv_cache_dtype"] = "fp8"
    if job.weights_dtype == "fp8":
        arguments["quantization"] = "fp8"
    num_seqs = DEFAULT_NUM_SEQS
    if job.setup == "equal":
        num_seqs = job.max_num_seqs
        arguments["max_num_seqs"] = num_seqs
        arguments["max_num_batched_tokens"] = job.max_step_tokens
        arguments["kv_cache_memory_bytes"] = job.kv_bytes
    if num_seqs > DEFAULT_GRAPH_SEQS:
        arguments["compilation_config"] = {"max_cudagraph_capture_size": num_seqs}
    return arguments


class VllmPeer:
    """One LLM instance."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        # Not at the top: it is installed only where it is compared with, and reads `ENVIRONMENT`.
        vllm: Any = importlib.import_module("vllm")
        self._sampling: Any = importlib.import_module("vllm.sampling_params")
        self._llm = vllm.LLM(**arguments)
        config = self._llm.llm_engine.vllm_config
        self.settings: dict[str, Any] = {
            "vllm": vllm.__version__,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_step_tokens": config.scheduler_config.max_num_batched_tokens,
            "block_size": config.cache_config.block_size,
            "num_blocks": config.cache_config.num_gpu_blocks,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        }

    def warm_up(self, requests: list[Request]) -> None:
        self.measure(requests)

    def measure(self, requests: list[Request]) -> tuple[float, list[int]]:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [self._params(num_output) for _, num_output in requests]
        self._llm.reset_prefix_cache()
        started_s = time.monotonic()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - started_s
        return seconds, [len(output.outputs[0].token_ids) for output in outputs]

    def trace(self, requests: list[Request]) -> RunLog:
        """Step the engine by hand and note when each step's tokens came."""
        engine = self._llm.llm_engine
        self._llm.reset_prefix_cache()
        found: list[int] = []
        times_s: list[float] = []
        kind = self._sampling.RequestOutputKind.DELTA
        started_s = time.monotonic()
        for index, (prompt, num_output) in enumerate(requests):
            params = self._params(num_output)
            params.output_kind = kind
            engine.add_request(f"trace-{started_s}-{index}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = time.monotonic()
            for output in outputs:
                num_new = len(output.outputs[0].token_ids)
                found += [int(output.request_id.split("-")[2])] * num_new
                times_s += [now_s] * num_new
        return RunLog(started_s, time.monotonic(), np.array(found), np.array(times_s))

    def _params(self, num_output: int) -> Any:
        return self._sampling.SamplingParams(
            temperature=0.0, max_tokens=num_output, ignore_eos=True, detokenize=False
        )


def start(job: PeerJob) -> VllmPeer:
    """Start vLLM as the job says."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return VllmPeer(llm_arguments(job))
