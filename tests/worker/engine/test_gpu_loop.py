"""The engine's loop on the GPU runner, two steps in flight; interpreted where there is no GPU."""

import select
import socket

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headrace.tests.worker.engine.conftest import make_admit
from headrace.worker import frames
from headrace.worker.engine.loop import CourierGone, Engine
from headrace.worker.engine.runner import build_runner
from headrace.worker.frames import Cancel, EngineConfig, Reason

pytestmark = [
    pytest.mark.gpu,
    # Triton's interpreter computes with numpy, which warns where the noise's hash wraps and of NaN.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

VOCAB, POISON = 96, 95
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
BLOCK_SIZE = 16
#: how far below the largest logit a chosen one may be: fp32 sums in another order, of about 10.
TIE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a random model: POISON has no numbers for its embedding, and is never made."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("poisoned")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(made)
    tensors = load_file(made / "model.safetensors")
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    tensors["lm_head.weight"][POISON] = 0.0
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def peer(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def config(folder):
    return EngineConfig(
        str(folder), device="cuda", dtype="float32", block_size=BLOCK_SIZE, num_blocks=12,
        max_num_seqs=3, max_step_tokens=24, max_seq_tokens=64, debug_check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runner(config):
    return build_runner(config)


class Driver:
    """An engine in this process and the courier's end of its socket."""

    def __init__(self, runner, config):
        self.runner = runner
        self.courier, self._engine_end = socket.socketpair()
        self.engine = Engine(runner, config, self._engine_end)
        self._reader = frames.FrameReader()
        self.asked = {}
        self.tokens, self.reasons, self.failures, self.cached = {}, {}, {}, {}

    def send(self, *commands):
        for command in commands:
            if isinstance(command, frames.Admit):
                self.asked[command.seq_id] = command
                self.tokens[command.seq_id] = []
        self.courier.sendall(b"".join(map(frames.pack_command, commands)))
        self.engine.receive()

    def step(self):
        self.engine.receive()
        self.engine.step()
        assert len(self.engine._in_flight) <= self.runner.depth
        self._read()

    def finish(self, max_steps=200):
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"work is left after {max_steps} steps")

    def _read(self):
        while select.select([self.courier], [], [], 0)[0]:
            assert self._reader.receive(self.courier)
            for frame in self._reader.frames():
                notice = frames.unpack(*frame)
                if isinstance(notice, frames.Failure):
                    self.failures[notice.seq_id] = notice.code
                else:
                    self._note(notice.entries)

    def _note(self, entries):
        for entry in entries:
            seq_id = int(entry["seq_id"])
            assert seq_id not in self.reasons, "an entry after the end"
            made, resumed = self.tokens[seq_id], len(self.asked[seq_id].output) // 4
            assert entry["index"] == resumed + len(made)
            if entry["token"] >= 0:
                made.append(int(entry["token"]))
            self.cached[seq_id] = int(entry["cached_tokens"])
            if entry["reason"] != Reason.GOING_ON:
                self.reasons[seq_id] = Reason(entry["reason"])

    def close(self):
        self.courier.close()
        self._engine_end.close()


@pytest.fixture
def drive(runner, config, monkeypatch):
    """Return a function that starts an engine in this process, on a pool of that many blocks.

    The runner is one for all tests, with what the engine before has left in its slots.
    """
    # The interpreter's results are there at once: without this none would be left in flight.
    monkeypatch.setattr(runner, "is_ready", lambda: False)
    runner.clear(list(range(runner.num_blocks)))
    started = []

    def start(num_blocks=config.num_blocks):
        monkeypatch.setattr(runner, "num_blocks", num_blocks)
        started.append(Driver(runner, config))
        return started[-1]

    yield start
    for driver in started:
        driver.close()


@torch.inference_mode()
def assert_greedy(peer, admit, made):
    """Compare with transformers, position by position, on the very tokens that were made."""
    known = np.frombuffer(admit.prompt + admit.output, "<i4").tolist()
    logits = peer(torch.tensor([known + made])).logits[0, len(known) - 1 : -1]
    behind = logits.max(dim=1).values - logits[torch.arange(len(made)), torch.tensor(made)]
    assert behind.max() < TIE, f"sequence {admit.seq_id}: token {int(behind.argmax())} of {made}"


@torch.inference_mode()
def greedy(peer, prompt, num_tokens):
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(peer(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def drawn(rng, num_tokens):
    return rng.integers(0, POISON, num_tokens).tolist()


def is_clear(runner):
    """Say whether the whole pool is numbers."""
    return all(bool(torch.isfinite(x.float()).all()) for x in (runner._cache.k, runner._cache.v))


def test_arrivals_cancels_stops_and_resumed_outputs_at_random(drive, peer):
    """Three slots, prompts that share a prefix, and somebody who comes or goes in most steps."""
    seed = int(np.random.default_rng().integers(2**32))
    print(f"seed {seed}")  # shown where it fails
    rng = np.random.default_rng(seed)
    driver = drive()
    shared = drawn(rng, 17)
    asked = []
    for seq_id in range(1, 9):
        prompt = (shared if seq_id % 3 == 0 else []) + drawn(rng, int(rng.integers(1, 28)))
        output = drawn(rng, int(rng.integers(1, 4))) if seq_id % 4 == 0 else []
        max_tokens = len(output) + int(rng.integers(2, 6))
        stops = greedy(peer, prompt + output, 2)[1:] if seq_id % 5 == 0 else []
        asked.append(make_admit(seq_id, prompt, max_tokens, output, stop_token_ids=stops))
    canceled = {2, 7}
    most_in_flight = 0
    for _ in range(400):
        if asked and rng.random() < 0.6:
            driver.send(asked.pop(0))
        running = [i for i in canceled & driver.tokens.keys() if driver.tokens[i]]
        if running:
            driver.send(Cancel(running[0]))
            canceled.discard(running[0])
        if driver.engine.has_work:
            driver.step()
            most_in_flight = max(most_in_flight, len(driver.engine._in_flight))
        elif not asked:
            break
    assert most_in_flight == driver.runner.depth
    assert driver.reasons.keys() == driver.asked.keys()
    assert not driver.failures
    for seq_id, admit in driver.asked.items():
        made, reason = driver.tokens[seq_id], driver.reasons[seq_id]
        assert_greedy(peer, admit, made)
        if reason is Reason.LENGTH:
            assert len(made) == admit.max_tokens - len(admit.output) // 4
            assert not set(made) & set(admit.stop_token_ids)
        elif reason is Reason.STOP_TOKEN:
            assert made[-1] in admit.stop_token_ids
            assert not set(made[:-1]) & set(admit.stop_token_ids)
        else:
            assert (reason, seq_id in (2, 7)) == (Reason.CANCELED, True)
    # A stop token is the second one made, unless the first was it too.
    assert driver.reasons[5] is Reason.STOP_TOKEN
    assert max(driver.cached[i] for i in (3, 6)) >= BLOCK_SIZE
    driver.engine.scheduler.check()


def test_preempted_sequences_go_on_with_the_same_tokens(drive, peer):
    """A pool that holds both prompts and not both outputs."""
    rng = np.random.default_rng()
    driver = drive(num_blocks=3)
    driver.engine.scheduler.lengths.add(1)  # outputs are expected to be short
    admits = [make_admit(i, drawn(rng, 8), 11) for i in (1, 2)]
    driver.send(*admits)
    driver.finish()
    assert driver.engine.scheduler.num_preempted_total > 0
    for admit in admits:
        assert driver.reasons[admit.seq_id] is Reason.LENGTH
        assert len(driver.tokens[admit.seq_id]) == 11
        assert_greedy(peer, admit, driver.tokens[admit.seq_id])


def test_a_sequence_whose_values_are_no_numbers_fails_alone(drive, peer):
    rng = np.random.default_rng()
    driver = drive()
    prompt = drawn(rng, 19)
    prompt[4] = POISON
    good = [make_admit(i, drawn(rng, n), 6) for i, n in ((1, 3), (3, 18))]
    driver.send(good[0], make_admit(2, prompt, 6), good[1])
    driver.finish()
    assert driver.failures == {2: "not_finite"}
    assert driver.tokens[2] == []
    assert driver.reasons == {1: Reason.LENGTH, 2: Reason.FAILED, 3: Reason.LENGTH}
    for admit in good:
        assert_greedy(peer, admit, driver.tokens[admit.seq_id])
    # Its blocks are clean and nothing of it is offered to its like.
    assert is_clear(driver.runner)
    driver.send(make_admit(4, prompt, 2))
    driver.finish()
    assert (driver.reasons[4], driver.cached[4]) == (Reason.FAILED, 0)


def test_blocks_of_a_canceled_spoilt_sequence_do_not_spoil_the_next(drive, peer):
    """It goes before it was found out, so that its blocks are given on as they are."""
    rng = np.random.default_rng()
    driver = drive(num_blocks=4)
    driver.send(make_admit(1, [POISON, *drawn(rng, 40)], 6))
    driver.step()
    spoilt = driver.engine.scheduler.find(1).table
    assert len(spoilt) > 1
    driver.send(Cancel(1))
    driver.finish()
    assert driver.reasons[1] is Reason.CANCELED
    assert not is_clear(driver.runner), "else this tests nothing"
    admits = [make_admit(i, drawn(rng, 21), 5) for i in (2, 3)]
    driver.send(*admits)
    driver.step()
    driver.step()
    held = [block for i in (2, 3) for block in driver.engine.scheduler.find(i).table]
    assert set(held) & set(spoilt)
    driver.finish()
    assert not driver.failures
    for admit in admits:
        assert len(driver.tokens[admit.seq_id]) == 5
        assert_greedy(peer, admit, driver.tokens[admit.seq_id])


def test_steps_in_flight_come_to_rest_when_the_courier_goes(drive):
    driver = drive()
    driver.send(*(make_admit(i, [i, 5, 6], 30) for i in (1, 2)))
    for _ in range(4):
        driver.step()
    assert len(driver.engine._in_flight) == driver.runner.depth == 2
    driver.courier.close()
    with pytest.raises((CourierGone, ConnectionError)):
        driver.engine.run()
    assert not driver.engine._in_flight
    assert not driver.runner._in_flight
