"""Leases of a worker: renewed in time, and at once where messages may have been missed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, cast

from headrace.worker.held import Held
from headrace.worker.keeper import Keeper

#: So long that no renewal but the first is due while a test lasts.
LEASE_S = 3600.0


class Stores:
    """In the place of both Redis clients: takes beats, and says that all held is canceled."""

    def __init__(self) -> None:
        self.renewed: SimpleQueue[list[tuple[str, int]]] = SimpleQueue()

    def renew(self, model: str, worker: str, held: list[tuple[str, int]]) -> list[str]:
        self.renewed.put(held)
        return ["cancel"] * len(held)

    def beat(self, beat: object, *, lifetime_ms: int) -> None:
        return

    def leave(self, worker: str) -> None:
        return


@contextmanager
def running(
    stores: Stores, held: Held, told: SimpleQueue[tuple[str, str, int]]
) -> Iterator[Keeper]:
    keeper = Keeper(
        model="m",
        worker="w",
        lease_s=LEASE_S,
        streams=cast("Any", stores),
        workers=cast("Any", stores),
        held=held,
        beat=lambda: cast("Any", None),
        tell=lambda state, job, attempt: told.put((state, job, attempt)),
        redis_was_away=lambda: None,
    )
    thread = threading.Thread(target=keeper.run)
    thread.start()
    try:
        yield keeper
    finally:
        keeper.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_a_renewal_that_is_asked_for_is_not_waited_for():
    stores, held = Stores(), Held()
    told: SimpleQueue[tuple[str, str, int]] = SimpleQueue()
    with running(stores, held, told) as keeper:
        assert stores.renewed.get(timeout=20) == []
        held.add("job_1", 3)
        keeper.renew_now()
        assert stores.renewed.get(timeout=20) == [("job_1", 3)]
        assert told.get(timeout=20) == ("cancel", "job_1", 3)
    assert stores.renewed.empty(), "what was asked for once is done once"
