"""The counts that travel in beats: which bucket, how many, and of what."""

import time

import numpy as np

from headrace.contract import latency_bounds
from headrace.contract.ids import new_id
from headrace.contract.latency_bounds import BOUNDS_MS, bucket_of
from headrace.worker.frames import ENTRY, StepFrame, StepStats
from headrace.worker.latencies import Latencies


def filled(counts: tuple[int, ...]) -> dict[int, int]:
    return {number: count for number, count in enumerate(counts) if count}


def test_each_kind_has_all_buckets_and_begins_empty():
    counts = Latencies().counts()
    assert set(counts) == set(latency_bounds.KINDS)
    assert {len(each) for each in counts.values()} == {latency_bounds.NUM_BUCKETS}
    assert {sum(each) for each in counts.values()} == {0}


def frame(step_us: int, *entries: tuple[int, int]) -> StepFrame:
    """Make a frame of (token, index) entries."""
    rows = np.zeros(len(entries), ENTRY)
    for row, (token, index) in zip(rows, entries, strict=True):
        row["token"], row["index"] = token, index
    return StepFrame(StepStats(step_us=step_us), rows, [])


def test_a_steps_time_counts_once_for_each_token_that_followed_another():
    latencies = Latencies()
    latencies.stepped(frame(12_500, *((5, index) for index in range(1, 65))))
    latencies.stepped(frame(900_000, (5, 0)))  # a job's first: nobody waited since another
    latencies.stepped(frame(12_400, (5, 1), (5, 9), (-1, 4), (5, 0)))  # -1: an end without one
    latencies.stepped(frame(100))
    assert filled(latencies.counts()["itl_ms"]) == {bucket_of(12.5): 66}


def test_a_jobs_age_is_told_by_its_id():
    latencies = Latencies()
    made_s = time.time() - 5.0
    job = f"job_{int(made_s * 1000):012x}" + "0" * 20
    latencies.first_token(job)
    latencies.succeeded(job)
    for kind in ("ttft_ms", "e2e_ms"):
        ((bucket, count),) = filled(latencies.counts()[kind]).items()
        assert count == 1
        assert BOUNDS_MS[bucket - 1] < 60_000
        assert BOUNDS_MS[bucket] >= 5_000


def test_a_job_from_a_clock_that_is_ahead_took_no_time():
    latencies = Latencies()
    latencies.first_token(f"job_{int(time.time() * 1000) + 60_000:012x}" + "0" * 20)
    latencies.first_token(new_id("job"))
    assert latencies.counts()["ttft_ms"][0] >= 1
