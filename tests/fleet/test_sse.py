"""The parser of server-sent events."""

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from headrace.fleet.sse import Event, parse_events


def sent(event: Event, end: str = "\n") -> bytes:
    lines = [f"event: {event.name}", f"data: {json.dumps(event.data, ensure_ascii=False)}"]
    if event.id is not None:
        lines.append(f"id: {event.id}")
    return (end.join(lines) + end + end).encode()


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


EVENTS = [
    Event("queued", {"job": "job_1"}),
    Event("token", {"index": 0, "text": "a\u2028b\u0085c\x0bd\r\n漢"}, "0"),
    Event("succeeded", {"status": "succeeded"}, "3.1"),
]


@given(st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_events_come_out_whole_however_the_stream_is_cut(places, end):
    stream = b": ping\n\n" + b"".join(sent(event, end) for event in EVENTS)
    assert list(parse_events(cut(stream, places))) == EVENTS


def test_comments_and_half_an_event_at_the_end_are_dropped():
    stream = b": ping\n\n:\n\n" + sent(EVENTS[0]) + b"event: token\ndata: {}\n"
    assert list(parse_events([stream])) == [EVENTS[0]]


def test_data_over_several_lines_is_joined():
    assert list(parse_events([b'data:{"a":\ndata: 1}\n\n'])) == [Event("message", {"a": 1})]
