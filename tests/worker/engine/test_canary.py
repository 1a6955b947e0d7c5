"""The engine's own job: done before READY, and the end of an engine that cannot do it."""

from __future__ import annotations

import dataclasses
import socket

import numpy as np
import pytest

from headrace.worker import frames
from headrace.worker.engine.canary import CanaryDied, prove
from headrace.worker.engine.loop import Engine
from headrace.worker.engine.runner import build_runner
from headrace.worker.engine.sampled import Sampled
from headrace.worker.engine.stub import stub_token
from headrace.worker.frames import EngineConfig, Reason, SamplingParams


def config_of(model_folder, **changes) -> EngineConfig:
    folder = str(model_folder("qwen3"))
    return EngineConfig(model_folder=folder, runner="stub", block_size=8, **changes)


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("max_seq_tokens", [None, 2, 3, 9])
def test_invariant_1_the_engine_after_it_finds_nothing_of_it(
    model_folder, admit, depth, max_seq_tokens
):
    config = config_of(model_folder, stub_depth=depth, max_seq_tokens=max_seq_tokens)
    runner = build_runner(config)
    prove(lambda sock: Engine(runner, config, sock), runner.vocab_size)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = Engine(runner, config, theirs)
        assert engine.scheduler.pool.num_free == runner.num_blocks
        engine.admit(admit(1, [5], 1, params=SamplingParams(seed=3)))
        while engine.has_work:
            engine.step()
        reader = frames.FrameReader()
        reader.receive(ours)
        steps = [frames.unpack(*frame) for frame in reader.frames()]
    assert all(isinstance(step, frames.StepFrame) for step in steps)
    assert [step.stats.step for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].stats.num_admits_total == 1
    entries = [entry for step in steps for entry in step.entries]
    assert [(int(e["token"]), int(e["reason"])) for e in entries] == [
        (stub_token(3, 0, runner.vocab_size), Reason.LENGTH)
    ]


def test_an_engine_that_dies_of_everything_dies_of_it(model_folder, tmp_path):
    broken = tmp_path / "broken"
    config = config_of(model_folder, stub_broken_by=str(broken))
    runner = build_runner(config)
    prove(lambda sock: Engine(runner, config, sock), runner.vocab_size)
    broken.touch()
    with pytest.raises(RuntimeError, match="stub_broken_by"):
        prove(lambda sock: Engine(runner, config, sock), runner.vocab_size)


def test_an_engine_that_lives_and_computes_no_numbers_is_refused(model_folder, monkeypatch):
    config = config_of(model_folder)
    runner = build_runner(config)
    collect = runner.collect

    def spoiled() -> Sampled:
        found = collect()
        return dataclasses.replace(found, is_finite=np.zeros_like(found.is_finite))

    monkeypatch.setattr(runner, "collect", spoiled)
    with pytest.raises(CanaryDied, match="no finite numbers"):
        prove(lambda sock: Engine(runner, config, sock), runner.vocab_size)
