"""Orders to workers, on a real Postgres."""

from datetime import UTC, datetime

import pytest

from headrace.contract.ids import new_id
from headrace.contract.orders import Order, Wanted, WorkerOrders


@pytest.fixture
def orders(engine) -> WorkerOrders:
    return WorkerOrders(engine)


@pytest.fixture
def worker() -> str:
    return new_id("w") + " é/%"


def test_a_worker_never_ordered_anything_serves(orders, worker):
    assert orders.of(worker) == Order(Wanted.SERVING, 0, "", None)
    assert worker not in orders.all()


def test_the_newest_order_is_kept_with_who_gave_it_and_when(orders, worker):
    orders.want(worker, Wanted.DRAINED, by="ada")
    order = orders.want(worker, Wanted.QUARANTINED, by="bob")
    assert orders.of(worker) == orders.all()[worker] == order
    assert (order.wanted, order.by, order.num_restarts) == (Wanted.QUARANTINED, "bob", 0)
    assert order.at is not None
    assert abs((datetime.now(UTC) - order.at).total_seconds()) < 60


def test_invariant_1_the_same_order_again_changes_nothing_that_is_obeyed(orders, worker):
    once = orders.want(worker, Wanted.DRAINED, by="ada")
    again = orders.want(worker, Wanted.DRAINED, by="ada")
    assert (once.wanted, once.num_restarts) == (again.wanted, again.num_restarts)


def test_invariant_2_restarts_count_up_and_leave_what_is_wanted(orders, worker):
    assert orders.restart(worker, by="ada").num_restarts == 1
    assert orders.of(worker).wanted is Wanted.SERVING
    orders.want(worker, Wanted.QUARANTINED, by="ada")
    order = orders.restart(worker, by="bob")
    assert (order.num_restarts, order.wanted, order.by) == (2, Wanted.QUARANTINED, "bob")
    assert orders.want(worker, Wanted.SERVING, by="ada").num_restarts == 2


def test_running_jobs_are_counted_by_the_worker_that_has_them(orders, worker, ledger, accept):
    other = worker + "2"
    mine, theirs = [accept() for _ in range(3)], accept()
    ledger.pick_up(mine, worker)
    ledger.pick_up([theirs], other)
    ledger.hand_back(mine[0], 1)
    assert orders.num_running([worker, other, "nobody"]) == {worker: 2, other: 1, "nobody": 0}
    assert orders.num_running([]) == {}
