"""Work for the main thread, asked for by the campaign's event loop.

Processes are tied to the thread that starts them (fleet.child), and starting a server takes
seconds. So the event loop, which holds the clients, runs in a thread of its own, and the main
thread does what the loop asks for, one thing after another. Clients go on seeing an outage while
it lasts, and no stream's pause is one of the campaign itself.

Called by: campaign (run), stage (`call`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_Work = tuple[Callable[[], Any], concurrent.futures.Future[Any]]


class MainThread:
    """A queue of calls, served by the thread that calls `run`."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()

    async def call(self, work: Callable[..., T], *args: object, **kwargs: object) -> T:
        """Do `work` in the main thread and return what it returns; called in the loop."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._work.put((lambda: work(*args, **kwargs), future))
        return await asyncio.wrap_future(future)

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `main` in a loop of another thread and serve its calls; Ctrl-C cancels it."""
        assert threading.current_thread() is threading.main_thread()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        loop = asyncio.new_event_loop()
        task = loop.create_task(main())
        thread = threading.Thread(target=self._run_loop, args=(loop, task, done), name="clients")
        thread.start()
        try:
            self._serve()
        except BaseException:
            loop.call_soon_threadsafe(task.cancel)
            self._serve()  # what it needs to end
            raise
        finally:
            thread.join()
        return done.result()

    def _run_loop(
        self,
        loop: asyncio.AbstractEventLoop,
        task: asyncio.Task[T],
        done: concurrent.futures.Future[T],
    ) -> None:
        try:
            done.set_result(loop.run_until_complete(task))
        except BaseException as error:  # noqa: BLE001  handed to the main thread
            done.set_exception(error)
        finally:
            self._work.put(None)
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            call, future = work
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001  belongs to who asked
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(RuntimeError("the campaign was stopped"))
                raise error
