"""What a flush costs the courier: N jobs' tokens appended to their logs and published, one command.

    python -m bench.publish [--jobs 64] [--shards 1] [--rounds 400]

Starts an embedded Valkey of its own. Prints wall and CPU time a flush on the client's side, beside
the same tokens sent as one PUBLISH each in one pipeline (the reference, in the same run).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from headrace.contract import redis_client, wire
from headrace.contract.tokens import Append, TokenLog
from headrace.fleet.valkey import start_valkey

MODEL = "bench"


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(name: str, rounds: int, act: Callable[[int], None]) -> float:
    """Print the median wall time and the mean CPU time of a round, ms; return the median."""
    act(0)
    walls: list[float] = []
    cpu = cpu_s()
    for number in range(1, rounds + 1):
        start = time.perf_counter()
        act(number)
        walls.append(time.perf_counter() - start)
    cpu = (cpu_s() - cpu) / rounds
    median = statistics.median(walls) * 1000
    p99 = sorted(walls)[int(len(walls) * 0.99)] * 1000
    print(
        f"{name:34s} wall p50 {median:6.3f} ms  p99 {p99:6.3f} ms  client CPU {cpu * 1e3:6.3f} ms"
    )
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--shards", type=int, default=1, help="gateways that watch every job")
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_valkey(Path(folder)) as server:
        client = redis_client.connect(server.url)
        tokens = TokenLog(client)
        jobs = [f"job_{number:032x}" for number in range(options.jobs)]
        for job in jobs:
            tokens.fence(MODEL, job, 1, "bench")
        for shard in range(options.shards):
            tokens.subscribe(f"shard{shard}", [(MODEL, job) for job in jobs])

        def chunk(job: str, number: int) -> wire.TokenChunk:
            return wire.TokenChunk(
                job=job, attempt=1, gen=0, first=number, ids=(1234,), text=" token", ends=(6,)
            )

        def flush(number: int) -> None:
            states = tokens.append(MODEL, [("tenant", chunk(job, number)) for job in jobs])
            if any(state is not Append.LOGGED for state in states):
                raise RuntimeError("the log refused a chunk")

        def one_by_one(number: int) -> None:
            pipe = client.pipeline(transaction=False)
            for job in jobs:
                pipe.publish(job, wire.encode(chunk(job, number)))
            pipe.execute()

        print(f"{options.jobs} jobs, {options.shards} shards, {options.rounds} rounds")
        ours = measure("fenced append + publish, 1 command", options.rounds, flush)
        theirs = measure("PUBLISH a token, 1 pipeline, no log", options.rounds, one_by_one)
        print(f"ratio {ours / theirs:.2f} of the pipeline's time")


if __name__ == "__main__":
    main()
