"""Latency histograms: bounds, differences across restarts, quantiles against the sorted values."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from headrace.contract import latency_bounds as lb

latencies = st.lists(st.floats(min_value=0.01, max_value=500_000), min_size=1, max_size=200)


def counted(values):
    counts = lb.no_counts()
    for value in values:
        counts[lb.bucket_of(value)] += 1
    return counts


def test_bounds_rise_evenly_from_a_millisecond_to_ten_minutes():
    assert lb.BOUNDS_MS[0] == 1
    assert lb.BOUNDS_MS[-1] == 600_000
    ratios = [b / a for a, b in zip(lb.BOUNDS_MS, lb.BOUNDS_MS[1:], strict=False)]
    assert 1.5 < min(ratios) <= max(ratios) < 1.6
    assert len(lb.no_counts()) == lb.NUM_BUCKETS == len(lb.BOUNDS_MS) + 1


def test_a_bound_belongs_to_its_own_bucket_and_the_last_is_open():
    assert lb.bucket_of(0) == lb.bucket_of(1) == 0
    assert lb.bucket_of(1.01) == 1
    assert lb.bucket_of(600_000) == lb.NUM_BUCKETS - 2
    assert lb.bucket_of(600_001) == lb.NUM_BUCKETS - 1


@given(latencies, latencies)
def test_invariant_1_a_difference_is_what_came_between(first, later):
    older, newer = counted(first), counted(first + later)
    assert lb.difference(newer, older) == counted(later)
    assert lb.total([counted(first), counted(later)]) == newer


def test_invariant_2_a_worker_that_began_anew_counts_whole():
    assert lb.difference(counted([5.0]), counted([5.0, 7.0, 900.0])) == counted([5.0])
    assert lb.difference(counted([5.0]), None) == counted([5.0])
    assert lb.difference(counted([5.0]), [1, 2]) == counted([5.0])


@given(latencies, st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values, share):
    true = sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
    found = lb.quantile(counted(values), share)
    number = lb.bucket_of(true)
    least = lb.BOUNDS_MS[number - 1] if number else 0
    assert least <= found <= lb.BOUNDS_MS[number]


def test_nothing_counted_has_no_quantile_and_what_is_above_all_is_the_last_bound():
    assert lb.quantile(lb.no_counts(), 0.5) is None
    assert lb.p50_p99(lb.no_counts()) is None
    assert lb.total([]) == lb.no_counts()
    assert lb.quantile(counted([1e9]), 0.5) == 600_000


def test_figures_keep_three_digits():
    assert lb._rounded(1234.5) == 1230
    assert lb._rounded(12.345) == 12.3
    assert lb._rounded(0.12345) == 0.123
    found = lb.p50_p99(counted([100.0] * 100))
    assert found is not None
    assert 64 < found["p50"] < found["p99"] < 120
