"""The connection under a stream: room, patience with a slow client, none with a dead one."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from headrace.gateway import outlet
from headrace.gateway.outlet import PIECE_BYTES, ROOM_BYTES, Outlet


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection: ours, and that of a client with a small window."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        ours, _ = listener.accept()
        with ours:
            yield ours, client


class Clock:
    """Time that passes when it is looked at; `on_look` is what the client does meanwhile."""

    def __init__(self) -> None:
        self.now_s, self.on_look = 0.0, lambda: None

    def monotonic(self) -> float:
        self.now_s += 1.0
        self.on_look()
        return self.now_s

    def sleep(self, _: float) -> None: ...


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(outlet, "time", found)
    monkeypatch.setattr(outlet, "LOOK_MS", 1)
    return found


def made(
    sock: socket.socket, timeout_s: float = 30.0, is_closing: Callable[[], bool] = lambda: False
) -> Outlet:
    return Outlet(sock, timeout_s, is_closing)


def fill(outlet: Outlet, sock: socket.socket) -> int:
    """Write as a stream does until there is no room; return the bytes that wait."""
    while outlet._num_waiting() <= ROOM_BYTES:
        sock.sendall(b"x" * PIECE_BYTES)
    return outlet._num_waiting()


def test_invariant_1_while_there_is_room_a_write_does_not_block(ends):
    ours, _ = ends
    ours.settimeout(20)
    outlet = made(ours)
    assert outlet.has_room()
    assert ROOM_BYTES < fill(outlet, ours) <= ROOM_BYTES + PIECE_BYTES


def test_a_client_that_reads_makes_room(ends):
    ours, client = ends
    outlet = made(ours)
    fill(outlet, ours)

    def read() -> None:
        while client.recv(4096):
            pass

    thread = threading.Thread(target=read)
    thread.start()
    assert outlet.has_room()
    ours.shutdown(socket.SHUT_WR)
    thread.join(20)


def test_invariant_2_a_client_that_takes_nothing_is_cut_off(ends, clock):
    ours, client = ends
    outlet = made(ours, timeout_s=30.0)
    fill(outlet, ours)
    assert not outlet.has_room()
    assert 30 <= clock.now_s <= 35
    with pytest.raises(OSError):
        ours.sendall(b"x")
    ours.close()
    client.settimeout(20)

    def read_all() -> None:
        while client.recv(4096):
            pass

    with pytest.raises(ConnectionResetError):
        read_all()


def test_invariant_2_a_client_that_takes_a_little_is_not(ends, clock):
    ours, client = ends
    outlet = made(ours, timeout_s=3.0)
    before = fill(outlet, ours)

    def sip() -> None:
        """Take some, and wait until the kernel has been told."""
        waiting, deadline = outlet._num_waiting(), time.monotonic() + 20
        while outlet._num_waiting() == waiting and time.monotonic() < deadline:
            client.recv(1024)

    clock.on_look = sip
    assert outlet.has_room()
    assert outlet._num_waiting() <= ROOM_BYTES < before


def test_invariant_3_a_process_that_stops_waits_for_no_client(ends):
    ours, _ = ends
    closing = threading.Event()
    outlet = made(ours, timeout_s=3600, is_closing=closing.is_set)
    fill(outlet, ours)
    closing.set()
    assert not outlet.has_room()


def test_without_a_socket_there_is_always_room():
    assert Outlet.of({}, 1.0, lambda: False).has_room()
