"""Latencies and rates from runs made by hand."""

import numpy as np
import pytest

from headrace.bench.engine_log import RunError, RunLog, figures, latencies_ms

REQUESTS = [([1], 3), ([2], 2)]


def log(requests=(0, 1, 0, 1, 0), times_s=(10.1, 10.2, 10.2, 10.5, 10.3), **fields):
    return RunLog(10.0, 10.5, np.array(requests), np.array(times_s), **fields)


def test_gaps_are_within_a_request_and_first_tokens_count_from_the_start():
    gaps_ms, first_ms = latencies_ms(log())
    assert gaps_ms == pytest.approx([100, 100, 300])
    assert first_ms == pytest.approx([100, 200])


def test_tokens_of_one_frame_have_no_gap():
    gaps_ms, first_ms = latencies_ms(log((0, 0, 0), (10.4, 10.4, 10.4)))
    assert gaps_ms == pytest.approx([0, 0])
    assert first_ms == pytest.approx([400])


def test_figures_of_a_run():
    steps = np.array([100, 300, 200])
    told = {"step_us": steps, "host_us": steps / 2, "submitted_s": steps}
    found = figures(log(**told, num_prefill_tokens=np.array([2, 0, 1])), REQUESTS)
    assert found.seconds == pytest.approx(0.5)
    assert found.output_tokens_per_s == pytest.approx(10)
    assert found.inter_token_p50_ms == pytest.approx(100)
    assert found.inter_token_p99_ms == pytest.approx(296)
    assert found.first_token_p50_ms == pytest.approx(150)
    assert (found.step_us_p50, found.host_us_p50, found.host_us_mean) == (200, 100, 100)
    assert (found.num_steps, found.num_prefill_tokens) == (3, 3)


def test_one_token_a_request_has_no_gap_to_tell_of():
    found = figures(log((0, 1), (10.1, 10.2)), [([1], 1), ([2], 1)])
    assert found.inter_token_p50_ms is None
    assert found.host_us_p50 is None
    assert found.num_steps is None


def test_a_run_with_a_token_missing_does_not_count():
    with pytest.raises(RunError, match="5 tokens of 2 requests asked; 4 of 2 made; request 1"):
        figures(log((0, 1, 0, 0), (10.1, 10.2, 10.2, 10.3)), REQUESTS)
    with pytest.raises(RunError, match="6 of 3 made"):
        figures(log((0, 1, 0, 1, 0, 2), (10.1,) * 6), REQUESTS)


def test_a_log_comes_back_from_its_file(tmp_path):
    steps = np.array([5, 6])
    log(host_us=steps).save(tmp_path / "run.npz")
    found = RunLog.load(tmp_path / "run.npz")
    assert (found.started_s, found.ended_s) == (10.0, 10.5)
    assert found.requests.tolist() == [0, 1, 0, 1, 0]
    assert found.host_us.tolist() == [5, 6]
    assert len(found.step_us) == 0
