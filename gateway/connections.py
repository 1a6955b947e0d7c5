"""What HTTP itself can bring: malformed heads, broken and slow bodies, and how they are answered.

gunicorn's gevent worker, taught four things. It would answer what it cannot parse with a page of
HTML, some of it with 5xx, and log what was sent; it would wait for a body without end; and before
it stops it would wait for endless streams, and for connections that idle between two requests.

Invariants:
1. What is malformed is answered by a 4xx as problem details, like all else that is refused; nothing
   of it is logged or quoted, because a request line may hold a key or a prompt.
2. A body comes whole within body_timeout_s of the first look at it, or its request is refused and
   its connection closed; one that ends early is never taken for the shorter one.
3. A stop ends connections that were served and wait for their next request; what has arrived is
   answered.
4. An exception's text never reaches the log (log invariant 3), also where gunicorn logs it.

Called by: gateway/server (names them to gunicorn).
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import gevent
import msgspec
from gunicorn import util
from gunicorn.glogging import Logger
from gunicorn.http import errors as http_errors
from gunicorn.http.body import LengthReader
from gunicorn.workers.ggevent import GeventWorker

from headrace.contract import log
from headrace.contract.errors import (
    BodyTimeout,
    ExpectationFailed,
    HeaderTooLarge,
    HeadraceError,
    InvalidHttp,
    UriTooLong,
)

#: Seconds a client that is still sending may take to read what was wrong: a socket that is closed
#: with bytes unread is reset, and the answer with it.
LINGER_S = 1.0


class QuietLogger(Logger):
    """gunicorn's log, which would write exceptions with their texts."""

    def exception(self, msg: object, *args: object, **kwargs: object) -> None:
        error = sys.exception()
        if error is not None:
            log.failure("connection.failed", error)


class StreamingWorker(GeventWorker):
    """One gateway process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._served: dict[Any, Any] = {}  # greenlet -> socket, once a request was answered
        self._waiting: set[Any] = set()  # greenlets that wait for a request

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        gevent.spawn(self._end_streams)
        gevent.spawn(self._end_idle)

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        try:
            super().handle(listener, client, addr)
        finally:
            self._served.pop(gevent.getcurrent(), None)

    @contextlib.contextmanager
    def timeout_ctx(self) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Bound the wait for a request (gunicorn's hook), and know who waits."""
        here = gevent.getcurrent()
        self._waiting.add(here)
        try:
            bound: Any = super().timeout_ctx()  # its stub says None
            with bound:
                yield
        finally:
            self._waiting.discard(here)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> Any:
        self._served[gevent.getcurrent()] = sock
        req.body.reader = CheckedBody(req, self._services().settings.body_timeout_s)
        try:
            return super().handle_request(listener_name, req, sock, addr)
        finally:
            if req.body.failed:
                _let_read(sock)

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what never became a request of the app, and let the client read the answer."""
        error = refusal(exc)
        if error is None:
            log.failure("connection.failed", exc)
            error = HeadraceError("the gateway failed at this; its log says where")
        with contextlib.suppress(OSError):
            util.write_nonblock(client, encoded(error))
            _let_read(client)

    def _end_streams(self) -> None:
        if self.wsgi is not None:
            self._services().end_streams()

    def _end_idle(self) -> None:
        """Let those who wait read the end: what the kernel has of a request comes before it."""
        for greenlet in self._waiting & self._served.keys():
            with contextlib.suppress(OSError):
                self._served[greenlet].shutdown(socket.SHUT_RD)

    def _services(self) -> Any:
        from headrace.gateway.app import services_of  # not in the master: gevent patches first

        app: Any = self.wsgi
        return services_of(app)


class CheckedBody:
    """Stands between a request's body and gunicorn's reader of it (invariant 2)."""

    def __init__(self, req: Any, timeout_s: float) -> None:
        self._req = req
        self._reader = req.body.reader
        self._timeout_s = timeout_s
        self._deadline: float | None = None  # monotonic s; from the first read on

    def read(self, size: int) -> bytes:
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._timeout_s
        late = gevent.Timeout(self._deadline - now)
        try:
            with late:
                return self._read(size)
        except gevent.Timeout as error:
            if error is not late:
                raise  # gunicorn's own, around the wait for the next request
            self._req.force_close()
            raise BodyTimeout(
                f"the body was not here after {self._timeout_s:g} s (body_timeout_s): send it"
                " faster, or a smaller one"
            ) from None
        except (http_errors.ParseException, OSError):  # among them: the client has left
            self._req.force_close()
            raise InvalidHttp(
                "the body's framing is broken, or it ended early: send as many bytes as"
                " Content-Length says, or chunks that RFC 9112 allows"
            ) from None

    def _read(self, size: int) -> bytes:
        reader = self._reader
        if not isinstance(reader, LengthReader):
            return reader.read(size)
        wanted = min(size, reader.length)
        data = reader.read(size)
        if len(data) < wanted:
            raise http_errors.NoMoreData
        return data


def _let_read(sock: Any) -> None:
    """End our side, and take what still comes for a moment (LINGER_S)."""
    with contextlib.suppress(OSError, gevent.Timeout), gevent.Timeout(LINGER_S):
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1 << 16):
            pass


def refusal(error: BaseException) -> HeadraceError | None:
    """Return what a client is told of an error in HTTP; None for one that is not its fault."""
    if isinstance(error, HeadraceError):
        return error
    if isinstance(error, http_errors.LimitRequestLine):
        return UriTooLong("the request line is too long: send what is long in the body")
    if isinstance(error, http_errors.LimitRequestHeaders):
        return HeaderTooLarge("the headers are too many or too large: send fewer or shorter ones")
    if isinstance(error, http_errors.ExpectationFailed):
        return ExpectationFailed("Expect was sent; only 100-continue is known: leave it out")
    if isinstance(error, http_errors.ConfigurationProblem):
        return None
    if isinstance(error, http_errors.ParseException):
        return InvalidHttp("this is not a request of HTTP/1.1 as RFC 9112 defines it: correct it")
    return None


def encoded(error: HeadraceError) -> bytes:
    """Return the bytes of a whole answer, after which the connection closes."""
    from headrace.gateway.problems import MIMETYPE, problem_body  # not in the master, as above

    body = msgspec.json.encode(
        problem_body(
            status=error.http_status,
            code=error.code,
            detail=error.detail,
            retryable=error.retryable,
        )
    )
    head = (
        f"HTTP/1.1 {error.http_status} {error.code}\r\nContent-Type: {MIMETYPE}\r\n"
        f"Content-Length: {len(body)}\r\nCache-Control: no-store\r\n"
        "X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
