"""Host microseconds a step with steps in flight: what Python costs beside the device.

    python -m bench.host_step [--seqs 64 256 1024] [--steps 2000] [--profile]

The whole loop runs against the stub at depth 2 with steps that take no time: receive commands,
plan, submit, collect, one frame a step. Two workloads: a steady batch of decodes, and one in which
sequences end and start all the time. `host` is StepStats.host_us (plan, submit, collect and frame,
as the engine counts it, the stub's own work included), `runner` the stub's share of it, `cpu` the
processor time of a whole turn, commands included: on a busy machine it is the one to trust. Medians
and 99th percentiles. Run from the repository root, with PYTHONPATH=.imports unless headrace is
installed."""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import socket
import time

import numpy as np

from headrace.worker import frames
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.batch import Batch
from headrace.worker.engine.loop import Engine
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.stub import StubRunner
from headrace.worker.frames import Admit, EngineConfig, SamplingParams

BLOCK_SIZE = 64


class TimedStub(StubRunner):
    """A stub that counts the time it takes itself."""

    spent_ns = 0

    def submit(self, batch: Batch) -> None:
        started_ns = time.perf_counter_ns()
        super().submit(batch)
        self.spent_ns += time.perf_counter_ns() - started_ns

    def collect(self) -> Sampled:
        started_ns = time.perf_counter_ns()
        sampled = super().collect()
        self.spent_ns += time.perf_counter_ns() - started_ns
        return sampled


def build(num_seqs: int) -> tuple[Engine, TimedStub, socket.socket]:
    """Return an engine with room for all, its runner, and the courier's end of its socket."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    }
    arch = Architecture.from_config(config)
    runner = TimedStub(arch, BLOCK_SIZE, num_blocks=num_seqs * 96, step_s=0.0, depth=2)
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    limits = EngineConfig("", max_num_seqs=num_seqs, max_step_tokens=max(8192, num_seqs))
    return Engine(runner, limits, theirs), runner, ours


def admissions(num_seqs: int, *, has_churn: bool) -> list[Admit]:
    """Prompts of 200 tokens; outputs of 4,000, or of 100 to 400 and many more of them."""
    random = np.random.default_rng(0)
    num_asked = num_seqs * 12 if has_churn else num_seqs
    return [
        Admit(
            seq_id=i,
            prompt=random.integers(300, 150_000, 200).astype("<i4").tobytes(),
            output=b"",
            params=SamplingParams(seed=i),
            max_tokens=int(random.integers(100, 400)) if has_churn else 4000,
            stop_token_ids=[2],
        )
        for i in range(num_asked)
    ]


def measure(num_seqs: int, num_steps: int, *, has_churn: bool, profile: bool) -> str:
    """Run steps and return a line of figures."""
    engine, runner, courier = build(num_seqs)
    reader, asked = frames.FrameReader(), admissions(num_seqs, has_churn=has_churn)
    asked.reverse()
    num_left = 0
    rows: list[tuple[float, float, float]] = []  # us: host, runner, cpu
    profiler = cProfile.Profile()
    gc.collect()
    gc.freeze()
    for at in range(num_steps + 50):
        while asked and num_left < num_seqs:  # as the courier does: what ended is replaced
            courier.sendall(frames.pack_command(asked.pop()))
            num_left += 1
        started_ns, runner.spent_ns = time.thread_time_ns(), 0
        if profile and at >= 50:
            profiler.enable()
        engine.receive()
        engine.step()
        profiler.disable()
        cpu_us = (time.thread_time_ns() - started_ns) / 1e3
        reader.receive(courier)
        for frame in reader.frames():
            step = frames.unpack(*frame)
            assert isinstance(step, frames.StepFrame)
            num_left -= int((step.entries["reason"] > 0).sum())
            if at >= 50:
                rows.append((step.stats.host_us, runner.spent_ns / 1e3, cpu_us))
        if not engine.has_work:
            break
    courier.close()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(22)
    host, stub, cpu = np.percentile(np.array(rows), (50, 99), axis=0).T
    name = "starts and ends" if has_churn else "steady"
    return (
        f"{num_seqs:5} running, {name:15}: host {host[0]:5.0f} us a step (99th {host[1]:5.0f}), "
        f"of it runner {stub[0]:4.0f} ({stub[1]:4.0f}); cpu {cpu[0]:5.0f} ({cpu[1]:5.0f}); "
        f"{len(rows)} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.host_step")
    parser.add_argument("--seqs", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--profile", action="store_true", help="and say where the time goes")
    options = parser.parse_args()
    for has_churn in (False, True):
        for num_seqs in options.seqs:
            line = measure(num_seqs, options.steps, has_churn=has_churn, profile=options.profile)
            print(line, flush=True)


if __name__ == "__main__":
    main()
