"""The cursor: whatever arrives, every index is given once and in order (design invariant 4)."""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contract import wire
from headrace.contract.errors import InvalidEventId
from headrace.contract.wire import FinishReason, JobStatus
from headrace.gateway.cursor import MAX_EVENT_TOKENS, Event, Resume, StreamCursor, parse_event_id
from headrace.tests.gateway.courier import chunk_of, token_text

JOB = "job_" + "a" * 32


def end(num_tokens: int, *, gen: int = 0) -> wire.JobEnd:
    return wire.JobEnd(
        job=JOB,
        gen=gen,
        next=num_tokens,
        status=JobStatus.SUCCEEDED,
        finish_reason=FinishReason.STOP,
        prompt_tokens=1,
        cached_tokens=0,
    )


def started(attempt: int, next_index: int, *, gen: int = 0) -> wire.JobStarted:
    return wire.JobStarted(job=JOB, attempt=attempt, gen=gen, next=next_index, worker="w")


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


@dataclass
class Client:
    """What a subscriber makes of events; it fails on the first that contradicts the last."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    terminal: str | None = None
    resets: int = 0

    def see(self, events: list[Event]) -> None:
        for event in events:
            assert self.terminal is None, "nothing follows the terminal event"
            if event.name == "token":
                assert event.data["index"] == len(self.ids)
                assert event.data["count"] == len(event.data["token_ids"])
                self.ids += event.data["token_ids"]
                self.text += event.data["text"]
                assert event.id is not None
                assert event.id.split(".")[0] == str(len(self.ids) - 1)
            elif event.name == "reset":
                self.ids, self.text = [], ""
                self.resets += 1
            elif event.name == "succeeded":
                self.terminal = event.name
                assert event.data["usage"]["completion_tokens"] == len(self.ids)


@dataclass
class Life:
    """A job as it happened: the log after each message, and the messages in order."""

    messages: list[wire.StreamMessage]
    logs: list[list[wire.StreamMessage]]  # logs[i]: the log once message i was published
    gens: int


@st.composite
def lives(draw: st.DrawFn) -> Life:
    """One to three attempts; one may find its log lost and begin a new one."""
    messages: list[wire.StreamMessage] = []
    logs: list[list[wire.StreamMessage]] = []
    log: list[wire.StreamMessage] = []
    gen = next_index = gens = 0

    def publish(message: wire.StreamMessage, *, is_logged: bool = True) -> None:
        nonlocal log
        if is_logged:
            log = [*log, message]
        messages.append(message)
        logs.append(log)

    for attempt in range(1, draw(st.integers(1, 3)) + 1):
        if attempt > 1 and draw(st.booleans()):
            gen, log, next_index = attempt - 1, [], 0
            gens += 1
        publish(started(attempt, next_index, gen=gen), is_logged=False)
        for count in draw(st.lists(st.integers(1, 5), max_size=6)):
            publish(chunk_of(JOB, next_index, count, attempt=attempt, gen=gen))
            next_index += count
    publish(end(next_index, gen=gen))
    return Life(messages, logs, gens)


@given(lives(), st.data())
def test_invariant_4_any_loss_repeat_and_order_gives_each_index_once(life: Life, data):
    """Frames are lost, doubled and reordered; gaps are filled from the log as it is then."""
    cursor, client = StreamCursor(JOB, Resume()), Client()
    arrivals = data.draw(
        st.lists(st.integers(0, len(life.messages) - 1), max_size=3 * len(life.messages))
    )
    newest = 0  # what is in the log by now: nothing can arrive that was not logged before
    for index in arrivals:
        newest = max(newest, index)
        client.see(cursor.take(life.messages[index]))
        if cursor.is_behind:
            cursor.is_behind = False
            for message in life.logs[newest]:
                client.see(cursor.take(message))
            assert not cursor.is_behind
    for message in life.logs[-1]:  # the check after a silence
        client.see(cursor.take(message))
    whole = [message for message in life.logs[-1] if isinstance(message, wire.TokenChunk)]
    assert client.ids == [token_id for chunk in whole for token_id in chunk.ids]
    assert client.text == "".join(chunk.text for chunk in whole)
    assert client.terminal == "succeeded"
    assert client.resets <= life.gens


@given(st.integers(0, 20), st.lists(st.integers(1, 6), max_size=6))
def test_resuming_at_any_index_gives_exactly_the_rest(after: int, counts: list[int]):
    total = sum(counts)
    after = min(after, total)
    cursor = StreamCursor(JOB, Resume(after, 0))
    events, first = [], 0
    for count in counts:
        events += cursor.take(chunk_of(JOB, first, count))
        first += count
    events += cursor.take(end(total))
    ids = [i for event in events if event.name == "token" for i in event.data["token_ids"]]
    assert ids == list(range(100 + after, 100 + total))
    assert names(events)[-1] == "succeeded"
    assert "reset" not in names(events)


def test_a_gap_is_not_sent_but_asks_for_the_log():
    cursor = StreamCursor(JOB, Resume())
    assert cursor.take(chunk_of(JOB, 2, 1)) == []
    assert cursor.is_behind
    assert cursor.take(end(3)) == []
    assert not cursor.is_done


def test_a_higher_gen_resets_before_its_tokens():
    cursor = StreamCursor(JOB, Resume())
    cursor.take(chunk_of(JOB, 0, 2))
    events = cursor.take(chunk_of(JOB, 0, 1, attempt=2, gen=1))
    assert names(events) == ["reset", "token"]
    assert events[1].id == "0.1"
    assert cursor.take(chunk_of(JOB, 2, 1)) == []  # of the old log


def test_who_has_nothing_is_not_told_of_a_reset():
    cursor = StreamCursor(JOB, Resume())
    assert names(cursor.take(chunk_of(JOB, 0, 1, attempt=3, gen=2))) == ["token"]


def test_a_claim_of_another_log_is_reset_at_first_contact():
    for claimed, found in ((3, 0), (0, 3)):
        cursor = StreamCursor(JOB, Resume(5, claimed))
        events = cursor.take(chunk_of(JOB, 0, 6, gen=found))
        assert names(events) == ["reset", "token"]
        assert events[1].data["index"] == 0


def test_a_log_shorter_than_the_claim_resets():
    cursor = StreamCursor(JOB, Resume(5, 0))
    assert names(cursor.meet(0, 3)) == ["reset"]
    assert cursor.next == 0
    assert cursor.is_behind


def test_an_attempt_that_goes_on_before_what_was_sent_resets():
    cursor = StreamCursor(JOB, Resume())
    cursor.take(chunk_of(JOB, 0, 5))
    assert names(cursor.take(started(2, 3))) == ["reset", "started"]
    assert cursor.is_behind


def test_a_newer_attempt_that_makes_sent_tokens_again_resets_though_its_start_was_lost():
    cursor = StreamCursor(JOB, Resume())
    cursor.take(chunk_of(JOB, 0, 5))
    assert names(cursor.take(chunk_of(JOB, 3, 4, attempt=2))) == ["reset"]
    assert cursor.is_behind
    log = [chunk_of(JOB, 0, 3), chunk_of(JOB, 3, 4, attempt=2)]
    events = [event for chunk in log for event in cursor.take(chunk)]
    assert [event.data["index"] for event in events] == [0, 3]


def row_of(attempt: int, ids: list[int]) -> Any:
    """Return the row of a job that an attempt has ended, as the cursor reads it."""
    return {
        "id": JOB,
        "attempt": attempt,
        "status": "succeeded",
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "output_gen": 0,
        "output_token_ids": ids,
        "output_text": "".join(token_text(i) for i in range(len(ids))),
        "output_ends": list(accumulate(len(token_text(i)) for i in range(len(ids)))),
        "output_logprobs": None,
        "error_code": None,
        "error_text": None,
    }


@pytest.mark.parametrize("resume", [Resume(), Resume(2, 0)])
@pytest.mark.parametrize("num_more", [0, 3])
def test_an_attempt_that_only_its_row_tells_of_went_on_where_the_log_stops(resume, num_more):
    # A partition: the attempt before is cut off, the next one's frames are lost or held no token.
    cursor = StreamCursor(JOB, resume)
    first = chunk_of(JOB, 0, 5)
    cursor.take(first)
    row = row_of(3, [*first.ids, *range(7000, 7000 + num_more)])
    events = cursor.take_row(row)
    assert names(events) == (["token"] if num_more else []) + ["succeeded"]
    assert cursor.next == 5 + num_more


@pytest.mark.parametrize("resume", [Resume(), Resume(2, 0)])
def test_a_row_that_contradicts_what_was_sent_resets(resume):
    cursor = StreamCursor(JOB, resume)
    cursor.take(chunk_of(JOB, 0, 5))
    client = Client()
    events = cursor.take_row(row_of(2, [7000 + i for i in range(6)]))
    assert names(events) == ["reset", "token", "succeeded"]
    client.see(events)
    assert client.ids == [7000 + i for i in range(6)]


def test_a_late_start_message_resets_nothing():
    cursor = StreamCursor(JOB, Resume())
    cursor.take(chunk_of(JOB, 0, 5))
    cursor.take(chunk_of(JOB, 5, 5, attempt=2))
    assert names(cursor.take(started(2, 5))) == ["started"]
    assert cursor.next == 10


def test_an_end_with_fewer_tokens_than_were_sent_says_so():
    cursor = StreamCursor(JOB, Resume())
    cursor.take(chunk_of(JOB, 0, 5))
    assert names(cursor.take(end(0))) == ["reset", "succeeded"]


def test_a_start_is_told_once():
    cursor = StreamCursor(JOB, Resume())
    assert names(cursor.told(1, "w")) == ["started"]
    assert cursor.take(started(1, 0)) == []
    assert names(cursor.take(started(2, 0))) == ["started"]


def test_long_chunks_become_several_events():
    cursor = StreamCursor(JOB, Resume())
    count = 2 * MAX_EVENT_TOKENS + 1
    events = cursor.take(chunk_of(JOB, 0, count))
    assert [event.data["count"] for event in events] == [MAX_EVENT_TOKENS, MAX_EVENT_TOKENS, 1]
    client = Client()
    client.see(events)
    assert client.text == chunk_of(JOB, 0, count).text


@pytest.mark.parametrize(
    ("text", "resume"),
    [
        ("-1", Resume()),
        ("0", Resume(1, 0)),
        ("41", Resume(42, 0)),
        ("41.3", Resume(42, 3)),
        ("-1.3", Resume()),
        ("7.0", Resume(8, 0)),
    ],
)
def test_event_ids_are_read_back(text: str, resume: Resume):
    assert parse_event_id(text) == resume


@pytest.mark.parametrize(
    "text", ["", "-2", "01", "1.", ".1", "1.2.3", "1e3", " 1", "1 ", "x", "9" * 10, "1.-1", "٣"]
)
def test_other_event_ids_are_refused(text: str):
    with pytest.raises(InvalidEventId):
        parse_event_id(text)
