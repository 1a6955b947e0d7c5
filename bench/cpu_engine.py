"""The CPU engine against transformers' generate, and the socketpair against a shared-memory ring.

    python -m bench.cpu_engine [--model FOLDER] [--threads N] [--dtype bfloat16] [--batch 1 16]
    python -m bench.cpu_engine --frames

Same process, weights, threads and dtype on both sides, greedy, fixed output length, no stop token.
The two take turns and the best of each counts: on a shared machine the slowest runs measure the
others. Without a folder the weights are random in SmolLM2-135M's shape, which costs the same to
compute. Run from the repository root, with PYTHONPATH=.imports unless headrace is installed."""

from __future__ import annotations

import argparse
import mmap
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from headrace.worker import frames
from headrace.worker.engine.architecture import Architecture
from headrace.worker.engine.cpu_runner import CpuRunner
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.outcome import take_results
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.weights import load_weights
from headrace.worker.frames import Admit, SamplingParams

BLOCK_SIZE = 64
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def generate_ours(
    runner: CpuRunner, prompts: np.ndarray, num_output: int
) -> tuple[list[list[int]], float]:
    """Run all prompts through scheduler and runner; return (outputs, seconds)."""
    pool = KVPool(runner.num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(pool, max_num_seqs=64, max_step_tokens=2048)
    params = SamplingParams(temperature=0.0)
    seqs = [
        Sequence.from_admit(Admit(i, p.astype("<i4").tobytes(), b"", params, num_output), i)
        for i, p in enumerate(prompts)
    ]
    started_s = time.perf_counter()
    for seq in seqs:
        scheduler.add(seq)
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None, "a CPU has no values in flight"
        batch = scheduler.submit(plan)
        runner.submit(batch)
        outcome = take_results(batch, runner.collect())
        scheduler.settle(outcome.sound)
        for slot, _ in outcome.ended:
            scheduler.retire(scheduler.table.sequence(slot), is_finished=True)
    return [seq.output.tolist() for seq in seqs], time.perf_counter() - started_s


def generate_theirs(
    model: transformers.PreTrainedModel, prompts: np.ndarray, num_output: int
) -> tuple[list[list[int]], float]:
    """Run all prompts as one batch of equal lengths; return (outputs, seconds)."""
    ids = torch.from_numpy(prompts)
    started_s = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num_output,
            max_new_tokens=num_output,
            do_sample=False,
            pad_token_id=0,
        )
    elapsed_s = time.perf_counter() - started_s
    return found[:, ids.shape[1] :].tolist(), elapsed_s


def compare(options: argparse.Namespace) -> None:
    """Print tokens/s of both at each batch size, and their ratios."""
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    folder = Path(options.model) if options.model else _random_smollm2(dtype)
    arch = Architecture.from_folder(folder)
    runner = CpuRunner(arch, load_weights(folder, arch, dtype), BLOCK_SIZE, num_blocks=256)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    random = np.random.default_rng(0)
    best: dict[tuple[str, int], float] = {}
    for num_seqs in options.batch:
        prompts = random.integers(10, arch.vocab_size, (num_seqs, options.prompt))
        equal = 0
        for _ in range(options.runs):
            ours, ours_s = generate_ours(runner, prompts, options.output)
            theirs, theirs_s = generate_theirs(model, prompts, options.output)
            equal = int((np.array(ours) == np.array(theirs)).sum())
            for name, elapsed_s in (("ours", ours_s), ("theirs", theirs_s)):
                key = (name, num_seqs)
                best[key] = max(best.get(key, 0), num_seqs * options.output / elapsed_s)
        a, b = best["ours", num_seqs], best["theirs", num_seqs]
        print(
            f"B={num_seqs:<3} ours {a:7.1f} tok/s   transformers {b:7.1f} tok/s   ratio {a / b:.2f}"
            f"   equal greedy tokens {equal}/{num_seqs * options.output}",
            flush=True,
        )
    if 1 in options.batch:
        for num_seqs in options.batch:
            ratio = best["ours", num_seqs] / best["ours", 1]
            print(f"ours at B={num_seqs} / ours at B=1: {ratio:.2f}")


def _random_smollm2(dtype: torch.dtype) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="smollm2-shape-"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMOLLM2)
    model: Any = transformers.LlamaForCausalLM(config)  # its annotation of `to` is wrong
    model.to(dtype).save_pretrained(folder)
    return folder


class Ring:
    """One writer, one reader, in shared memory: what the socketpair is compared with."""

    SIZE = 1 << 20

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE + 16)
        self._head = np.frombuffer(self._memory, np.int64, 2)  # written, read
        self._data = memoryview(self._memory)[16:]

    def send(self, frame: bytes) -> None:
        written = int(self._head[0])
        while written + len(frame) + 4 - int(self._head[1]) > self.SIZE:
            os.sched_yield()
        for part in (struct.pack("<I", len(frame)), frame):
            at = written % self.SIZE
            cut = min(len(part), self.SIZE - at)
            self._data[at : at + cut] = part[:cut]
            self._data[: len(part) - cut] = part[cut:]
            written += len(part)
        self._head[0] = written

    def receive(self) -> bytes:
        read = int(self._head[1])
        while int(self._head[0]) == read:
            os.sched_yield()
        length = struct.unpack("<I", self._copy(read, 4))[0]
        frame = self._copy(read + 4, length)
        self._head[1] = read + 4 + length
        return frame

    def _copy(self, start: int, length: int) -> bytes:
        at = start % self.SIZE
        cut = min(length, self.SIZE - at)
        return bytes(self._data[at : at + cut]) + bytes(self._data[: length - cut])


def measure_frames() -> None:
    """Print what a frame costs each side, packed and unpacked, over both transports."""
    for num_entries in (64, 1024):
        entries = np.zeros(num_entries, frames.ENTRY)
        entries["num_logprobs"] = -1
        frame = frames.pack_step(frames.StepStats(), entries)
        pack_us = _best_us(partial(frames.pack_step, frames.StepStats(), entries))
        unpack_us = _best_us(partial(frames.unpack_step, memoryview(frame)[5:]))
        socket_us, ring_us = _over_socket_us(frame), _over_ring_us(frame)
        print(
            f"{num_entries:5} entries, {len(frame):6} bytes: pack {pack_us:.1f} us, unpack "
            f"{unpack_us:.1f} us; send and receive in one process: socketpair {socket_us:.1f} us, "
            f"ring {ring_us:.1f} us; to another process and an answer back: socketpair "
            f"{_round_trip_us(frame, with_ring=False):.1f} us, ring "
            f"{_round_trip_us(frame, with_ring=True):.1f} us"
        )


def _best_us(call: Callable[[], object], num_calls: int = 2000) -> float:
    best_s = float("inf")
    for _ in range(5):
        started_s = time.perf_counter()
        for _ in range(num_calls):
            call()
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s / num_calls * 1e6


def _over_socket_us(frame: bytes) -> float:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer, reader = frames.FrameWriter(ours), frames.FrameReader()

        def once() -> None:
            writer.send(frame)
            reader.receive(theirs)
            assert len(list(reader.frames())) == 1

        return _best_us(once)


def _over_ring_us(frame: bytes) -> float:
    ring = Ring()

    def once() -> None:
        ring.send(frame)
        assert len(ring.receive()) == len(frame)

    return _best_us(once)


def _round_trip_us(frame: bytes, *, with_ring: bool) -> float:
    """A frame to a forked process that answers each with a byte over a socket."""
    ours, theirs = socket.socketpair()
    ring, reader = Ring(), frames.FrameReader()
    child = os.fork()
    if child == 0:
        ours.close()
        while with_ring or reader.receive(theirs):
            if with_ring:
                if len(ring.receive()) == 1:
                    break
                theirs.send(b"x")
            else:
                theirs.setblocking(True)
                for _ in reader.frames():
                    theirs.send(b"x")
                if not theirs.recv(1, socket.MSG_PEEK):
                    break
        os._exit(0)
    theirs.close()
    writer = frames.FrameWriter(ours)

    def once() -> None:
        if with_ring:
            ring.send(frame)
        else:
            writer.send(frame)
        ours.recv(1)

    best_us = _best_us(once, 500)
    if with_ring:
        ring.send(b"!")
    ours.close()
    os.waitpid(child, 0)
    return best_us


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.cpu_engine")
    parser.add_argument("--frames", action="store_true")
    parser.add_argument("--model", help="a transformers folder; random weights without one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=48, help="tokens")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.frames:
        measure_frames()
    else:
        compare(options)


if __name__ == "__main__":
    main()
