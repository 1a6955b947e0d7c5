"""Specs that no gateway wrote are refused before anything of them reaches an engine."""

import msgspec
import pytest

from headrace.contract import wire
from headrace.contract.errors import EngineRefused
from headrace.worker.spec_check import BOUNDS, check_spec

GOOD = wire.JobSpec(
    job="job_1",
    tenant="t",
    model="m",
    job_class=wire.JobClass.BATCH,
    priority=wire.Priority.LOW,
    sampling=wire.Sampling(),
    prompt="x",
)


def test_what_a_gateway_writes_passes():
    check_spec(GOOD, "job_1")
    for name, (low, high) in BOUNDS.items():
        whole = name in ("max_tokens", "top_k", "seed", "logprobs")
        for value in (int(low), int(high)) if whole else (float(low), float(high)):
            sampling = wire.Sampling(**{name: value})
            check_spec(msgspec.structs.replace(GOOD, sampling=sampling), "job_1")


def test_another_jobs_spec_is_no_message_for_this_one():
    with pytest.raises(wire.WireError, match="another job"):
        check_spec(GOOD, "job_2")


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -(1 << 62), 1 << 63])
def test_invariant_1_numbers_out_of_bounds_are_refused(name, value):
    spec = msgspec.structs.replace(GOOD, sampling=wire.Sampling(**{name: value}))
    with pytest.raises(EngineRefused, match=f"^{name} of this job"):
        check_spec(spec, "job_1")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": None},
        {"prompt_token_ids": (1,)},
        {"prompt": None, "prompt_token_ids": (1 << 31,)},
        {"prompt": None, "prompt_token_ids": (5, -1)},
        {"sampling": wire.Sampling(stop=("",))},
        {"sampling": wire.Sampling(logit_bias={-1: 0.0})},
        {"sampling": wire.Sampling(logit_bias={1: float("nan")})},
    ],
)
def test_other_things_that_fit_the_wire_only_are_refused(changes):
    with pytest.raises(EngineRefused):
        check_spec(msgspec.structs.replace(GOOD, **changes), "job_1")
