"""One example of each wire message, with every field set; their bytes lie beside this file.

`python -m headrace.tests.golden.messages` writes the files anew after a change that is meant.
"""

from __future__ import annotations

from pathlib import Path

from headrace.contract import wire

FOLDER = Path(__file__).resolve().parent

_JOB = "job_0190a5a3c0de7abc8123456789abcdef"

MESSAGES: dict[str, wire.Message] = {
    "job": wire.JobSpec(
        job=_JOB,
        tenant="tenant_0190a5a3c0de7abc8123456789abcdef",
        model="smollm2-135m-instruct",
        job_class=wire.JobClass.INTERACTIVE,
        priority=wire.Priority.HIGH,
        sampling=wire.Sampling(
            max_tokens=64,
            temperature=0.5,
            top_p=0.75,
            top_k=40,
            min_p=0.125,
            seed=2**63 - 1,
            stop=("\n\n", "é"),
            presence_penalty=0.25,
            frequency_penalty=-0.25,
            repetition_penalty=1.5,
            logit_bias={7: -100.0},
            logprobs=2,
        ),
        messages=({"role": "user", "content": "What is the capital of France?"},),
        deadline_ms=1_720_000_000_000,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ),
    "job_prompt": wire.JobSpec(
        job=_JOB,
        tenant="t",
        model="m",
        job_class=wire.JobClass.BATCH,
        priority=wire.Priority.LOW,
        sampling=wire.Sampling(),
        prompt="Hé",
    ),
    "job_token_ids": wire.JobSpec(
        job=_JOB,
        tenant="t",
        model="m",
        job_class=wire.JobClass.BATCH,
        priority=wire.Priority.NORMAL,
        sampling=wire.Sampling(),
        prompt_token_ids=(1, 300, 70_000),
    ),
    "tokens": wire.TokenChunk(
        job=_JOB,
        attempt=2,
        gen=1,
        first=64,
        ids=(5, 300, 70_000),
        text="Hé!",
        ends=(1, 2, 3),
        logprobs=(
            wire.TokenLogprobs(-0.5, ((5, -0.5), (9, -1.25))),
            wire.TokenLogprobs(-1.0),
            wire.TokenLogprobs(0.0),
        ),
    ),
    "started": wire.JobStarted(job=_JOB, attempt=2, gen=1, next=64, worker="host-1a2b"),
    "end": wire.JobEnd(
        job=_JOB,
        gen=1,
        next=67,
        status=wire.JobStatus.FAILED,
        finish_reason=wire.FinishReason.ERROR,
        prompt_tokens=12,
        cached_tokens=4,
        error_code="engine_refused",
        error_text="the prompt does not fit",
    ),
    "beat": wire.WorkerBeat(
        worker="host-1a2b",
        model="smollm2-135m-instruct",
        host="host",
        pid=4242,
        state="ready",
        started_ms=1_720_000_000_000,
        step=1_000,
        step_age_ms=15,
        num_running=3,
        num_waiting=1,
        free_blocks=100,
        total_blocks=128,
        engine_restarts=1,
        version="0.1.0",
        engine_pid=4243,
        engine_died_ms=1_720_000_000_500,
        step_timeout_ms=20_000,
        gpus=(
            wire.GpuFigures(
                name="NVIDIA H200",
                utilization=0.75,
                memory_used_bytes=100_000_000_000,
                memory_total_bytes=150_000_000_000,
                power_w=512.5,
                temperature_c=61.0,
            ),
        ),
        cached_blocks=20,
        max_num_seqs=64,
        num_held=5,
        num_preempted=2,
        prompt_tokens_total=4_000,
        prefix_hit_tokens_total=1_000,
        tokens_total=70_000,
        tokens_per_s=812.5,
        step_us=3_500,
        batch=2.75,
        latencies={"ttft_ms": (0, 1, 2), "itl_ms": (300, 0, 70_000), "e2e_ms": (0, 0, 3)},
    ),
}

if __name__ == "__main__":
    for name, message in MESSAGES.items():
        (FOLDER / f"{name}.msgpack").write_bytes(wire.encode(message))
