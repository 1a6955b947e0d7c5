"""The workloads are those of the reference figures, to the token."""

import hashlib
import json

import pytest

from headrace.bench.engine_requests import WORKLOADS, make_requests, make_warm_up

#: requests, prompt tokens, output tokens, and the first digits of SHA-256 of all of it as JSON.
PINNED = {
    "single": (1, 128, 512, "00ac462a2790"),
    "mixed": (256, 143317, 141839, "7bd6e5875c97"),
    "mixed1k": (1024, 579006, 587982, "bc7e04ce8c6b"),
    "prefill": (512, 524288, 65536, "8ec58a7379e5"),
    "shared": (512, 1081344, 65536, "487d060ef888"),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_what_it_was(name):
    requests = make_requests(name, 49152)
    digest = hashlib.sha256(json.dumps(requests).encode()).hexdigest()[:12]
    num_prompt = sum(len(prompt) for prompt, _ in requests)
    num_output = sum(num_output for _, num_output in requests)
    assert (len(requests), num_prompt, num_output, digest) == PINNED[name]


def test_a_scale_keeps_the_form():
    small = make_requests("shared", 320, scale=0.02)
    whole = make_requests("shared", 320)
    assert len(small) == 10
    assert {(len(prompt), num_output) for prompt, num_output in small} == {(42, 3)}
    assert small[0][0] == whole[0][0][:42]
    assert small[0][0][:40] == small[8][0][:40]  # the same of eight prefixes
    assert [out for _, out in make_requests("single", 320, scale=0.001)] == [2]


def test_a_warm_up_is_as_wide_and_short_and_of_other_tokens():
    warm_up, measured = make_warm_up("mixed", 320), make_requests("mixed", 320)
    assert len(warm_up) == len(measured)
    assert max(len(prompt) for prompt, _ in warm_up) == 128
    assert max(num_output for _, num_output in warm_up) == 32
    first = {tuple(prompt[:64]) for prompt, _ in measured}
    assert not first & {tuple(prompt[:64]) for prompt, _ in warm_up}
