"""The forwarder fails as it says: cut, held one way or both, delayed; and loses no order."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from headrace.tests.fleet.fleet_parts import PATIENCE_S, wait_for
from headrace.tests.fleet.forwarder import Forwarder, Way


class Echo:
    """A server that answers each byte with itself and remembers what it was sent."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.heard = b""
        self.ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                end, _ = self.listener.accept()
                self.ends.append(end)
                threading.Thread(target=self._answer, args=(end,), daemon=True).start()

    def _answer(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := end.recv(1 << 16):
                self.heard += data
                end.sendall(data)

    def close(self) -> None:
        for end in (self.listener, *self.ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.close()


@pytest.fixture
def door(echo: Echo) -> Iterator[Forwarder]:
    made = Forwarder(echo.port)
    yield made
    made.close()


@pytest.fixture
def client(door: Forwarder) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", door.port)) as made:
        made.settimeout(PATIENCE_S)
        yield made


def say(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return hear(client, len(data))


def hear(client: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes and (data := client.recv(1 << 16)):
        found += data
    return found


def is_silent(client: socket.socket) -> bool:
    """True when nothing comes although the connection is there."""
    client.settimeout(0.2)
    try:
        return client.recv(1, socket.MSG_PEEK) == b"never"
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE_S)


def test_everything_arrives_in_order(client):
    data = bytes(range(256)) * 4096
    threading.Thread(target=client.sendall, args=(data,)).start()
    assert hear(client, len(data)) == data


def test_a_cut_ends_connections_and_refuses_new_ones(door, client):
    assert say(client, b"one") == b"one"
    door.cut()
    assert client.recv(1) == b""
    with socket.create_connection(("127.0.0.1", door.port)) as other:
        assert other.recv(1) == b""
    door.join()
    with socket.create_connection(("127.0.0.1", door.port)) as other:
        assert say(other, b"two") == b"two"


def test_a_hold_keeps_connections_and_what_was_sent(door, echo, client):
    assert say(client, b"one") == b"one"
    door.hold()
    client.sendall(b"two")
    with socket.create_connection(("127.0.0.1", door.port)) as late:  # accepted, as by a kernel
        late.sendall(b"!")
        assert is_silent(client)
        assert is_silent(late)
        assert echo.heard == b"one"
        door.join()
        assert hear(client, 3) == b"two"
        assert hear(late, 1) == b"!"


def test_a_held_write_arrives_although_its_sender_has_gone(door, echo, client):
    assert say(client, b"one") == b"one"
    door.hold(Way.UP)
    client.sendall(b"late")
    client.close()
    assert echo.heard == b"one"
    door.join()
    wait_for(lambda: echo.heard == b"onelate", "the late write arrives")


def test_one_direction_is_held_and_the_other_passes(door, echo, client):
    assert say(client, b"one") == b"one"
    door.hold(Way.DOWN)
    client.sendall(b"two")
    wait_for(lambda: echo.heard == b"onetwo", "what is sent up arrives")
    assert is_silent(client)
    door.join()
    assert hear(client, 3) == b"two"


def test_a_delay_is_a_delay_both_ways(door, client):
    door.delay_s = 0.1
    before = time.monotonic()
    assert say(client, b"one") == b"one"
    assert time.monotonic() - before >= 0.2


def test_a_cut_ends_a_hold_too(door, client):
    assert say(client, b"one") == b"one"
    door.hold()
    door.cut()
    assert client.recv(1) == b""
