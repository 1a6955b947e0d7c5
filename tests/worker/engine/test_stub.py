"""Poison in the stub: whose prompt it is, when it takes effect, and how it ends a process.

tests/fleet/test_poison.py lets it end whole engines.
"""

import faulthandler
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from headrace.tests.worker.engine.conftest import Harness
from headrace.worker.engine.runner import build_runner
from headrace.worker.engine.stub import Poison, die, poison_of, stub_token
from headrace.worker.frames import EngineConfig, SamplingParams

POISON_ID = 300


def packed(*ids: int) -> bytes:
    return np.asarray(ids, "<i4").tobytes()


@pytest.fixture
def stub(model_folder):
    def stub(**config) -> Harness:
        named = {"runner": "stub", "num_blocks": 64, "block_size": 4, **config}
        return Harness(build_runner(EngineConfig(str(model_folder("qwen3")), **named)), 64, 4)

    return stub


def test_poison_is_an_id_with_two_more_behind_it():
    assert poison_of(packed(1, POISON_ID, 4, 9, 2), POISON_ID) == (4, 9)
    assert poison_of(packed(POISON_ID, POISON_ID, 6, 7), POISON_ID) == (POISON_ID, 6)
    for sound in (packed(), packed(1, 2, 3), packed(1, POISON_ID), packed(1, POISON_ID, 4)):
        assert poison_of(sound, POISON_ID) is None


@pytest.mark.parametrize("num_resumed", [0, 2, 4])
def test_a_poisoned_sequence_makes_the_tokens_before_also_after_a_takeover(stub, num_resumed):
    engine = stub(stub_poison=POISON_ID)
    params, made = SamplingParams(seed=3), [stub_token(3, at, 320) for at in range(4)]
    beside = engine.add([5, 6], 30, params=SamplingParams(seed=4))
    seq = engine.add([5, POISON_ID, Poison.RAISE, 4], 30, made[:num_resumed], params=params)
    tokens: list[int] = []

    def run() -> None:
        while True:
            tokens.extend(token for who, token in engine.step() if who is seq)

    with pytest.raises(RuntimeError, match="the prompt is poison of kind 6"):
        run()
    assert tokens == made[num_resumed:]
    assert beside.num_output >= len(tokens)


def test_a_slot_that_poison_had_is_sound_for_the_next(stub):
    engine = stub(stub_poison=POISON_ID)
    engine.add([POISON_ID, Poison.RAISE, 9], 3)
    engine.finish()
    engine.add([5, 6], 30)
    engine.finish()
    assert len(engine.finished) == 2


def test_without_the_setting_no_prompt_is_poison(stub):
    engine = stub()
    engine.add([0, Poison.RAISE, 0, POISON_ID, Poison.RAISE, 0], 5)
    engine.finish()
    assert len(engine.finished) == 1


@pytest.mark.parametrize(
    ("kind", "ended_by"),
    [
        (Poison.SEGFAULT, signal.SIGSEGV),
        (Poison.BUS, signal.SIGBUS),
        (Poison.FPE, signal.SIGFPE),
        (Poison.ILL, signal.SIGILL),
        (Poison.ABORT, signal.SIGABRT),
        (Poison.KILL, signal.SIGKILL),
    ],
)
def test_a_kind_ends_its_process_by_its_signal(kind, ended_by):
    assert os.waitstatus_to_exitcode(status_of_child(kind)) == -ended_by


def test_an_exit_has_a_status_and_no_word():
    assert os.waitstatus_to_exitcode(status_of_child(Poison.EXIT)) == 3


def status_of_child(kind: Poison) -> int:
    """Let a copy of this process die; it does nothing else before."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()  # pytest's
        signal.alarm(60)  # what does not die of it is ended by another signal
        die(kind)
        os._exit(99)
    return os.waitpid(pid, 0)[1]


def test_memory_is_used_up_by_an_exception():
    with pytest.raises(MemoryError, match="more memory than there is"):
        die(Poison.MEMORY)


def test_a_stubs_engine_starts_without_torch(smollm2_folder):
    # The campaign of tests/faults starts hundreds of them: torch is most of what a start costs.
    script = """
import sys
from headrace.worker.engine import loop
from headrace.worker.frames import EngineConfig
runner = loop.build_runner(loop.resolve_config(EngineConfig(sys.argv[1], runner="stub")))
print(runner.vocab_size, sorted({"torch", "triton", "transformers"} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(smollm2_folder)],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    assert done.stdout == "49152 []\n"
