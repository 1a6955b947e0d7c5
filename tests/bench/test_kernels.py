"""The harness' own logic: order, verdicts, figures, and a machine without a GPU."""

import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from headrace.bench import kernels
from headrace.bench.children import child_environ
from headrace.bench.kernels import Case, Limits, Outcome


def case(name="n", variant="default", **fields):
    return Case("copy", name, variant, run=lambda: None, **fields)


def test_an_error_above_the_bound_or_no_number_is_wrong():
    bounded = case(max_error=1e-2)
    assert Outcome(bounded, error=1e-2).is_right
    assert not Outcome(bounded, error=2e-2).is_right
    assert not Outcome(bounded, error=float("nan")).is_right
    assert Outcome(bounded, error=None).is_right
    assert not Outcome(bounded, failure="ValueError: no").is_right
    assert Outcome(bounded, error=float("nan")).line().endswith("WRONG")
    json.dumps(Outcome(bounded, error=float("nan")).record(), allow_nan=False)


def test_rates_follow_from_time_bytes_and_operations():
    outcome = Outcome(case(num_bytes=4.3e9, flops=7.9e9), error=1e-4, us=1000.0)
    assert outcome.bytes_per_s == pytest.approx(4.3e12)
    assert outcome.flop_per_s == pytest.approx(7.9e12)
    assert "4.30 TB/s 100%" in outcome.line()
    assert "8 TFLOP/s   1%" in outcome.line()


def test_the_summary_names_best_default_and_peers_of_right_cases_only():
    times = {"default": 30.0, "w4": 20.0, "w8": 10.0, "torch sdpa": 40.0}
    outcomes = [Outcome(case(variant=v), error=0.0, us=us) for v, us in times.items()]
    outcomes[2].error = 1.0  # the fastest is wrong
    (line,) = kernels.summary(outcomes)
    assert line.split("  ")[-3:] == ["best = w4 20.00", "default 30.00", "torch sdpa 40.00"]


def test_a_broken_case_is_told_and_the_next_one_runs():
    def fail():
        raise ValueError("first\nsecond")

    cases = [case("a", "torch", check=fail), case("b", check=lambda: 0.5), case("c")]
    found = kernels.measure_all(cases, {cases[2].label: "died"}, Limits(60), with_time=False)
    outcomes = list(found)
    assert [o.failure for o in outcomes] == ["ValueError: first", "", "died"]
    assert [o.is_right for o in outcomes] == [False, False, False]


def test_a_measured_case_holds_no_tensor_of_its_closure():
    class Tensor:
        pass

    tensor = Tensor()
    seen = weakref.ref(tensor)
    cases = [Case("copy", "n", "default", lambda held=tensor: held, lambda held=tensor: 0.0)]
    del tensor
    (outcome,) = kernels.measure_all(cases, {}, Limits(60), with_time=False)
    assert outcome.is_right
    assert seen() is None


def test_a_lost_device_ends_the_run(capsys):
    def lose():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    cases = [case("a", check=lose), case("b"), case("c")]
    (outcome,) = kernels.measure_all(cases, {}, Limits(60), with_time=False)
    assert "illegal memory access" in outcome.failure
    assert "2 cases left out" in capsys.readouterr().out


def test_out_of_time_says_what_was_left_out(capsys):
    assert list(kernels.measure_all([case("a"), case("b")], {}, Limits(0), with_time=False)) == []
    assert "2 cases left out, from copy | a | default" in capsys.readouterr().out


def test_cases_of_a_workload_stand_together(monkeypatch):
    order = [case("a", "1"), case("b", "1"), case("a", "2")]
    monkeypatch.setattr(kernels, "load_part", lambda part: SimpleNamespace(cases=lambda q: order))
    listed = [(c.name, c.variant) for c in kernels.list_cases(["copy"], quick=True)]
    assert listed == [("a", "1"), ("a", "2"), ("b", "1")]


def test_every_part_lists_its_cases_without_a_device():
    for part in kernels.find_parts():
        for quick in (True, False):
            listed = kernels.list_cases([part], quick=quick)
            assert listed
            labels = [c.label for c in listed]
            assert len(set(labels)) == len(labels)
            assert {c.part for c in listed} == {part}


def test_the_ceilings_come_first():
    assert kernels.find_parts()[0] == "copy"


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["no_such_part"])
    assert "no_such_part" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_ends_well():
    command = [sys.executable, "-m", "headrace.bench.kernels", "copy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=child_environ())
    assert (done.returncode, done.stderr) == (0, "")
    assert "no GPU here" in done.stdout


def test_tiny_cases_are_checked_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny = SimpleNamespace(tiny_cases=lambda: [case("t", check=lambda: 0.5)])
    monkeypatch.setattr(kernels, "load_part", lambda part: tiny)
    assert kernels.main(["copy", "--check"]) == 1
    assert "WRONG" in capsys.readouterr().out
