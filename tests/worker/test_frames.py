"""frames.py: the numbered invariants, and what broken peers get."""

import itertools
import socket
import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker import frames


def make_entries(*rows):
    entries = np.zeros(len(rows), frames.ENTRY)
    for entry, (seq_id, token, index, reason, num_logprobs) in zip(entries, rows, strict=True):
        entry["seq_id"], entry["token"], entry["index"] = seq_id, token, index
        entry["reason"], entry["num_logprobs"], entry["cached_tokens"] = reason, num_logprobs, 64
    return entries


def read_all(data, cuts=()):
    reader, found = frames.FrameReader(), []
    edges = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        reader.feed(data[start:end])
        found += [(kind, bytes(payload)) for kind, payload in reader.frames()]
    return found


@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_invariant_1_frames_come_back_whole_however_the_bytes_are_cut(payloads, data):
    stream = b"".join(frames.pack_frame(frames.Kind.COMMAND, p) for p in payloads)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert read_all(stream, cuts) == [(frames.Kind.COMMAND, p) for p in payloads]


def test_invariants_2_and_3_a_full_socket_keeps_frames_back_in_order():
    left, right = socket.socketpair()
    with left, right:
        writer = frames.FrameWriter(left, max_backlog_bytes=1 << 20)
        sent = [frames.pack_frame(frames.Kind.STEP, bytes([i]) * 50_000) for i in range(60)]
        for frame in sent:
            writer.send(frame)
        assert writer.is_full
        reader, found = frames.FrameReader(), []
        while len(found) < len(sent):
            assert reader.receive(right)
            found += [bytes(payload) for _, payload in reader.frames()]
            writer.flush()
        assert found == [frame[5:] for frame in sent]
        assert writer.backlog_bytes == 0
        assert not writer.is_full


def test_invariant_4_a_step_comes_back_with_every_field():
    stats = frames.StepStats(*range(1, 17))
    assert len(msgspec.structs.fields(stats)) == 16
    stats.room_tokens = -5
    entries = make_entries(
        (2**63, 7, 0, 0, -1), (5, -1, 9, 3, -1), (6, 8, 1, 2, 2), (7, 1, 0, 0, 0)
    )
    tail = [
        (-0.5, np.array([8, 3]), np.array([-0.5, -1.25])),
        (-2.0, np.array([], int), np.array([])),
    ]
    ((kind, payload),) = read_all(frames.pack_step(stats, entries, tail))
    step = frames.unpack(kind, memoryview(payload))
    assert step.stats == stats
    assert (step.entries == entries).all()
    assert step.logprobs == [(-0.5, [(8, -0.5), (3, -1.25)]), (-2.0, [])]


@pytest.mark.parametrize("cut", [1, 20, 60, 97])
def test_invariant_4_a_step_of_the_wrong_size_is_refused(cut):
    packed = frames.pack_step(
        frames.StepStats(), make_entries((1, 7, 0, 0, 1)), [(-0.5, np.array([8]), np.array([-0.5]))]
    )[5:]
    with pytest.raises(frames.FrameError):
        frames.unpack_step(memoryview(packed[:-cut]))
    with pytest.raises(frames.FrameError):
        frames.unpack_step(memoryview(packed + b"x"))


def test_commands_and_notices_come_back_equal():
    params = frames.SamplingParams(seed=-3, logit_bias={5: -100.0}, logprobs=0)
    commands = [
        frames.Admit(1, b"\1\0\0\0", b"", params, 16, [2], True, b"tenant"),
        frames.Cancel(1),
        frames.Stop(),
    ]
    stage = frames.StartStage("weights", 0.25, 1 << 34)
    notices = [
        frames.Ready(8, 64, 512, 100, "float32", 0.5, "cuda", 32, [stage]),
        frames.Fatal("out_of_memory", "text"),
        frames.Failure(1, "never_fits", "text"),
    ]
    stream = b"".join([*map(frames.pack_command, commands), *map(frames.pack_notice, notices)])
    found = [frames.unpack(kind, memoryview(payload)) for kind, payload in read_all(stream)]
    assert found == [*commands, *notices]


@pytest.mark.parametrize(
    ("kind", "payload"), [(1, b"\xc1"), (1, b"\x92\x09\x01"), (99, b""), (2, b"\x80"), (4, b"")]
)
def test_what_is_no_frame_of_ours_is_refused(kind, payload):
    with pytest.raises(frames.FrameError):
        frames.unpack(kind, memoryview(payload))


def test_an_absurd_length_is_refused_before_memory_is_taken():
    reader = frames.FrameReader()
    reader.feed(struct.pack("<IB", frames.MAX_FRAME_BYTES + 1, 1))
    with pytest.raises(frames.FrameError, match="announced"):
        list(reader.frames())


def test_a_peer_that_is_gone_is_noticed_by_reader_and_writer():
    left, right = socket.socketpair()
    with left:
        right.close()
        assert frames.FrameReader().receive(left) is False
        with pytest.raises(ConnectionError):
            frames.FrameWriter(left).send(frames.pack_command(frames.Stop()))
