"""The thread that reads a worker's order, on a real Postgres, also one that goes away."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from headrace.contract import database
from headrace.contract.ids import new_id
from headrace.contract.orders import Order, Wanted, WorkerOrders
from headrace.fleet.server import Server
from headrace.tests.fleet.forwarder import Forwarder
from headrace.worker.order_watch import OrderWatch


@pytest.fixture
def door(postgres: Server) -> Iterator[Forwarder]:
    door = Forwarder(postgres.port)
    yield door
    door.close()


@pytest.fixture
def engine(postgres: Server, database_url: str, door: Forwarder) -> Iterator[Engine]:
    engine = database.connect(database_url.replace(f":{postgres.port}/", f":{door.port}/"))
    yield engine
    engine.dispose()


@pytest.fixture
def watch(engine: Engine) -> OrderWatch:
    """A watch; `rung` grows with each wake."""
    rung: list[None] = []
    watch = OrderWatch(new_id("w"), WorkerOrders(engine), lambda: rung.append(None))
    watch.rung = rung  # type: ignore[attr-defined]
    return watch


def test_a_worker_never_ordered_anything_is_told_to_serve(watch):
    assert watch.newest is None
    watch.look()
    assert watch.newest == Order()
    assert len(watch.rung) == 1


def test_the_loop_is_woken_by_another_order_and_not_by_the_same(watch, engine):
    orders = WorkerOrders(engine)
    watch.look()
    orders.want(watch._worker, Wanted.QUARANTINED, by="ada")
    watch.look()
    watch.look()
    assert watch.newest.wanted is Wanted.QUARANTINED
    assert len(watch.rung) == 2


def test_invariant_1_without_postgres_the_last_order_stands(watch, engine, door):
    orders = WorkerOrders(engine)
    orders.want(watch._worker, Wanted.DRAINED, by="ada")
    watch.look()
    door.cut()
    for _ in range(2):
        watch.look()
    assert watch.newest.wanted is Wanted.DRAINED
    assert len(watch.rung) == 1
    door.join()
    orders.want(watch._worker, Wanted.SERVING, by="ada")
    watch.look()
    assert watch.newest.wanted is Wanted.SERVING


def test_invariant_1_a_worker_that_could_never_ask_has_no_order(watch, door):
    door.cut()
    watch.look()
    assert watch.newest is None


def test_invariant_1_an_order_of_a_later_version_keeps_the_last(watch, engine):
    watch.look()
    with engine.begin() as db:
        db.execute(text("ALTER TABLE worker_orders DROP CONSTRAINT ck_worker_orders_wanted"))
        db.execute(
            text("INSERT INTO worker_orders (worker, wanted, ordered_by) VALUES (:w, 'x', 'ada')"),
            {"w": watch._worker},
        )
    watch.look()
    assert watch.newest == Order()
