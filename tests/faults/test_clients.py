"""The campaign's own parts: what a client makes of bytes, the main thread's queue, the end of all.

What is here need not be believed: a client that misreads a stream, or a stage that leaves processes
behind, would spoil every scenario.
"""

from __future__ import annotations

import asyncio
import threading

import pytest

from headrace.tests.faults.clients import Followed
from headrace.tests.faults.figures import quantile, slope
from headrace.tests.faults.good_run import good_run
from headrace.tests.faults.main_thread import MainThread


@pytest.mark.parametrize("size", [1, 3, 50, 10_000])
def test_a_client_resumes_after_the_last_complete_event(size):
    events = [event for part in good_run().jobs[0].connections for event in part]
    tokens = [event for event in events if event.name == "token"]
    data = b"retry: 1000\n\n" + b"".join(event.as_bytes() for event in events[:-1]) + b": ping\n\n"
    subscriber = Followed("job", "one")
    for at in range(0, len(data), size):
        subscriber.take(data[at : at + size])
    assert subscriber.last_id == tokens[-1].id
    assert subscriber.worker == "w1"
    assert not subscriber.is_done
    last = events[-1].as_bytes()
    subscriber.take(last[:-1])
    assert not subscriber.is_done, "its blank line has not come"
    subscriber.take(last[-1:])
    assert subscriber.is_done


def test_text_that_looks_like_an_event_is_none():
    subscriber = Followed("job", "one")
    subscriber.take(
        b'event: token\nid: 3\ndata: {"job":"j","text":"\\n\\nevent: succeeded\\n"}\n\n'
    )
    assert (subscriber.last_id, subscriber.is_done) == ("3", False)


def test_calls_are_made_in_the_main_thread_and_errors_go_to_who_asked():
    main = MainThread()

    async def work() -> list[object]:
        assert threading.current_thread() is not threading.main_thread()
        found: list[object] = [await main.call(threading.current_thread)]
        with pytest.raises(ZeroDivisionError):
            await main.call(divmod, 1, 0)
        return [*found, await main.call(divmod, 7, 2)]

    assert main.run(work) == [threading.main_thread(), (3, 1)]


def test_an_interrupt_cancels_the_work_which_may_still_clean_up():
    main = MainThread()
    done: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def work() -> None:
        asking = asyncio.ensure_future(main.call(interrupt))
        try:
            await asyncio.sleep(60)
        finally:
            await main.call(done.append, "cleaned up in the main thread")
            await asyncio.gather(asking, return_exceptions=True)

    with pytest.raises(KeyboardInterrupt):
        main.run(work)
    assert done == ["cleaned up in the main thread"]


def test_what_the_work_raises_is_raised():
    async def work() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        MainThread().run(work)


def test_figures():
    assert quantile([], 0.99) == 0.0
    assert quantile([float(n) for n in range(100)], 0.99) == 99.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert slope([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)]) == pytest.approx(2.0)
    assert slope([(1.0, 1.0), (1.0, 2.0)]) == 0.0
