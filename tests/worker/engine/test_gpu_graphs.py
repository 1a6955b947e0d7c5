"""Buckets cover what is asked; a graph has its effect once a run, on a GPU and without one."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from headrace.worker.engine.gpu_graphs import Graphs, bucket_of, decode_buckets, row_buckets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mosts():
    """Return every small limit, those beside the steps of buckets, and some large ones."""
    drawn = np.random.default_rng().integers(300, 8193, 40).tolist()
    return [*range(1, 300), 511, 512, 513, 1023, 1024, 1025, 8191, 8192, *drawn]


@pytest.mark.parametrize("buckets_of", [decode_buckets, row_buckets])
def test_buckets_rise_and_end_with_the_most(buckets_of):
    for most in mosts():
        buckets = buckets_of(most)
        assert buckets[-1] == most
        assert buckets[0] >= 1
        assert all(a < b for a, b in pairwise(buckets)), buckets


@pytest.mark.parametrize(("buckets_of", "least"), [(decode_buckets, 1), (row_buckets, 16)])
def test_a_bucket_is_the_smallest_that_holds_the_rows(buckets_of, least):
    for most in (1, 7, 16, 100, 1024, 8192):
        buckets = buckets_of(most)
        found = [bucket_of(buckets, num_rows) for num_rows in range(1, most + 1)]
        assert found == sorted(found)
        for num_rows, bucket in enumerate(found, 1):
            assert num_rows <= bucket <= max(least, 2 * num_rows), "more than half is padding"
            assert not any(num_rows <= other < bucket for other in buckets)


def test_more_rows_than_the_most_have_no_bucket():
    with pytest.raises(IndexError):
        bucket_of(decode_buckets(8), 9)


@pytest.mark.gpu
def test_a_run_has_its_effect_each_time_and_a_capture_none():
    is_cuda = DEVICE.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream()) if is_cuda else nullcontext():
        graphs = Graphs(DEVICE)
        total, launches = torch.zeros(2, device=DEVICE), []

        def launch(index):
            launches.append(index)
            total[index] += 1

        graphs.prepare("first", lambda: launch(0))
        assert total.tolist() == [0, 0]
        for _ in range(3):
            graphs.run("first", lambda: launch(0))
            graphs.run("second", lambda: launch(1))
        assert total.tolist() == [3, 3]
    # Captured once each, or launched whenever it runs.
    assert launches == ([0, 1] if is_cuda else [0, 1] * 3)
    assert len(graphs) == (2 if is_cuda else 0)


@pytest.mark.gpu
def test_a_launch_that_fails_is_told_and_leaves_no_graph():
    is_cuda = DEVICE.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream()) if is_cuda else nullcontext():
        graphs, total = Graphs(DEVICE), torch.zeros(1, device=DEVICE)

        def fail():
            total.mul_(0)  # of an empty capture torch warns
            raise ValueError("no such shape")

        with pytest.raises(ValueError, match="no such shape"):
            graphs.run("key", fail)
        assert len(graphs) == 0
        graphs.run("key", lambda: total.add_(1))
        assert total.item() == 1
