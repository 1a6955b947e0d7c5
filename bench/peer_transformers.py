"""transformers' own batching on our requests: greedy, random weights, SDPA.

Many requests go through its continuous batching, which takes each request's own output length, with
our engine's KV tokens and tokens a step. One request alone goes through
`generate`, which is what its users call then. Its prefix cache is on and is not emptied between
workloads, where that is to its advantage: mixed1k begins with the requests of mixed.

Called by: engine_peers.py, in the child.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from headrace.bench.engine_log import RunLog
from headrace.bench.engine_peers import PeerJob
from headrace.bench.roofline import Request

#: seconds between two looks at whether the manager's thread still runs.
POLL_S = 1.0
#: no token has this id: what an end token is set to where there is to be none.
NO_TOKEN = -1
#: tokens in a block of its cache, by default.
BLOCK_TOKENS = 256


class TransformersPeer:
    """One model with random weights."""

    def __init__(self, job: PeerJob, dtype: torch.dtype) -> None:
        values = json.loads((Path(job.model_folder) / "config.json").read_text())
        values = {k: v for k, v in values.items() if k not in ("torch_dtype", "dtype")}
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with device:
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        self._model: Any = model.eval()
        self._model.generation_config.eos_token_id = None
        self._job = job
        self._manager: Any = None  # once started, it serves all workloads
        self._log: RunLog | None = None
        self.settings: dict[str, Any] = {
            "transformers": transformers.__version__,
            "attention": "sdpa",
            "dtype": str(dtype).removeprefix("torch."),
        }

    def warm_up(self, requests: list[Request]) -> None:
        self.measure(requests)

    def measure(self, requests: list[Request]) -> tuple[float, list[int]]:
        run = self._generate if len(requests) == 1 else self._batch
        self._log = run(requests)
        counts = np.bincount(self._log.requests, minlength=len(requests)).tolist()
        return self._log.ended_s - self._log.started_s, counts

    def trace(self, requests: list[Request]) -> RunLog | None:
        """Return what `measure` noted: both ways tell each token's time as they go."""
        del requests
        return self._log

    def _generate(self, requests: list[Request]) -> RunLog:
        ((prompt, num_output),) = requests
        streamer = _Clock()
        ids = torch.tensor([prompt], device=self._model.device)
        started_s = time.monotonic()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=num_output,
                max_new_tokens=num_output,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
            )
        times_s = np.array(streamer.times_s)
        return RunLog(started_s, float(times_s[-1]), np.zeros(len(times_s), np.int64), times_s)

    def _batch(self, requests: list[Request]) -> RunLog:
        # Its clock is perf_counter, on Linux the same as monotonic; where not, this is the shift.
        shift_s = time.monotonic() - time.perf_counter()
        if self._manager is None:
            self._manager = self._start_manager()
        started_s = time.monotonic()
        for index, (prompt, num_output) in enumerate(requests):
            self._manager.add_request(
                prompt,
                request_id=f"{started_s}-{index}",
                max_new_tokens=num_output,
                record_timestamps=True,
                eos_token_id=NO_TOKEN,
            )
        times_s = self._collect(len(requests))
        ended_s = time.monotonic()
        counts = [len(times) for times in times_s]
        found = np.repeat(np.arange(len(requests)), counts)
        return RunLog(started_s, ended_s, found, np.concatenate(times_s) + shift_s)

    def _start_manager(self) -> Any:
        job = self._job
        config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0, max_new_tokens=1
        )
        batching = ContinuousBatchingConfig(
            num_blocks=max(job.kv_tokens // BLOCK_TOKENS, 2),
            max_batch_tokens=job.max_step_tokens,
        )
        manager = self._model.init_continuous_batching(
            generation_config=config, continuous_batching_config=batching
        )
        manager.warmup()
        manager.start()
        return manager

    def _collect(self, num_requests: int) -> list[np.ndarray]:
        """Return each request's token times when all have ended."""
        times_s = [np.empty(0)] * num_requests
        num_left = num_requests
        while num_left:
            output = self._manager.get_result(timeout=POLL_S)
            if output is None:
                if not self._manager.is_running():
                    raise RuntimeError(f"its batching ended with {num_left} requests to go")
            elif output.is_finished():
                if output.error:
                    raise RuntimeError(f"its batching failed a request: {output.error}")
                times_s[int(output.request_id.split("-")[1])] = np.array(output.timestamps)
                num_left -= 1
        return times_s


class _Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when tokens are handed out; the first hand-out is the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.times_s += [time.monotonic()] * value.numel()
        self._has_prompt = True

    def end(self) -> None:
        """Do nothing: the last token's time was noted."""


def start(job: PeerJob) -> TransformersPeer:
    """Make the model."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return TransformersPeer(job, dtype)
