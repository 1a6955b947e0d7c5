"""Wire messages: bytes pinned by tests/golden/, closed to unknown fields and other versions.

After a change that is meant, tests/golden/messages.py writes the files anew: the diff shows it.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract import wire
from headrace.tests.golden.messages import FOLDER, MESSAGES


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_invariant_4_the_bytes_of_each_message_are_pinned(name):
    pinned = (FOLDER / f"{name}.msgpack").read_bytes()
    assert wire.encode(MESSAGES[name]) == pinned
    assert wire.decode(pinned) == MESSAGES[name]


def test_every_message_has_a_golden_file_and_every_file_a_message():
    assert {path.stem for path in FOLDER.glob("*.msgpack")} == set(MESSAGES)
    assert {type(m) for m in MESSAGES.values()} == set(wire.Message.__args__)


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_invariant_1_unknown_fields_and_other_versions_are_refused(name):
    fields = msgspec.msgpack.decode(wire.encode(MESSAGES[name]))
    assert fields["v"] == wire.VERSION
    with pytest.raises(wire.WireError, match="unknown field"):
        wire.decode(msgspec.msgpack.encode(fields | {"colour": "red"}))
    with pytest.raises(wire.WireError, match="version 2; this process speaks 1"):
        wire.decode(msgspec.msgpack.encode(fields | {"v": 2}))
    with pytest.raises(wire.WireError):
        wire.decode(msgspec.msgpack.encode(fields | {"job": 5, "worker": 5}))
    with pytest.raises(wire.WireError):
        wire.decode(msgspec.msgpack.encode(fields | {"type": "else"}))


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_a_message_cut_short_is_refused(name):
    data = wire.encode(MESSAGES[name])
    for size in range(len(data)):
        with pytest.raises(wire.WireError):
            wire.decode(data[:size])


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data):
    with pytest.raises(wire.WireError):
        wire.decode(data)


def test_a_text_that_is_not_utf8_is_refused():
    data = wire.encode(MESSAGES["tokens"])
    with pytest.raises(wire.WireError):
        wire.decode(data.replace("é".encode(), b"\xff\xfe"))


def test_a_jobs_stream_holds_only_its_messages():
    for name in ("job", "beat"):
        with pytest.raises(wire.WireError, match="does not belong"):
            wire.decode_stream(wire.encode(MESSAGES[name]))
    for name in ("tokens", "started", "end"):
        assert wire.decode_stream(wire.encode(MESSAGES[name])) == MESSAGES[name]


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_a_frame_splits_into_its_messages(parts):
    frame = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert list(wire.split_frame(frame)) == parts


def test_a_frame_cut_short_is_refused():
    frame = (5).to_bytes(4, "big") + b"hello" + (9).to_bytes(4, "big") + b"wor"
    for size in (3, 8, len(frame)):
        with pytest.raises(wire.WireError, match="frame"):
            list(wire.split_frame(frame[:size]))


def test_states_know_which_are_ends():
    assert [s.value for s in wire.JobStatus if not s.is_terminal] == ["queued", "running"]
