"""The feed: merge patches, one reader for all, slow listeners, the end of session and process."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract.errors import QueueUnavailable
from headrace.contract.roles import Role
from headrace.gateway.dashboard import feed as feed_module
from headrace.gateway.dashboard.feed import Feed, Paced, merge_patch
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL

PATIENCE_S = 20

values = st.recursive(
    st.none() | st.integers(-3, 3) | st.lists(st.integers(0, 2), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)
states = st.dictionaries(st.sampled_from("abc"), values, max_size=3)


def merged(old, patch):
    """Apply a patch as RFC 7396 and static/live.js do."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def without_nulls(value):
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(one) for name, one in value.items() if one is not None}


@given(states, states)
def test_a_patch_makes_the_old_state_the_new_one(old, new):
    assert without_nulls(merged(old, merge_patch(old, new))) == without_nulls(new)


@given(states)
def test_nothing_changed_is_nothing_sent(state):
    assert merge_patch(state, state) == {}


# -- listeners -------------------------------------------------------------------------------


class Source:
    """A section whose figures the test sets, and that counts its readings."""

    def __init__(self) -> None:
        self.value = {"num": 0}
        self.num_readings = 0

    def __call__(self):
        self.num_readings += 1
        return dict(self.value)


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def closing():
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def feed(source, closing, monkeypatch):
    monkeypatch.setattr(feed_module, "EVERY_S", 0.01)
    return Feed({"overview": source}, closing)


def listen(feed, may_listen=lambda: True):
    stream = feed.stream(may_listen=may_listen, heartbeat_s=PATIENCE_S)
    assert next(stream).startswith(b"retry: ")
    return stream


def event_of(data):
    head, body = data.decode().strip().split("\n")
    return head.removeprefix("event: "), json.loads(body.removeprefix("data: "))


def wait_for(stream, wanted):
    """Follow until the condition holds for the state; return it and the events' names."""
    state, names = {}, []
    deadline = time.monotonic() + PATIENCE_S
    for data in stream:
        assert time.monotonic() < deadline
        name, patch = event_of(data)
        names.append(name)
        state = patch if name == "state" else merged(state, patch)
        if wanted(state):
            return state, names
    raise AssertionError(f"the stream ended at {state}")


def test_a_listener_gets_the_state_and_then_what_changed(feed, source):
    stream = listen(feed)
    _, names = wait_for(stream, lambda state: state["overview"]["num"] == 0)
    assert names == ["state"]
    source.value = {"num": 7, "new": {"deep": 1}}
    name, patch = event_of(next(data for data in stream if b"deep" in data))
    assert name == "delta"
    assert patch["overview"] == {"num": 7, "new": {"deep": 1}}
    assert patch["now"]


def test_a_late_listener_gets_the_whole_state_at_once(feed, source):
    first = listen(feed)
    wait_for(first, lambda state: "overview" in state)
    second = listen(feed)
    state, names = wait_for(second, lambda state: True)
    assert names == ["state"]
    assert state["overview"] == {"num": 0}


def test_invariant_1_many_listeners_cost_one_reader_that_ends_with_them(feed, source):
    streams = [listen(feed) for _ in range(20)]
    for stream in streams:
        wait_for(stream, lambda state: "overview" in state)
    source.value = {"num": 1}
    for stream in streams:
        wait_for(stream, lambda state: state.get("overview", {}).get("num") == 1)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("feed") == 1
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + PATIENCE_S
    while any(thread.name == "feed" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
    num_readings = source.num_readings
    wait_for(listen(feed), lambda state: "overview" in state)
    assert source.num_readings > num_readings


def test_invariant_2_a_listener_that_does_not_read_is_given_a_whole_state(
    feed, source, monkeypatch
):
    monkeypatch.setattr(feed_module, "MAX_BEHIND", 3)
    slow, quick = listen(feed), listen(feed)
    next(slow)
    for number in range(1, 12):
        source.value = {"num": number}
        wait_for(quick, lambda state, number=number: state.get("overview", {}).get("num") == number)
    _, names = wait_for(slow, lambda state: state.get("overview", {}).get("num") == 11)
    assert "state" in names
    assert len(names) <= 4


def test_invariant_3_a_section_that_takes_long_comes_less_often(monkeypatch):
    now, num = [100.0], [0]

    def read():
        now[0] += 0.1
        num[0] += 1
        return {"num": num[0]}

    monkeypatch.setattr(feed_module.time, "monotonic", lambda: now[0])
    paced = Paced(read, share=0.02)
    seen = []
    while now[0] < 120:
        seen.append(paced()["num"])
        now[0] += 1
    assert num[0] == 4  # every five seconds
    assert seen == sorted(seen)


def test_a_section_whose_store_is_away_repeats_itself():
    answers = iter([{"w1": {}}, None])

    def read():
        found = next(answers)
        if found is None:
            raise QueueUnavailable("away")
        return found

    paced = Paced(read, share=1000)
    assert paced() == paced() == {"w1": {}}


def test_a_fault_of_a_section_ends_no_feed(feed, source, caplog):
    stream = listen(feed)
    wait_for(stream, lambda state: "overview" in state)
    source.value = 5  # dict(5) raises
    deadline = time.monotonic() + PATIENCE_S
    while "feed.failed" not in caplog.text:
        assert time.monotonic() < deadline
    source.value = {"num": 9}
    assert b'"num":9' in next(data for data in stream if b"num" in data)


def test_invariant_4_a_feed_ends_with_its_session(feed, monkeypatch):
    monkeypatch.setattr(feed_module, "CHECK_S", 0.05)
    allowed = threading.Event()
    allowed.set()
    stream = listen(feed, allowed.is_set)
    wait_for(stream, lambda state: "overview" in state)
    allowed.clear()
    for _ in stream:
        pass  # until it ends by itself


def test_invariant_4_a_feed_ends_when_the_process_stops(feed, closing):
    stream = listen(feed)
    wait_for(stream, lambda state: "overview" in state)
    closing.set()
    for _ in stream:
        pass
    late = listen(feed)
    assert list(late) == []


# -- over HTTP -------------------------------------------------------------------------------


def test_the_feed_carries_overview_workers_and_queues(app, services, courier, client):
    key = services.accounts.create_key(tenant="mine", name="viewer", role=Role.VIEWER)
    client.post("/v1/jobs", json={"model": MODEL, "prompt": "a secret prompt"})
    answer = client_of(app, key).get("/v1/admin/feed", buffered=False)
    assert answer.status_code == 200
    assert answer.content_type.startswith("text/event-stream")
    chunks = iter(answer.response)
    assert next(chunks).startswith(b"retry: ")
    name, state = event_of(next(chunks))
    assert name == "state"
    assert state["overview"]["redis"] == "up"
    assert state["workers"] == {}
    (queue,) = state["queues"].values()
    assert queue["num_queued"] == 1
    assert list(state["queues"]) == [f"{MODEL}|interactive|{queue['tenant_id']}"]
    assert "secret" not in json.dumps(state)
    services.accounts.revoke_key(key.id)
    answer.close()


def test_the_feed_is_not_for_a_tenants_key(client):
    assert client.get("/v1/admin/feed").status_code == 403
    assert client.get("/v1/admin/overview").status_code == 403
