"""Each transition that duty.py draws, and its invariants, by told times."""

import pytest

from headrace.contract.orders import Order, Wanted
from headrace.contract.wire import WorkerState
from headrace.worker.duty import Duty

DRAIN_S = 30.0
SERVE = Order()
DRAIN = Order(Wanted.DRAINED, by="ada")
QUARANTINE = Order(Wanted.QUARANTINED, by="ada")


def serving() -> Duty:
    duty = Duty(DRAIN_S)
    duty.obey(SERVE, 0.0)
    duty.has_engine = True
    return duty


def test_a_worker_is_ready_when_its_engine_serves_and_its_order_is_read():
    duty = Duty(DRAIN_S)
    assert duty.state is WorkerState.STARTING
    duty.has_engine = True
    assert duty.state is WorkerState.STARTING, "nobody said yet that it may serve"
    duty.obey(SERVE, 0.0)
    assert duty.state is WorkerState.READY
    duty.has_engine = False
    assert duty.state is WorkerState.STARTING


def test_invariant_1_it_claims_in_starting_and_ready_after_its_order_was_read():
    duty = Duty(DRAIN_S)
    assert not duty.may_claim
    duty.obey(SERVE, 0.0)
    assert duty.may_claim, "starting: without an engine there is no room, so nothing is claimed"
    for order in (DRAIN, QUARANTINE, Order(num_restarts=1)):
        duty = serving()
        duty.obey(order, 1.0)
        assert not duty.may_claim, order
    duty = serving()
    duty.stop(1.0)
    assert not duty.may_claim


def test_while_its_engines_die_before_they_serve_it_is_broken_and_claims_nothing():
    duty = serving()
    duty.has_engine, duty.is_unsound = False, True
    assert (duty.state, duty.may_claim) == (WorkerState.BROKEN, False)
    duty.obey(QUARANTINE, 1.0)
    assert duty.state is WorkerState.QUARANTINED, "what an operator ordered comes first"
    duty.obey(SERVE, 2.0)
    duty.has_engine, duty.is_unsound = True, False
    assert (duty.state, duty.may_claim) == (WorkerState.READY, True)


def test_a_drain_gives_what_runs_its_time_and_is_done_when_nothing_is_in_hand():
    duty = serving()
    duty.obey(DRAIN, 100.0)
    assert duty.state is WorkerState.DRAINING
    assert not duty.is_overdue(100.0 + DRAIN_S - 0.1)
    assert duty.is_overdue(100.0 + DRAIN_S)
    duty.is_empty = True
    assert duty.state is WorkerState.DRAINED
    duty.obey(SERVE, 200.0)
    assert duty.state is WorkerState.READY
    assert not duty.is_overdue(1e9), "the deadline is taken back with the order"


def test_the_same_order_read_again_moves_no_deadline():
    duty = serving()
    duty.obey(DRAIN, 100.0)
    duty.obey(DRAIN, 120.0)
    assert duty.is_overdue(100.0 + DRAIN_S)


def test_a_quarantine_hands_back_at_once_whatever_came_before():
    for before in (SERVE, DRAIN, Order(num_restarts=1)):
        duty = serving()
        duty.obey(before, 1.0)
        duty.obey(QUARANTINE, 2.0)
        assert duty.state is WorkerState.QUARANTINED
        assert duty.is_overdue(2.0)


def test_a_worker_that_comes_back_in_quarantine_never_claims_before_it_is_resumed():
    duty = Duty(DRAIN_S)
    duty.obey(QUARANTINE, 0.0)
    duty.has_engine = True
    assert (duty.state, duty.may_claim) == (WorkerState.QUARANTINED, False)
    duty.obey(SERVE, 5.0)
    assert (duty.state, duty.may_claim) == (WorkerState.READY, True)


def test_an_ordered_restart_drains_then_starts_anew_and_serves():
    duty = serving()
    duty.obey(Order(num_restarts=1, by="ada"), 10.0)
    assert duty.state is WorkerState.DRAINING
    duty.is_empty = True
    assert duty.wants_restart
    assert duty.state is WorkerState.DRAINING, "it is not drained: it is on its way"
    duty.restarted()
    duty.has_engine = False
    assert (duty.state, duty.may_claim) == (WorkerState.STARTING, True)
    assert not duty.is_overdue(1e9)
    duty.has_engine = True
    assert duty.state is WorkerState.READY


@pytest.mark.parametrize("wanted", [Wanted.DRAINED, Wanted.QUARANTINED])
def test_after_a_restart_it_is_what_it_was_wanted_to_be(wanted):
    duty = serving()
    duty.obey(Order(wanted, by="ada"), 1.0)
    duty.is_empty = True
    duty.obey(Order(wanted, num_restarts=1, by="ada"), 2.0)
    assert duty.wants_restart
    duty.restarted()
    assert not duty.wants_restart
    assert duty.state == wanted


def test_invariant_3_restarts_ordered_before_this_process_or_together_are_done_once():
    duty = Duty(DRAIN_S)
    duty.obey(Order(num_restarts=7, by="ada"), 0.0)
    assert not duty.wants_restart
    duty.obey(Order(num_restarts=9, by="ada"), 1.0)
    assert duty.wants_restart
    duty.restarted()
    assert not duty.wants_restart


def test_invariant_2_a_signal_in_any_state_only_brings_the_deadline_nearer():
    duty = serving()
    duty.stop(0.0)
    assert duty.state is WorkerState.DRAINING
    assert duty.is_stopping
    assert not duty.is_overdue(DRAIN_S - 1)
    duty.stop(5.0)
    assert duty.is_overdue(5.0), "the second signal: at once"
    duty = serving()
    duty.obey(DRAIN, 0.0)
    duty.stop(20.0)
    assert duty.is_overdue(DRAIN_S), "what the drain promised stands"
    duty.obey(SERVE, 21.0)
    assert duty.is_overdue(DRAIN_S), "an order does not call a stop off"
    assert not duty.may_claim
    duty = serving()
    duty.obey(QUARANTINE, 0.0)
    duty.stop(1.0)
    assert duty.is_overdue(1.0)
