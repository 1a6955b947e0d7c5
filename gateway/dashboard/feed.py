"""The live figures, sent to every open dashboard: one reader a process, whatever their number.

The first event is `state`, everything; then come `delta`s, about once a second: JSON merge patches
(RFC 7396: objects merge, null deletes). `now` changes every second, so a page that hears nothing
for some seconds knows that its figures are old.

    {"now": "...", "overview": {...}, "workers": {"<worker>": {...}}, "queues": {"<key>": {...}}}

Invariants:
1. The reader runs only while somebody listens, and reads and encodes once for all of them.
2. A listener's mailbox is bounded: one that does not take its deltas gets a whole state instead.
3. Sections that take long to read come less often (SHARE of the time), so ten thousand queues slow
   the figures down and not the gateway.
4. A feed ends when its session or key no longer holds, within CHECK_S, and when the process stops.

Locks, threads and queues are the standard library's: gunicorn's gevent worker makes them greenlets.

Called by: live_routes.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from headrace.contract import log
from headrace.contract.errors import Unavailable
from headrace.gateway.dashboard.alarms import iso

#: Seconds between two readings.
EVERY_S = 1.0
#: Most of the time that reading one section may take.
SHARE = 0.02
#: Seconds it may pause for that; reading also takes long while a store is away.
MAX_PAUSE_S = 10.0
#: Deltas a listener may be behind.
MAX_BEHIND = 30
#: Seconds between two looks at whether a listener may still listen.
CHECK_S = 5.0
#: Milliseconds a browser waits before it connects again.
RETRY_MS = 2000

State = dict[str, Any]


class Paced:
    """A section's reader that keeps to its share of the time, and repeats itself in between."""

    def __init__(self, read: Callable[[], State], *, share: float = SHARE) -> None:
        self._read = read
        self._share = share
        self._next = float("-inf")  # monotonic s
        self._last: State = {}

    def __call__(self) -> State:
        started = time.monotonic()
        if started >= self._next:
            with suppress(Unavailable):  # the overview says what is away; old rows are shown
                self._last = self._read()
            took_s = time.monotonic() - started
            self._next = started + min(took_s / self._share, MAX_PAUSE_S)
        return self._last


class _Listener:
    def __init__(self) -> None:
        self.needs_state = True
        self.is_closed = False
        self._events: SimpleQueue[bytes | None] = SimpleQueue()

    def put(self, state: Callable[[], bytes], delta: bytes) -> None:
        if self._events.qsize() >= MAX_BEHIND:
            self._drop()
            self.needs_state = True
        self._events.put(state() if self.needs_state else delta)
        self.needs_state = False

    def close(self) -> None:
        self.is_closed = True
        self._events.put(None)

    def take(self, timeout_s: float) -> bytes | None:
        try:
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None

    def _drop(self) -> None:
        try:
            while True:
                self._events.get_nowait()
        except Empty:
            return


class Feed:
    """Reads the sections once a second while somebody listens, and tells all who do."""

    def __init__(
        self, sections: Mapping[str, Callable[[], State]], closing: threading.Event
    ) -> None:
        self._sections = sections
        self._closing = closing
        self._lock = threading.Lock()
        self._listeners: set[_Listener] = set()
        self._state: State = {}
        self._is_running = False

    def stream(self, *, may_listen: Callable[[], bool], heartbeat_s: float) -> Iterator[bytes]:
        """Yield the bytes of one listener's event stream."""
        with self._listening() as listener:
            yield b"retry: %d\n\n" % RETRY_MS
            check_at = time.monotonic() + CHECK_S
            while not listener.is_closed:
                data = listener.take(heartbeat_s)
                if time.monotonic() >= check_at:
                    check_at = time.monotonic() + CHECK_S
                    if not may_listen():
                        return
                if not listener.is_closed:
                    yield data or b": ping\n\n"

    @contextmanager
    def _listening(self) -> Iterator[_Listener]:
        listener = _Listener()
        with self._lock:
            self._listeners.add(listener)
            if self._closing.is_set():
                listener.close()
            elif not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="feed", daemon=True).start()
            elif self._state:
                listener.put(lambda: _event("state", self._state), b"")
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def _run(self) -> None:
        while self._goes_on():
            try:
                self._tick()
            except Exception:  # noqa: BLE001  the outermost loop: without it all dashboards stand still
                log.logger.exception("feed.failed")
            self._closing.wait(EVERY_S)

    def _goes_on(self) -> bool:
        """Say whether the reader is needed; if not, the next listener starts a new one."""
        with self._lock:
            if self._closing.is_set():
                for listener in self._listeners:
                    listener.close()
            elif self._listeners:
                return True
            self._is_running = False
            self._state = {}
            return False

    def _tick(self) -> None:
        state: State = {"now": iso(datetime.now(UTC))}
        for name, read in self._sections.items():
            state[name] = read()
        whole: list[bytes] = []  # encoded when the first listener needs it

        def encoded_state() -> bytes:
            if not whole:
                whole.append(_event("state", state))
            return whole[0]

        with self._lock:
            delta = _event("delta", merge_patch(self._state, state))
            self._state = state
            for listener in self._listeners:
                listener.put(encoded_state, delta)


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> State:
    """Return what turns `old` into `new` (RFC 7396); a null in `new` is the same as no entry."""
    patch: State = {name: None for name in old if new.get(name) is None and old[name] is not None}
    for name, value in new.items():
        before = old.get(name)
        if value is None or value == before:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            patch[name] = merge_patch(before, value)
        else:
            patch[name] = value
    return patch


def _event(name: str, data: State) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))
