"""The connection under an event stream: how much may wait in it, and when it is given up.

A subscriber that reads slowly must cost little and slow nobody. Its backlog is in three places, and
each is bounded: the kernel's send buffer (SEND_BUFFER_BYTES), one piece on its way there
(PIECE_BYTES), and its mailbox (gateway/follower). While the buffer is over half full the stream
waits here instead of making more; meanwhile the mailbox overflows and is emptied, and what was
dropped is read from the log once there is room.

Invariants:
1. Nothing is written while over half of the send buffer waits, so a write does not block.
2. A client that takes not one byte for `timeout_s` is cut off: the connection is reset and its
   buffer freed. It may come back with its last event id.
3. A process that stops waits for no client.

Waiting is select.poll: gunicorn's gevent worker makes it wait for this greenlet alone.

Called by: gateway/sse.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Mapping
from typing import Any

#: Bytes of the kernel's send buffer; Linux takes twice as many, for its own bookkeeping.
SEND_BUFFER_BYTES = 64 << 10
#: Bytes that may wait in it before the stream does.
ROOM_BYTES = SEND_BUFFER_BYTES // 2
#: Bytes written at once.
PIECE_BYTES = 16 << 10
#: Milliseconds between two looks at whether the client takes anything.
LOOK_MS = 500


class Outlet:
    """One connection; without a socket (tests in one process) it has always room."""

    def __init__(
        self, sock: socket.socket | None, timeout_s: float, is_closing: Callable[[], bool]
    ) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._is_closing = is_closing
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    @classmethod
    def of(
        cls, environ: Mapping[str, Any], timeout_s: float, is_closing: Callable[[], bool]
    ) -> Outlet:
        """Take the connection of a request, as gunicorn hands it down."""
        return cls(environ.get("gunicorn.socket"), timeout_s, is_closing)

    def has_room(self) -> bool:
        """Wait until there is room; False when the connection was given up."""
        if self._sock is None or self._num_waiting() <= ROOM_BYTES:
            return True
        return self._wait(self._sock)

    def _wait(self, sock: socket.socket) -> bool:
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLOUT)
        least, until = self._num_waiting(), time.monotonic() + self._timeout_s
        while not self._is_closing():
            poll.poll(LOOK_MS)
            left = self._num_waiting()
            if left <= ROOM_BYTES:
                return True
            if left < least:
                least, until = left, time.monotonic() + self._timeout_s
            elif time.monotonic() >= until:
                break
            time.sleep(LOOK_MS / 1000 / 10)  # writable for the kernel, not yet by our measure
        self._cut(sock)
        return False

    def _num_waiting(self) -> int:
        """Return the bytes that the client has not acknowledged."""
        if self._sock is None:
            return 0
        try:
            found = fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        except OSError:  # no such question here, or the connection is gone: the write will say
            return 0
        return struct.unpack("i", found)[0]

    @staticmethod
    def _cut(sock: socket.socket) -> None:
        """Let every write from here on fail, and the close drop what waits."""
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the client was faster
