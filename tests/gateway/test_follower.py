"""The follower: one connection, many mailboxes, nothing lost without being told."""

import threading
from collections.abc import Callable

import msgspec
import pytest

from headrace.contract import wire
from headrace.contract.errors import QueueUnavailable
from headrace.contract.wire import WireError
from headrace.gateway.follower import MAX_BYTES, MAX_MESSAGES, Follower, Mailbox, size_of
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

    def open(self) -> None:
        self.opened += 1

    def messages(self, timeout_s: float) -> list[wire.StreamMessage]:
        if self._steps:
            return self._steps.pop(0)()
        self.ran_out.wait(0.01)
        self.ran_out.set()
        return []

    def close(self) -> None: ...

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

    def run(script: Scripted) -> Mailbox:
        follower = Follower(script, script, "gw_test")  # pyright: ignore[reportArgumentType]
        made.append(follower)
        with follower.follow("m", JOB) as box:
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


def test_a_frame_of_another_version_makes_all_read_the_log(follow, caplog):
    script = Scripted(list, fails(WireError("v9")))
    box = follow(script)
    assert script.opened == 1
    assert box.is_behind
    assert "frame.refused" in caplog.text


def test_a_wish_that_redis_did_not_hear_makes_the_mailbox_behind():
    script = Scripted()
    script.is_asking_refused = True
    follower = Follower(script, script, "gw_test")  # pyright: ignore[reportArgumentType]
    with follower.follow("m", JOB) as box:
        assert box.is_behind
    follower.close()


def test_the_last_to_leave_takes_the_wish_back():
    script = Scripted()
    follower = Follower(script, script, "gw_test")  # pyright: ignore[reportArgumentType]
    with follower.follow("m", JOB):
        with follower.follow("m", JOB):
            pass
        assert script.left == []
    assert script.left == [JOB]
    follower.close()


def test_closing_ends_all_streams_and_lets_nobody_in():
    script = Scripted()
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
