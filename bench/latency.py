"""Time from POST to the first token at the subscriber, with an engine that computes nothing.

    python -m bench.latency [--jobs 200]

Starts a fleet of its own with the stub engine, whose steps take STEP_MS; the rest is what gateway,
Postgres, Redis and courier add. One job after another over one kept-alive connection: POST, open
the event stream, first token event, end. Prints p50 and p99 of each part, ms.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import httpx

from headrace.bench.own_fleet import own_fleet

#: Milliseconds of an engine step: as an 8B model's on a GPU.
STEP_MS = 5


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] * 1000


def one_job(client: httpx.Client) -> dict[str, float]:
    """Run one job; return seconds from its POST to each moment."""
    start = time.perf_counter()
    body = {"model": "smollm2-135m-instruct", "prompt": "p", "sampling": {"max_tokens": 16}}
    response = client.post("/v1/jobs", json=body)
    response.raise_for_status()
    moments = {"accepted": time.perf_counter() - start}
    with client.stream("GET", response.headers["Location"] + "/events") as stream:
        for line in stream.iter_lines():
            if line == "event: token":
                moments.setdefault("first token", time.perf_counter() - start)
            elif line == "event: succeeded":
                moments["end"] = time.perf_counter() - start
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    options = parser.parse_args()
    settings = {"HEADRACE_RUNNER": "stub", "HEADRACE_STUB_STEP_MS": str(STEP_MS)}
    with tempfile.TemporaryDirectory() as folder, own_fleet(Path(folder), **settings) as fleet:
        headers = {"Authorization": f"Bearer {fleet['api_key']}"}
        with httpx.Client(base_url=fleet["api_url"], headers=headers, timeout=60) as client:
            one_job(client)
            found = [one_job(client) for _ in range(options.jobs)]
    for name in ("accepted", "first token", "end"):
        values = [moments[name] for moments in found]
        p50, p99 = percentile(values, 0.5), percentile(values, 0.99)
        print(f"{name:12s} p50 {p50:6.1f} ms  p99 {p99:6.1f} ms")
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
