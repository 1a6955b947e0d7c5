"""The workloads as every engine gets them: same token ids, by name, seed and scale.

A scale below 1 keeps each workload's form and shrinks the number of requests and all their lengths,
so that the whole benchmark can be tried where nothing is fast.

Called by: engine.py and the peers' processes, which make the same requests anew.
"""

from __future__ import annotations

from headrace.bench import workload
from headrace.bench.roofline import Request

WORKLOADS = ("single", "mixed", "mixed1k", "prefill", "shared")
#: seed of the warm-up's tokens: others than those measured, or the prefix cache would know them.
WARM_UP_SEED = 1000
#: lengths of a warm-up request at most: enough to visit every batch size and bucket.
WARM_UP_PROMPT, WARM_UP_OUTPUT = 128, 32


def make_requests(name: str, vocab_size: int, scale: float = 1.0, seed: int = 0) -> list[Request]:
    """Return a workload's requests, shrunk by `scale`."""
    requests = workload.requests(name, vocab_size, seed)
    if scale == 1.0:
        return requests
    num_requests = max(1, round(len(requests) * scale))
    return [
        (prompt[: max(2, round(len(prompt) * scale))], max(2, round(num_output * scale)))
        for prompt, num_output in requests[:num_requests]
    ]


def make_warm_up(name: str, vocab_size: int, scale: float = 1.0) -> list[Request]:
    """Return as many requests as the workload has, short and of other tokens."""
    return [
        (prompt[:WARM_UP_PROMPT], min(num_output, WARM_UP_OUTPUT))
        for prompt, num_output in make_requests(name, vocab_size, scale, WARM_UP_SEED)
    ]
