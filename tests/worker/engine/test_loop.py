"""The engine as a process, spoken to over its socket as the courier does."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.worker import frames
from headrace.worker.engine.canary import NUM_OUTPUT
from headrace.worker.engine.loop import Engine
from headrace.worker.engine.runner import build_runner
from headrace.worker.engine.stub import stub_token
from headrace.worker.frames import Cancel, EngineConfig, Reason, SamplingParams, Stop

#: seconds any answer may take on a busy machine before the test fails.
DEADLINE_S = 60


class Courier:
    """The test's end of the socket."""

    def __init__(self, sock, process):
        self.sock, self.process = sock, process
        self._reader = frames.FrameReader()
        self._found = []

    def send(self, *commands):
        self.sock.sendall(b"".join(map(frames.pack_command, commands)))

    def can_read(self, timeout_s):
        return bool(self._found) or bool(select.select([self.sock], [], [], timeout_s)[0])

    def next(self):
        """Return the next frame decoded; None when the engine closed its end."""
        deadline = time.monotonic() + DEADLINE_S
        while not self._found:
            left = deadline - time.monotonic()
            assert left > 0, "no frame in time"
            assert select.select([self.sock], [], [], left)[0], "no frame in time"
            if not self._reader.receive(self.sock):
                return None
            self._found = [frames.unpack(*frame) for frame in self._reader.frames()]
        return self._found.pop(0)

    def next_step(self):
        while not isinstance(frame := self.next(), frames.StepFrame):
            assert frame is not None, "the engine closed its end"
        return frame

    def follow(self, *seq_ids):
        """Read until all these ended; return {seq_id: (tokens, reason, entries)}."""
        found = {seq_id: ([], Reason.GOING_ON, []) for seq_id in seq_ids}
        while any(reason is Reason.GOING_ON for _, reason, _ in found.values()):
            for entry in self.next_step().entries:
                tokens, reason, entries = found[int(entry["seq_id"])]
                assert reason is Reason.GOING_ON, "an entry after the end"
                assert not entries or entry["index"] == entries[-1]["index"] + 1
                if entry["token"] >= 0:
                    tokens.append(int(entry["token"]))
                reason = Reason(entry["reason"])
                found[int(entry["seq_id"])] = (tokens, reason, [*entries, entry])
        return found


@pytest.fixture(scope="module")
def start():
    """Return a function that starts an engine process and gives the courier's end."""
    started = []

    def start_engine(**config):
        ours, theirs = socket.socketpair()
        text = config.pop("config_text", None)
        if text is None:
            text = msgspec.json.encode(EngineConfig(**config)).decode()
        command = [sys.executable, "-m", "headrace.worker.engine.loop"]
        process = subprocess.Popen(
            [*command, "--fd", str(theirs.fileno()), "--config", text],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        theirs.close()
        started.append(courier := Courier(ours, process))
        return courier

    yield start_engine
    for courier in started:
        courier.sock.close()
        if courier.process.poll() is None:
            courier.process.kill()
        courier.process.wait(DEADLINE_S)
        courier.process.stderr.close()


@pytest.fixture
def engine(start, model_folder):
    """Start an engine of one's own, to be ended by the test."""
    return start_small(start, model_folder)


@pytest.fixture(scope="module")
def shared_engine(start, model_folder):
    """Start one engine for all tests that leave it as they found it: idle and alive."""
    return start_small(start, model_folder)


def start_small(start, model_folder):
    courier = start(
        model_folder=str(model_folder("smollm2")),
        num_blocks=32,
        block_size=8,
        max_num_seqs=8,
        max_step_tokens=32,
        debug_check=True,
    )
    ready = courier.next()
    assert isinstance(ready, frames.Ready)
    assert (ready.num_blocks, ready.block_size, ready.vocab_size) == (32, 8, 320)
    assert ready.max_seq_tokens == 256
    assert (ready.device, ready.max_num_seqs) == ("cpu", 8)
    assert [stage.name for stage in ready.stages] == [
        "process and imports",
        "weights",
        "pool",
        "own job",
    ]
    assert all(stage.seconds > 0 for stage in ready.stages)
    assert sum(stage.seconds for stage in ready.stages[1:]) <= ready.load_s
    return courier


@torch.inference_mode()
def greedy(model, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_sequences_get_their_tokens_and_one_end(shared_engine, admit, peer):
    prompts = {1: [5, 6, 7], 2: list(range(10, 50)), 3: [9]}
    shared_engine.send(*(admit(seq_id, prompt, 6) for seq_id, prompt in prompts.items()))
    found = shared_engine.follow(1, 2, 3)
    for seq_id, prompt in prompts.items():
        assert found[seq_id][:2] == (greedy(peer("smollm2"), prompt, 6), Reason.LENGTH)
        assert [int(entry["index"]) for entry in found[seq_id][2]] == list(range(6))


def test_a_stop_token_ends_a_sequence_and_is_sent(shared_engine, admit, peer):
    expected = greedy(peer("smollm2"), [5, 6, 7], 6)
    stop = expected[3]
    shared_engine.send(admit(1, [5, 6, 7], 50, stop_token_ids=[stop]))
    tokens, reason, _ = shared_engine.follow(1)[1]
    assert (tokens, reason) == (expected[: expected.index(stop) + 1], Reason.STOP_TOKEN)


def test_a_resumed_sequence_goes_on_at_the_next_index(shared_engine, admit, peer):
    expected = greedy(peer("smollm2"), [5, 6, 7], 8)
    shared_engine.send(admit(1, [5, 6, 7], 8, output=expected[:5]))
    tokens, reason, entries = shared_engine.follow(1)[1]
    assert (tokens, reason, int(entries[0]["index"])) == (expected[5:], Reason.LENGTH, 5)


def test_a_resumed_output_that_was_whole_ends_without_a_token(shared_engine, admit):
    shared_engine.send(admit(1, [5], 3, output=[7, 8, 9]))
    shared_engine.send(admit(2, [5], 9, output=[7, 2], stop_token_ids=[2]))
    found = shared_engine.follow(1, 2)
    assert found[1][:2] == ([], Reason.LENGTH)
    assert found[2][:2] == ([], Reason.STOP_TOKEN)


def test_cancel_ends_a_running_and_a_waiting_sequence(engine, admit):
    prompt = list(range(3, 103))
    engine.send(*(admit(seq_id, prompt, 150, salt=bytes([seq_id])) for seq_id in (1, 2)))
    before = engine.next_step()
    assert (before.stats.num_running, before.stats.num_waiting) == (1, 1)
    engine.send(Cancel(1), Cancel(2), Cancel(77))
    found = engine.follow(1, 2)
    assert {seq_id: reason for seq_id, (_, reason, _) in found.items()} == {
        1: Reason.CANCELED,
        2: Reason.CANCELED,
    }
    engine.send(admit(3, [5], 1))
    while not len((step := engine.next_step()).entries):
        assert step.stats.num_running == 1
    assert (step.stats.num_running, step.stats.num_waiting) == (0, 0)
    assert step.stats.free_blocks + step.stats.cached_blocks == step.stats.total_blocks


BAD = {
    "bad_tokens": [{"prompt": []}, {"prompt": [320]}, {"prompt": [-1]}, {"output": [999]}],
    "bad_max_tokens": [{"max_tokens": 0}, {"max_tokens": 1, "output": [5, 6]}],
    "too_long": [{"max_tokens": 255}, {"prompt": [5] * 256}],
    "bad_sampling": [
        {"params": SamplingParams(temperature=float("nan"))},
        {"params": SamplingParams(top_p=1.5)},
        {"params": SamplingParams(logit_bias={320: 1.0})},
        {"params": SamplingParams(logit_bias={3: float("inf")})},
        {"params": SamplingParams(repetition_penalty=0.0)},
        {"params": SamplingParams(logprobs=21)},
        {"params": SamplingParams(logit_bias=dict.fromkeys(range(301), 1.0))},
    ],
    "bad_stop_tokens": [{"stop_token_ids": list(range(17))}],
}


@pytest.mark.parametrize(("code", "asked"), [(code, a) for code, all_ in BAD.items() for a in all_])
def test_a_sequence_that_cannot_run_fails_alone_with_its_reason(code, asked, shared_engine, admit):
    # One shared_engine serves all cases: that it still does is part of the test.
    bad = admit(1, **{"prompt": [5, 6], "max_tokens": 4, **asked})
    shared_engine.send(admit(2, [5, 6, 7], 4), bad, admit(3, [8], 2))
    seen = []
    while not isinstance(frame := shared_engine.next(), frames.Failure):
        seen.append(frame)
    assert (frame.seq_id, frame.code) == (1, code)
    shared_engine._found = seen + shared_engine._found
    found = shared_engine.follow(1, 2, 3)
    assert found[1][:2] == ([], Reason.FAILED)
    assert (len(found[2][0]), found[2][1]) == (4, Reason.LENGTH)
    assert (len(found[3][0]), found[3][1]) == (2, Reason.LENGTH)


def test_logprobs_arrive_for_those_who_asked(shared_engine, admit, peer):
    with torch.inference_mode():
        logits = peer("smollm2")(torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = torch.log_softmax(logits, -1)
    asks = {1: None, 2: 0, 3: 4}
    shared_engine.send(
        *(
            admit(seq_id, [5, 6, 7], 1, params=SamplingParams(temperature=0.0, logprobs=k))
            for seq_id, k in asks.items()
        )
    )
    found = {}
    while len(found) < 3:
        step = shared_engine.next_step()
        tails = iter(step.logprobs)
        for entry in step.entries:
            found[int(entry["seq_id"])] = next(tails) if entry["num_logprobs"] >= 0 else None
    assert found[1] is None
    top = expected.topk(4)
    for seq_id, k in ((2, 0), (3, 4)):
        chosen, others = found[seq_id]
        assert chosen == pytest.approx(float(expected.max()), abs=1e-3)
        assert [token for token, _ in others] == top.indices[:k].tolist()
        np.testing.assert_allclose([v for _, v in others], top.values[:k], atol=1e-3)


@pytest.fixture
def spoilt_folder(model_folder, tmp_path):
    """Save a model whose token 300 turns a sequence into NaN."""
    source = model_folder("qwen2")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][300] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    return str(tmp_path)


def test_a_sequence_whose_values_are_no_numbers_fails_alone(start, spoilt_folder, admit, peer):
    courier = start(model_folder=spoilt_folder, num_blocks=6, block_size=8, debug_check=True)
    assert isinstance(courier.next(), frames.Ready)
    expected = greedy(peer("qwen2"), [5, 6, 7], 4)
    assert 300 not in expected
    courier.send(admit(1, [300] * 11, 4), admit(2, [5, 6, 7], 4))
    found = courier.follow(1, 2)
    assert found[1][:2] == ([], Reason.FAILED)
    assert found[2][:2] == (expected, Reason.LENGTH)
    courier.send(admit(3, [300] * 11, 4))
    _, reason, entries = courier.follow(3)[3]
    # What was computed of it is not offered to others, not even to its like.
    assert (reason, int(entries[0]["cached_tokens"])) == (Reason.FAILED, 0)


def test_blocks_of_a_spoilt_sequence_are_cleared(spoilt_folder, admit):
    config = EngineConfig(model_folder=spoilt_folder, num_blocks=6, block_size=8)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = Engine(build_runner(config), config, theirs)
        courier = Courier(ours, None)
        courier.send(admit(1, [300] * 11, 4))
        engine.receive()
        engine.step()
        assert courier.follow(1)[1][1] is Reason.FAILED
        assert torch.isfinite(engine._runner._k_cache).all()
        assert torch.isfinite(engine._runner._v_cache).all()


def test_the_engine_ends_when_the_courier_closes_its_end(engine, admit):
    engine.send(admit(1, [5], 200))
    engine.next_step()
    engine.sock.shutdown(socket.SHUT_RDWR)
    engine.sock.close()
    assert engine.process.wait(DEADLINE_S) == 0


def test_the_engine_ends_when_it_is_idle_and_the_courier_goes(engine):
    engine.sock.close()
    assert engine.process.wait(DEADLINE_S) == 0


def test_stop_ends_the_engine_with_zero_and_an_interrupt_does_not(engine, admit):
    engine.process.send_signal(signal.SIGINT)
    engine.send(admit(1, [5], 2))
    assert engine.follow(1)[1][1] is Reason.LENGTH
    engine.send(Stop())
    assert engine.process.wait(DEADLINE_S) == 0


def test_the_engine_is_killed_with_its_parent(model_folder):
    ours, theirs = socket.socketpair()
    config = EngineConfig(model_folder=str(model_folder("smollm2")), runner="stub", num_blocks=8)
    script = (
        "import subprocess, sys, signal\n"
        "process = subprocess.Popen(sys.argv[2:], pass_fds=[int(sys.argv[1])])\n"
        "print(process.pid, flush=True)\n"
        "signal.pause()\n"
    )
    fd = str(theirs.fileno())
    loop = [sys.executable, "-m", "headrace.worker.engine.loop", "--fd", fd, "--config"]
    parent = subprocess.Popen(
        [sys.executable, "-c", script, fd, *loop, msgspec.json.encode(config).decode()],
        pass_fds=[theirs.fileno()],
        stdout=subprocess.PIPE,
    )
    with ours, theirs, parent:
        engine = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert isinstance(Courier(ours, None).next(), frames.Ready)
            # Our copy of the engine's end stays open: it can only be the parent's death.
            parent.kill()
            assert select.select([engine], [], [], DEADLINE_S)[0], "the engine outlived its parent"
        finally:
            os.close(engine)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"model_folder": "/nowhere"}, "unsupported_model"),
        ({"num_blocks": 1 << 40}, "out_of_memory"),
        ({"num_blocks": None, "kv_bytes": 1}, "out_of_memory"),
        ({"max_num_seqs": 64, "max_step_tokens": 8}, "bad_config"),
        ({"target_step_ms": -1.0}, "bad_config"),
        ({"kv_dtype": "fp8", "device": "cpu"}, "bad_config"),
        ({"runner": "stub", "stub_depth": -1}, "bad_config"),
        ({"config_text": '{"model_folder": "x", "mispelt": 1}'}, "bad_config"),
        ({"config_text": "{"}, "bad_config"),
    ],
)
def test_a_bad_configuration_is_told_as_fatal(config, code, start, model_folder):
    courier = start(**{"model_folder": str(model_folder("smollm2")), "num_blocks": 4, **config})
    fatal = courier.next()
    assert isinstance(fatal, frames.Fatal)
    assert fatal.code == code
    assert courier.process.wait(DEADLINE_S) == 1


@pytest.mark.parametrize("sent", [b"\0\0\0\0\x63", b"\x01\0\0\0\x01\xc1", b"\xff\xff\xff\xff\x01"])
def test_what_is_no_frame_is_told_as_fatal(sent, engine):
    engine.sock.sendall(sent)
    fatal = engine.next()
    assert isinstance(fatal, frames.Fatal)
    assert fatal.code == "bad_frame"
    assert engine.process.wait(DEADLINE_S) == 1


@pytest.mark.parametrize("depth", [0, 2])
def test_a_stub_makes_the_tokens_that_anyone_can_predict(depth, start, model_folder, admit):
    folder = str(model_folder("qwen3"))
    courier = start(
        model_folder=folder, runner="stub", kv_bytes=1 << 24, stub_depth=depth, debug_check=True
    )
    assert isinstance(courier.next(), frames.Ready)
    asks = {seq_id: SamplingParams(seed=seq_id * 7 - 20) for seq_id in range(1, 6)}
    expected = {i: [stub_token(p.seed, at, 320) for at in range(30)] for i, p in asks.items()}
    stop = expected[3][17]
    courier.send(
        *(
            admit(i, [5] * 9, 30, params=p, stop_token_ids=[stop] if i == 3 else [])
            for i, p in asks.items()
        )
    )
    found = courier.follow(*asks)
    stop_at = expected[3].index(stop) + 1
    for seq_id, (tokens, reason, _) in found.items():
        end = (expected[3][:stop_at], Reason.STOP_TOKEN)
        assert (tokens, reason) == (end if seq_id == 3 else (expected[seq_id], Reason.LENGTH))
    courier.send(Stop())
    assert courier.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_a_device_lost_in_mid_run_is_told_after_the_tokens_made_before(
    depth, start, model_folder, admit
):
    courier = start(
        model_folder=str(model_folder("qwen3")),
        runner="stub",
        stub_depth=depth,
        stub_lost_steps=NUM_OUTPUT + 5,  # the first are of its own job
    )
    assert isinstance(courier.next(), frames.Ready)
    courier.send(admit(1, [5] * 9, 30, params=SamplingParams(seed=3)))
    tokens = []
    while isinstance(frame := courier.next(), frames.StepFrame):
        tokens += frame.entries["token"].tolist()
    assert tokens == [stub_token(3, at, 320) for at in range(5)]
    assert isinstance(frame, frames.Fatal)
    assert frame.code == "device_lost"
    assert "stub_lost_steps" in frame.text
    assert courier.next() is None
    assert courier.process.wait(DEADLINE_S) == 1


def test_a_courier_that_does_not_read_stops_the_steps_and_loses_nothing(model_folder, admit):
    config = EngineConfig(model_folder=str(model_folder("qwen3")), runner="stub", block_size=8)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = Engine(build_runner(config), config, theirs)
        engine._writer = frames.FrameWriter(theirs, max_backlog_bytes=5000)
        params = SamplingParams(seed=3)
        courier = Courier(ours, None)
        courier.send(*(admit(seq_id, [5] * 9, 450, params=params) for seq_id in range(1, 60)))
        engine.receive()
        while not engine._writer.is_full:
            engine.step()
        waiting = threading.Thread(target=engine.receive)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive(), "more is made though nobody reads"
        made = []
        while waiting.is_alive():  # it may end before the last frame that was read
            if courier.can_read(0.05):
                made.append(courier.next_step())
        assert made
        assert [step.stats.step for step in made] == list(range(1, len(made) + 1))
        tokens = [int(step.entries["token"][0]) for step in made]
        assert tokens == [stub_token(3, i, 320) for i in range(len(made))]
