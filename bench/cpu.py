"""The whole path on a CPU against `transformers` `generate`, in one run.

    python -m bench.cpu [--dtype float32] [--threads 1] [--tokens 96] [--jobs 16] [--rounds 3]

Starts a fleet of its own (embedded servers, gateway, worker, tasks) with the embedded model, and
loads the same folder with `transformers` in this process: same weights, dtype and threads. Each
round measures, one after the other so that neither disturbs the other:

- reference: `generate`, greedy, one prompt after another;
- single: the same prompts as jobs over HTTP, one at a time;
- concurrent: `--jobs` jobs over HTTP at once.

The end token is kept out on both sides, so every answer has `--tokens` tokens. Prints tokens/s and
the ratios to the reference (wanted: single >= 1.0, concurrent >= 3.0), each the best of the rounds,
as other work may share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.bench.own_fleet import own_fleet

TOPICS = ("a lighthouse", "a river", "a clockmaker", "an orchard", "a ferry", "a storm", "a violin")


def prompts(count: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": "user", "content": f"Story {n}: tell me about {TOPICS[n % len(TOPICS)]}."}]
        for n in range(count)
    ]


class Reference:
    """`transformers` on the same folder."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.end_ids = [self._tokenizer.eos_token_id]

    def run(self, conversations: list[list[dict[str, str]]], num_tokens: int) -> float:
        """Generate one answer after another; return tokens a second."""
        start, made = time.perf_counter(), 0
        for messages in conversations:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            with torch.inference_mode():
                out = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=num_tokens,
                    min_new_tokens=num_tokens,
                    do_sample=False,
                    pad_token_id=self.end_ids[0],
                )
            made += out.shape[1] - ids.shape[1]
        return made / (time.perf_counter() - start)


class Api:
    """The fleet over HTTP."""

    def __init__(self, url: str, key: str, end_ids: list[int]) -> None:
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600
        )
        self._bias = {str(token): -100 for token in end_ids}

    def answer(self, messages: list[dict[str, str]], num_tokens: int) -> int:
        """Submit a job, wait for its end, and return how many tokens it has."""
        sampling = {"temperature": 0, "max_tokens": num_tokens, "logit_bias": self._bias}
        body = {"model": "smollm2-135m-instruct", "messages": messages, "sampling": sampling}
        response = self._client.post("/v1/jobs", json=body, headers={"Prefer": "wait=60"})
        response.raise_for_status()
        job = response.json()
        while job["status"] in ("queued", "running"):
            time.sleep(0.05)
            job = self._client.get(f"/v1/jobs/{job['id']}").json()
        if job["status"] != "succeeded":
            raise RuntimeError(f"job {job['id']} ended as {job['status']}: {job['error']}")
        return job["usage"]["completion_tokens"]

    def run(
        self, conversations: list[list[dict[str, str]]], num_tokens: int, *, at_once: int
    ) -> float:
        """Answer all, `at_once` at a time; return tokens a second."""
        start = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            made = sum(pool.map(lambda messages: self.answer(messages, num_tokens), conversations))
        return made / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--jobs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {
        "HEADRACE_DTYPE": options.dtype,
        "HEADRACE_ENGINE_THREADS": str(options.threads),
        "HEADRACE_KV_CACHE_MB": "2048",
    }
    with tempfile.TemporaryDirectory() as folder, own_fleet(Path(folder), **settings) as fleet:
        reference = Reference(Path(folder) / "models/smollm2-135m-instruct", options.dtype)
        api = Api(fleet["api_url"], fleet["api_key"], reference.end_ids)
        best = {"reference": 0.0, "single": 0.0, "concurrent": 0.0}
        few, many = prompts(2), prompts(options.jobs)
        for _ in range(options.rounds):
            best["reference"] = max(best["reference"], reference.run(few, options.tokens))
            best["single"] = max(best["single"], api.run(few, options.tokens, at_once=1))
            rate = api.run(many, options.tokens, at_once=options.jobs)
            best["concurrent"] = max(best["concurrent"], rate)
    for name, rate in best.items():
        print(f"{name:12s} {rate:8.1f} tokens/s  x{rate / best['reference']:.2f}")
    print("ROW", json.dumps({**vars(options), **best, "load": os.getloadavg()}))


if __name__ == "__main__":
    main()
