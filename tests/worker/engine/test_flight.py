"""The loop with steps in flight, against a device whose tokens depend on every key it reads.

The device keeps its own tables, tokens and positions by slot, fed by what a batch says is new. Its
cache holds the token of each place, and the next token is a hash of all that a row's table leads
to: one wrong block, lost token, early reuse or late name, and all that follows is different. So
each output can be worked out beforehand, whatever ran beside it.
"""

import random
import socket
import zlib
from collections import deque

import numpy as np
import pytest

from headrace.worker import frames
from headrace.worker.engine.loop import CourierGone, Engine
from headrace.worker.engine.sampled import Sampled
from headrace.worker.frames import Cancel, EngineConfig, Reason, Stop

VOCAB, BLOCK_SIZE, MAX_SEQS = 97, 4, 6
#: a sequence that holds this token has values that are no numbers.
SPOILT = 13
#: what nobody may read: a token the host believes, or a place of the cache.
POISON = -77


def next_token(context):
    """Return the token after these; never the spoilt one."""
    token = zlib.crc32(np.array(context, "<i4").tobytes()) % VOCAB
    return token + 1 if token == SPOILT else token


def expected_output(asked):
    """Return the (tokens, reason) that a sequence must get, with nobody beside it."""
    tokens = [*np.frombuffer(asked.prompt, "<i4").tolist(), *np.frombuffer(asked.output, "<i4")]
    num_prompt, num_before = len(asked.prompt) // 4, len(tokens)
    if SPOILT in tokens:
        return [], Reason.FAILED
    while len(tokens) - num_prompt < asked.max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in asked.stop_token_ids:
            return tokens[num_before:], Reason.STOP_TOKEN
    return tokens[num_before:], Reason.LENGTH


class Device:
    """A runner that does at submit what a device does in order, and tells of it later."""

    dtype_name, vocab_size, max_positions, block_size = "float32", VOCAB, 400, BLOCK_SIZE

    def __init__(self, num_blocks, depth, is_early=False):
        self.num_blocks, self.depth, self.is_early = num_blocks, depth, is_early
        self.cache = np.full((num_blocks, BLOCK_SIZE), POISON)
        self.tables = np.full((MAX_SEQS, num_blocks), -1)
        self.last_tokens = np.full(MAX_SEQS, POISON)
        self.is_dead = np.ones(MAX_SEQS, bool)
        self.stop_ids = [()] * MAX_SEQS
        self.results = deque()
        self.most_in_flight = 0
        self.cleared = []
        self.random = random.Random(depth)

    def submit(self, batch):
        for seq in batch.started:
            assert seq.is_running
            assert (seq.tokens[: seq.num_received] >= 0).all()
            self.tables[seq.slot] = -1
            self.last_tokens[seq.slot] = seq.tokens[seq.num_received - 1]
            self.is_dead[seq.slot] = False
            self.stop_ids[seq.slot] = seq.asked.stop_token_ids
        for slot, index, block in batch.new_blocks:
            self.tables[slot, index] = block
        ends = {}  # slot -> position of its last row
        rows = zip(batch.decode_slots.tolist(), batch.decode_positions.tolist(), strict=True)
        for slot, position in rows:
            self.write(slot, position, [self.last_tokens[slot]])
            ends[slot] = position
        for chunk in batch.chunks:
            tokens = chunk.seq.tokens[chunk.start : chunk.start + chunk.num_tokens].tolist()
            self.write(chunk.slot, chunk.start, tokens)
            ends[chunk.slot] = chunk.start + chunk.num_tokens - 1
        found = [self.sample(slot, ends[slot]) for slot in batch.due_slots.tolist()]
        columns = np.array(found, np.int64).reshape(-1, 3).T
        self.results.append(Sampled(columns[0], columns[1] > 0, columns[2] > 0))
        self.most_in_flight = max(self.most_in_flight, len(self.results))

    def write(self, slot, start, tokens):
        for position, token in enumerate(tokens, start):
            if not self.is_dead[slot]:
                assert token >= 0, "a value that is not there was computed"
                block = self.tables[slot, position // BLOCK_SIZE]
                assert block >= 0, "a row without a block"
                self.cache[block, position % BLOCK_SIZE] = token

    def sample(self, slot, position):
        if self.is_dead[slot]:
            return POISON, 1, 1
        blocks = self.tables[slot, : position // BLOCK_SIZE + 1]
        context = self.cache[blocks].ravel()[: position + 1].tolist()
        if SPOILT in context:
            return 0, 0, 0
        token = self.last_tokens[slot] = next_token(context)
        self.is_dead[slot] = token in self.stop_ids[slot]
        return token, 1, int(self.is_dead[slot])

    def collect(self):
        return self.results.popleft()

    def is_ready(self):
        return len(self.results) > self.depth or (self.is_early and self.random.random() < 0.4)

    def clear(self, blocks):
        self.cache[blocks] = POISON
        self.cleared += blocks


class Bench:
    """An engine on a device, and the courier's end of its socket."""

    def __init__(self, device, **config):
        self.device = device
        config = EngineConfig("", max_num_seqs=MAX_SEQS, debug_check=True, **config)
        self.ours, theirs = socket.socketpair()
        self.engine = Engine(device, config, theirs)
        self.theirs = theirs
        self.reader = frames.FrameReader()
        self.tokens, self.reasons, self.failures, self.stats = {}, {}, [], []

    def close(self):
        self.ours.close()
        self.theirs.close()

    def send(self, *commands):
        self.ours.sendall(b"".join(map(frames.pack_command, commands)))
        self.engine.receive()

    def step(self):
        self.engine.step()
        self.engine.scheduler.check()
        self.reader.receive(self.ours)
        for frame in self.reader.frames():
            notice = frames.unpack(*frame)
            if isinstance(notice, frames.Failure):
                self.failures.append(notice.seq_id)
            else:
                self.note(notice)

    def note(self, step):
        self.stats.append(step.stats)
        for entry in step.entries:
            seq_id, reason = int(entry["seq_id"]), Reason(entry["reason"])
            assert seq_id not in self.reasons, "an entry after the end"
            first, tokens = self.tokens.setdefault(seq_id, (int(entry["index"]), []))
            assert entry["index"] == first + len(tokens)
            if entry["token"] >= 0:
                tokens.append(int(entry["token"]))
            if reason is not Reason.GOING_ON:
                self.reasons[seq_id] = reason

    def finish(self):
        for _ in range(3000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("work is left")


@pytest.fixture
def start():
    """Return a function that builds a Bench."""
    benches = []

    def build(num_blocks=64, depth=2, is_early=False, **config):
        benches.append(Bench(Device(num_blocks, depth, is_early), **config))
        return benches[-1]

    yield build
    for bench in benches:
        bench.close()


def random_admit(chance, seq_id, make_admit, max_tokens):
    shared = list(range(20, 20 + chance.choice([0, 4, 8, 11])))
    prompt = shared + [chance.randrange(VOCAB - 1) for _ in range(chance.randrange(1, 12))]
    prompt = [token for token in prompt if token != SPOILT] or [1]
    if chance.random() < 0.08:
        prompt[-1] = SPOILT
    asked = {
        "stop_token_ids": chance.sample(range(VOCAB), 6),
        "is_batch": chance.random() < 0.4,
        "salt": chance.choice([b"", b"other"]),
    }
    admit = make_admit(seq_id, prompt, chance.randrange(1, max_tokens), **asked)
    if chance.random() < 0.3 and SPOILT not in prompt:  # resumed in the middle of its output
        tokens, _ = expected_output(admit)
        output = [t for t in tokens[: chance.randrange(len(tokens))] if len(tokens) > 1]
        admit = make_admit(seq_id, prompt, admit.max_tokens, output, **asked)
    return admit


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_streams_are_what_they_would_be_alone(seed, is_early, depth, start, admit):
    chance = random.Random(seed)
    bench = start(chance.choice([12, 18, 64]), depth, is_early, max_step_tokens=16 + seed)
    for _ in range(20):  # short outputs are expected, so more is admitted than can be finished
        bench.engine.scheduler.lengths.add(2)
    asked = [random_admit(chance, seq_id, admit, 24) for seq_id in range(1, 31)]
    canceled = set(chance.sample(range(1, 31), 6))
    waiting = list(asked)
    while waiting:
        num_new = chance.randrange(4)
        if num_new or bench.engine.has_work:  # or the engine would wait for more commands
            bench.send(*waiting[:num_new], Cancel(chance.choice([*canceled, 999])))
        waiting = waiting[num_new:]
        for _ in range(chance.randrange(1, 6)):
            if bench.engine.has_work:
                bench.step()
    bench.finish()
    for a in asked:
        tokens, reason = expected_output(a)
        _, found = bench.tokens[a.seq_id]
        if bench.reasons[a.seq_id] is Reason.CANCELED:
            assert a.seq_id in canceled
            assert found == tokens[: len(found)]
        else:
            assert (found, bench.reasons[a.seq_id]) == (tokens, reason)
    assert bench.device.most_in_flight == depth + 1
    assert [stats.step for stats in bench.stats] == list(range(1, len(bench.stats) + 1))
    pool = bench.engine.scheduler.pool
    assert pool.num_free + pool.num_cached == pool.num_blocks


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_preempted_sequences_go_on_with_the_same_tokens(depth, start, admit):
    bench = start(num_blocks=12, depth=depth)
    for _ in range(20):
        bench.engine.scheduler.lengths.add(1)
    asked = [admit(i, [i, 40, 41, 42, 43], 30, is_batch=i % 2 == 0) for i in range(1, 6)]
    bench.send(*asked)
    bench.finish()
    assert bench.engine.scheduler.num_preempted_total > 0
    for a in asked:
        assert bench.tokens[a.seq_id][1] == expected_output(a)[0]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_spoilt_sequence_fails_alone_and_its_blocks_are_cleared(depth, start, admit):
    bench = start(depth=depth)
    asked = [admit(1, [5, SPOILT, 7, 8, 9], 9), admit(2, [5, 6], 9)]
    bench.send(*asked)
    bench.finish()
    assert bench.reasons == {1: Reason.FAILED, 2: Reason.LENGTH}
    assert bench.failures == [1]
    assert len(bench.device.cleared) == 2
    assert SPOILT not in bench.device.cache
    assert bench.tokens[2][1] == expected_output(asked[1])[0]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_next_turn_does_not_find_what_a_dead_row_left_out(depth, start, admit):
    # The stop token is at the last place of a block. The row that computes it is dead on a device.
    bench = start(depth=depth)
    prompt = [5, 6, 7]
    stop = next_token(prompt)
    first = admit(1, prompt, 9, stop_token_ids=[stop])
    second = admit(2, [*prompt, stop, 8, 9], 9)
    for asked in (first, second):
        bench.send(asked)
        bench.finish()
        assert bench.tokens[asked.seq_id][1] == expected_output(asked)[0]


def test_frames_come_depth_steps_late_and_say_how_many_were_decoded(start, admit):
    bench = start(depth=2)
    bench.send(admit(1, [5, 6, 7], 6), admit(2, [8], 6))
    for _ in range(2):
        bench.step()
        assert bench.stats == []
    bench.step()
    bench.finish()
    # The lone token of a prompt counts as a decode: it is one row.
    assert [(s.prefill_tokens, s.num_decodes) for s in bench.stats] == [(3, 1)] + [(0, 2)] * 5
    assert all(stats.host_us > 0 for stats in bench.stats)


def test_a_cancel_is_told_at_once_when_nothing_else_is_there(start, admit):
    bench = start(depth=2)
    bench.send(admit(1, [5], 50))
    bench.step()
    bench.send(Cancel(1))
    bench.finish()
    assert bench.reasons == {1: Reason.CANCELED}
    assert bench.tokens[1] == (0, [])
    assert not bench.device.results


@pytest.mark.parametrize("how", ["stop", "gone"])
def test_an_engine_with_steps_in_flight_ends_and_lets_the_device_rest(how, start, admit):
    bench = start(depth=2)
    bench.send(admit(1, [5], 50))
    bench.step()
    bench.step()
    assert len(bench.device.results) == 2
    if how == "stop":
        bench.ours.sendall(frames.pack_command(Stop()))
        bench.engine.run()
    else:
        bench.ours.close()
        with pytest.raises(CourierGone):
            bench.engine.run()
    assert not bench.device.results
