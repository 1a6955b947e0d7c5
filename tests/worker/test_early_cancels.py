"""Cancellations that came before their job: kept for a while, and not too many."""

from headrace.worker import early_cancels
from headrace.worker.early_cancels import KEEP_S, EarlyCancels


def test_a_job_canceled_before_it_came_is_known_once():
    cancels = EarlyCancels()
    cancels.note("a")
    assert cancels.take("a")
    assert not cancels.take("a")
    assert not cancels.take("b")


def test_invariant_2_what_is_old_or_too_much_is_forgotten(monkeypatch):
    monkeypatch.setattr(early_cancels, "MAX_KEPT", 3)
    now = [100.0]
    cancels = EarlyCancels(lambda: now[0])
    for job in "abcd":
        cancels.note(job)
    assert not cancels.take("a")
    now[0] += KEEP_S / 2
    cancels.note("b")  # told again: kept from now on
    now[0] += KEEP_S / 2
    cancels.note("e")
    assert len(cancels._noted) == 2
    assert not cancels.take("c")
    assert cancels.take("b")
    now[0] += KEEP_S
    assert not cancels.take("e")
