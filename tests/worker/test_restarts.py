"""Restarts: pauses grow, and a device that fails again ends the worker."""

import pytest

from headrace.worker.restarts import HEALTHY_S, HOPELESS, PAUSES_S, Restarts


def test_pauses_double_up_to_the_longest():
    restarts, pauses = Restarts(), []
    for _ in range(8):
        assert restarts.died(None, served_s=1.0, now_s=100.0)
        pauses.append(restarts.next_at - 100.0)
    assert pauses[:3] == [0.5, 1.0, 2.0]
    assert pauses[-1] == PAUSES_S[1]
    assert restarts.num_deaths == 8


@pytest.mark.parametrize("code", sorted(HOPELESS))
def test_the_second_hopeless_death_in_a_row_gives_up(code):
    restarts = Restarts()
    assert restarts.died("device_lost", served_s=3600.0, now_s=0.0)
    assert not restarts.died(code, served_s=0.0, now_s=10.0)


def test_invariant_1_a_minute_of_service_begins_anew_and_loading_does_not_count():
    restarts = Restarts()
    for now_s in (0.0, 1e3, 2e3):
        assert restarts.died("device_lost", served_s=HEALTHY_S, now_s=now_s)
        assert restarts.next_at == now_s + PAUSES_S[0]
    # Ten minutes later by the clock, but the engine was ready for ten seconds of them.
    assert not restarts.died("device_lost", served_s=10.0, now_s=2e3 + 600)


def test_deaths_of_jobs_wait_for_the_shortest_pause_and_never_give_up():
    restarts = Restarts()
    assert restarts.died("device_lost", served_s=1.0, now_s=0.0)
    for now_s in range(1, 9):
        assert restarts.died("bad_config", served_s=1.0, now_s=now_s, is_of_jobs=True)
        assert restarts.next_at == now_s + PAUSES_S[0]
    assert restarts.num_deaths == 9
    assert not restarts.died("device_lost", served_s=1.0, now_s=10.0), "the count stands"


def test_invariant_2_other_deaths_neither_count_nor_begin_anew():
    restarts = Restarts()
    for code in (None, "engine_failed", "bad_frame", "device_lost", None, "engine_failed"):
        assert restarts.died(code, served_s=1.0, now_s=0.0)
    assert not restarts.died("device_lost", served_s=1.0, now_s=0.0)
