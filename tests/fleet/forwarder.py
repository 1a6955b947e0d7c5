"""A loopback port that forwards to a server, and can fail as networks do: how a server goes away.

The address stays the same while the server behind it is stopped, restarted elsewhere or
unreachable, as it is for a process in production. Three ways to fail:

- `cut`: every connection is dropped and new ones are closed at once: a server that is down.
- `hold`: connections stay, new ones are accepted, and nothing passes, one way or both: a partition.
  Nobody is told. What was sent stays on its way and arrives when `join` ends it, also when its
  sender has given up meanwhile: a late write.
- `delay_s`: everything arrives later by so much at least, twice that at most.

Invariant: the bytes of a direction arrive in order and unchanged, or not at all.

Called by: fleet_parts, faults/stage, tests of both.
"""

import contextlib
import socket
import threading
import time
from enum import StrEnum


class Way(StrEnum):
    UP = "up"  # from the client to the server
    DOWN = "down"


class Forwarder:
    """Forward 127.0.0.1:`port` to 127.0.0.1:`target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay_s = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: set[_Pair] = set()
        self._is_cut = self._is_closed = False
        self._held: frozenset[Way] = frozenset()
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Drop every connection; new ones are closed at once."""
        with self._changed:
            self._is_cut = True
            pairs, self._pairs = self._pairs, set()
            self._changed.notify_all()
        for pair in pairs:
            pair.drop()

    def hold(self, *ways: Way) -> None:
        """Let nothing pass, of these directions or of both; connections stay."""
        with self._changed:
            self._held = frozenset(ways or Way)
            self._changed.notify_all()

    def join(self, target: int | None = None) -> None:
        """Forward again, to another port if one is named; what was held arrives."""
        with self._changed:
            self.target = target or self.target
            self._is_cut, self._held = False, frozenset()
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                if self._is_cut:
                    near.close()
                    continue
                pair = _Pair(near)
                self._pairs.add(pair)
            threading.Thread(target=self._serve, args=(pair,), daemon=True).start()

    def _serve(self, pair: "_Pair") -> None:
        """Connect to the server, which a partition does not let happen, and copy both ways."""
        try:
            if self._wait_open(pair, Way.UP) and pair.connect(self.target):
                down = threading.Thread(target=self._pump, args=(pair, Way.DOWN), daemon=True)
                down.start()
                self._pump(pair, Way.UP)
                down.join()
        finally:
            pair.drop()
            pair.close()
            with self._changed:
                self._pairs.discard(pair)

    def _pump(self, pair: "_Pair", way: Way) -> None:
        """Copy one direction until either side is done, which the other learns when it may."""
        while data := pair.receive(way):
            if not self._wait_open(pair, way) or not pair.send(way, data):
                break
        self._wait_open(pair, way)
        pair.drop()

    def _wait_open(self, pair: "_Pair", way: Way) -> bool:
        """Wait until a piece may pass; False when its connection was dropped meanwhile."""
        if not (self.delay_s or self._held):
            return not pair.is_dropped
        due_at = time.monotonic() + self.delay_s
        with self._changed:
            while not pair.is_dropped:
                left_s = due_at - time.monotonic()
                if way not in self._held and left_s <= 0:
                    return True
                self._changed.wait(left_s if left_s > 0 else None)
        return False


class _Pair:
    """A client's connection and ours to the server, which comes later."""

    def __init__(self, near: socket.socket) -> None:
        self._near = near
        self._far: socket.socket | None = None
        self._lock = threading.Lock()
        self.is_dropped = False
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connect(self, port: int) -> bool:
        try:
            far = socket.create_connection(("127.0.0.1", port), 2)
        except OSError:
            return False
        far.settimeout(None)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._far = far
            return not self.is_dropped

    def receive(self, way: Way) -> bytes:
        """Return the next bytes of a direction; none when its side is done."""
        source = self._near if way is Way.UP else self._far
        assert source is not None, "connected"
        try:
            return source.recv(1 << 16)
        except OSError:
            return b""

    def send(self, way: Way, data: bytes) -> bool:
        sink = self._far if way is Way.UP else self._near
        assert sink is not None, "connected"
        try:
            sink.sendall(data)
        except OSError:
            return False
        return True

    def drop(self) -> None:
        """End both connections; whoever reads or writes them is woken."""
        with self._lock:
            self.is_dropped = True
            ends = [end for end in (self._near, self._far) if end is not None]
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._near.close()
        if self._far is not None:
            self._far.close()
