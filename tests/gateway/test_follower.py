"""The follower: one connection, many mailboxes, nothing lost without being told."""

import threading
from collections.abc import Callable

import msgspec
import pytest

from headrace.contract import wire
from headrace.contract.errors import QueueUnavailable
from headrace.contract.tokens import LogView
from headrace.contract.wire import WireError
from headrace.gateway.follower import (
    FILL_RECORDS,
    MAX_BYTES,
    MAX_MESSAGES,
    Follower,
    Mailbox,
    size_of,
)
from headrace.gateway.log_place import BEGINNING, LogPlace
from headrace.tests.gateway.courier import chunk_of

JOB = "job_" + "b" * 32


class Scripted:
    """A subscription and log whose answers are scripted: for faults no server makes on demand."""

    def __init__(self, *steps: Callable[[], list[wire.StreamMessage]]) -> None:
        self._steps = list(steps)
        self.opened = 0
        self.asked: list[list[tuple[str, str]]] = []
        self.left: list[str] = []
        self.is_asking_refused = False
        self.ran_out = threading.Event()
        self.may_begin = threading.Event()
        self.log: list[wire.TokenChunk] = []
        self.read: list[tuple[str, str, int]] = []
        self.before_answer: Callable[[], None] = lambda: None
        self.boxes: list[Mailbox] = []

    def open(self) -> None:
        assert self.may_begin.wait(10)
        self.opened += 1

    def messages(self, timeout_s: float) -> list[wire.StreamMessage]:
        if self._steps:
            return self._steps.pop(0)()
        self.ran_out.wait(0.01)
        self.ran_out.set()
        return []

    def close(self) -> None: ...

    def read_each(self, places: list[tuple[str, str, int]], count: int) -> list[LogView]:
        self.read += places
        self.before_answer()
        return [
            LogView(tuple(self.log[begin : begin + count]), None, len(self.log[begin:][:count]))
            for _, _, begin in places
        ]

    def subscribe(self, shard: str, jobs: list[tuple[str, str]]) -> None:
        if self.is_asking_refused:
            raise QueueUnavailable("away")
        self.asked.append(list(jobs))

    def unsubscribe(self, shard: str, model: str, job: str) -> None:
        self.left.append(job)


@pytest.fixture
def follow():
    """Run a follower over a script until it ran out; returns the mailbox."""
    made: list[Follower] = []

    def run(script: Scripted, place: LogPlace | None = None) -> Mailbox:
        follower = Follower(script, script, "gw_test")  # pyright: ignore[reportArgumentType]
        made.append(follower)
        with follower.follow("m", JOB) as box:
            box.place = place
            script.boxes.append(box)
            script.may_begin.set()
            assert script.ran_out.wait(10)
            return box

    yield run
    for follower in made:
        follower.close()


def fails(error: Exception) -> Callable[[], list[wire.StreamMessage]]:
    def step() -> list[wire.StreamMessage]:
        raise error

    return step


def test_messages_reach_the_mailbox_of_their_job_only(follow):
    mine, other = chunk_of(JOB, 0, 2), chunk_of("job_" + "c" * 32, 0, 2)
    box = follow(Scripted(lambda: [other, mine]))
    assert box.take(1) == [mine]


@pytest.mark.parametrize("error", [QueueUnavailable("gone"), RuntimeError("unforeseen")])
def test_invariant_3_a_lost_connection_is_opened_again_and_all_are_behind(follow, error, caplog):
    script = Scripted(fails(error))
    box = follow(script)
    assert script.opened == 2
    assert box.is_behind
    assert script.asked[-1] == [("m", JOB)]  # asked again: Redis may have forgotten
    assert "follower." in caplog.text


def test_invariant_3_what_was_missed_is_read_on_from_the_owners_place(follow):
    script = Scripted()
    script.log = [chunk_of(JOB, index, 1) for index in range(6)]
    place = BEGINNING.after(script.log[0]).after(script.log[1]).after(script.log[2])
    box = follow(script, place)
    assert script.read == [("m", JOB, 2)]
    assert box.take(1) == script.log[3:]
    assert not box.is_behind


def test_nothing_is_missed_where_the_log_is_as_it_was(follow):
    script = Scripted()
    script.log = [chunk_of(JOB, 0, 1)]
    box = follow(script, BEGINNING.after(script.log[0]))
    assert box._messages.empty(), "its owner is not even woken"
    assert not box.is_behind


@pytest.mark.parametrize("how", ["another log", "a long gap"])
def test_invariant_3_where_reading_on_is_not_enough_the_owner_is_told(follow, how):
    script = Scripted()
    script.log = [chunk_of(JOB, index, 1) for index in range(FILL_RECORDS + 5)]
    place = BEGINNING.after(script.log[0])
    if how == "another log":
        script.log = [chunk_of(JOB, 0, 1, gen=1)]
    assert follow(script, place).is_behind


def test_invariant_3_who_read_the_log_meanwhile_is_given_nothing(follow):
    script = Scripted()
    script.log = [chunk_of(JOB, index, 1) for index in range(4)]
    script.before_answer = lambda: script.boxes[0].catch_up()
    box = follow(script, BEGINNING.after(script.log[0]))
    assert box._messages.empty()
    assert not box.is_behind


def test_a_frame_of_another_version_makes_all_read_the_log(follow, caplog):
    script = Scripted(list, fails(WireError("v9")))
    box = follow(script)
    assert script.opened == 1
    assert box.is_behind
    assert "frame.refused" in caplog.text


def test_a_wish_that_redis_did_not_hear_makes_the_mailbox_behind():
    script = Scripted()
    script.is_asking_refused = True
    script.may_begin.set()
    follower = Follower(script, script, "gw_test")  # pyright: ignore[reportArgumentType]
    with follower.follow("m", JOB) as box:
        assert box.is_behind
    follower.close()


def test_the_last_to_leave_takes_the_wish_back():
    script = Scripted()
    script.may_begin.set()
    follower = Follower(script, script, "gw_test")  # pyright: ignore[reportArgumentType]
    with follower.follow("m", JOB):
        with follower.follow("m", JOB):
            pass
        assert script.left == []
    assert script.left == [JOB]
    follower.close()


def test_closing_ends_all_streams_and_lets_nobody_in():
    script = Scripted()
    script.may_begin.set()
    follower = Follower(script, script, "gw_test")  # pyright: ignore[reportArgumentType]
    with follower.follow("m", JOB) as box:
        follower.close()
        assert box.take(10) == []
        assert box.is_closed
        with follower.follow("m", JOB) as late:
            assert late.is_closed


def test_invariant_2_a_mailbox_that_overflows_is_emptied_and_says_so():
    box = Mailbox("m", JOB)
    for index in range(MAX_MESSAGES):
        box.put(chunk_of(JOB, index, 1))
    assert not box.is_behind
    for index in range(MAX_MESSAGES, MAX_MESSAGES + 10):
        box.put(chunk_of(JOB, index, 1))
    assert box.is_behind
    assert box.take(10) == [], "woken at once, and nothing is kept meanwhile"
    box.catch_up()
    assert not box.is_behind
    box.put(late := chunk_of(JOB, 999, 1))
    assert box.take(1) == [late]


def test_invariant_2_bytes_fill_a_mailbox_as_well():
    box, chunk = Mailbox("m", JOB), chunk_of(JOB, 0, 200)
    num_bytes = size_of(chunk)
    assert num_bytes > 200 * 64
    for _ in range(MAX_BYTES // num_bytes):
        box.put(chunk, num_bytes)
    assert not box.is_behind
    box.put(chunk, num_bytes)
    assert box.is_behind
    assert box.take(1) == []


def test_one_message_larger_than_a_mailbox_is_still_passed_on():
    box, chunk = Mailbox("m", JOB), chunk_of(JOB, 0, 1)
    box.put(chunk, MAX_BYTES + 1)
    assert box.take(1) == [chunk]
    box.put(chunk, MAX_BYTES + 1)
    assert box.take(1) == [chunk], "what was taken counts no more"


def test_logprobs_weigh():
    plain = chunk_of(JOB, 0, 4)
    tops = (wire.TokenLogprobs(-0.5, tuple((n, -1.0) for n in range(20))),) * 4
    assert size_of(msgspec.structs.replace(plain, logprobs=tops)) > size_of(plain) + 80 * 100


def test_catching_up_notices_what_is_lost_while_it_drains():
    box = Mailbox("m", JOB)
    box.put(chunk_of(JOB, 0, 1))
    box.catch_up()
    box.wake_behind()
    assert box.take(1) == []
    assert box.is_behind
