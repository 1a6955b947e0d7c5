"""The alarms: each one's cause, its border, and the time it stands."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from headrace.contract.live import Severity
from headrace.contract.wire import WorkerBeat
from headrace.gateway.dashboard.alarms import (
    Facts,
    ModelFacts,
    fleet_alarms,
    iso,
    process_alarms,
)

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CALM = ModelFacts(
    num_queued=3,
    num_held=2,
    oldest_s=10.0,
    num_serving=1,
    num_workers=1,
    num_ended=100,
    num_failed=0,
)


def beat(**changes):
    fields = {
        "worker": "w1",
        "model": "m",
        "host": "h",
        "pid": 1,
        "state": "ready",
        "started_ms": 0,
        "step": 1,
        "step_age_ms": 0,
        "num_running": 1,
        "num_waiting": 0,
        "free_blocks": 1,
        "total_blocks": 1,
        "step_timeout_ms": 30_000,
    }
    return WorkerBeat(**(fields | changes))


def alarms_of(*, model=CALM, beats=(), quarantined=None, num_dead=None, at=AT, before=()):
    facts = Facts(
        at=at,
        oldest_target_s=60.0,
        models={"m": model},
        beats=beats,
        quarantined=quarantined or {},
        num_dead=num_dead or {},
    )
    return fleet_alarms(facts, before)


def codes(**changes):
    return [alarm.code for alarm in alarms_of(**changes)]


def test_a_calm_fleet_has_none():
    assert codes(beats=[beat()]) == []


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_serving": 0, "num_workers": 0}, ["no_worker"]),
        ({"num_serving": 0, "num_workers": 2}, ["no_worker"]),  # all of them drained
        ({"num_serving": 0, "num_queued": 0}, ["no_worker"]),  # what is held waits too
        ({"num_serving": 0, "num_queued": 0, "num_held": 0}, []),
        ({"oldest_s": 60.0}, []),
        ({"oldest_s": 60.1}, ["oldest_job"]),
        ({"oldest_s": None}, []),
        ({"num_failed": 5, "num_ended": 100}, []),  # 5 % is not over it
        ({"num_failed": 6, "num_ended": 100}, ["failures_growing"]),
        ({"num_failed": 4, "num_ended": 4}, []),  # too few to speak of it
        ({"num_failed": 5, "num_ended": 5}, ["failures_growing"]),
    ],
)
def test_the_alarms_of_a_model_and_their_borders(changes, wanted):
    found = alarms_of(model=replace(CALM, **changes))
    assert [alarm.code for alarm in found] == wanted
    for alarm in found:
        assert (alarm.model, alarm.severity) == ("m", Severity.PAGE)
        assert ": " in alarm.text, "what to do follows what was found"


def test_an_engine_that_stands_is_told_at_half_of_its_timeout():
    assert codes(beats=[beat(step_age_ms=15_000)]) == []
    (alarm,) = alarms_of(beats=[beat(step_age_ms=15_001), beat(worker="w2")])
    assert (alarm.code, alarm.model, alarm.subject) == ("steps_stopped", "m", "w1")
    assert "w1" in alarm.text
    assert codes(beats=[beat(step_age_ms=15_001, step_timeout_ms=60_000)]) == []


def test_a_worker_whose_engines_die_before_they_serve_is_told():
    (alarm,) = alarms_of(beats=[beat(state="broken", engine_restarts=7), beat(worker="w2")])
    assert (alarm.code, alarm.severity, alarm.subject) == ("worker_broken", "page", beat().worker)
    assert "7 in all" in alarm.text


def test_three_dead_letters_of_a_model_are_told_and_two_are_not():
    assert codes(num_dead={"m": 2, "n": 2}) == []
    (alarm,) = alarms_of(num_dead={"m": 2, "gone": 3})
    assert (alarm.code, alarm.model) == ("dead_letters_growing", "gone")
    assert alarm.severity is Severity.PAGE
    assert "3 jobs" in alarm.text


def test_a_quarantine_of_over_an_hour_is_a_warning():
    ordered = {"w1": AT - timedelta(hours=1)}
    assert codes(quarantined=ordered) == []
    (alarm,) = alarms_of(quarantined=ordered, at=AT + timedelta(seconds=1))
    assert (alarm.code, alarm.severity) == ("worker_quarantined", Severity.WARN)
    assert alarm.since == iso(AT)


def test_invariant_1_an_alarm_keeps_its_time_while_it_stands():
    bad = replace(CALM, oldest_s=100.0)
    first = alarms_of(model=bad)
    later = alarms_of(model=bad, at=AT + timedelta(minutes=5), before=first)
    assert [alarm.since for alarm in later] == [iso(AT)] == ["2026-01-02T03:04:05.000Z"]
    calm = alarms_of(before=later)
    assert calm == []
    again = alarms_of(model=bad, at=AT + timedelta(hours=1), before=calm)
    assert again[0].since == iso(AT + timedelta(hours=1))


def test_two_workers_of_one_fault_are_two_alarms_with_their_own_times():
    one = alarms_of(beats=[beat(step_age_ms=20_000)])
    both = alarms_of(
        beats=[beat(step_age_ms=25_000), beat(worker="w2", step_age_ms=20_000)],
        at=AT + timedelta(seconds=5),
        before=one,
    )
    assert [alarm.since for alarm in both] == [iso(AT), iso(AT + timedelta(seconds=5))]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, []),
        ({"sample_age_s": 20.0}, []),
        ({"sample_age_s": 20.1}, ["tasks_silent"]),
        ({"sample_age_s": None}, ["tasks_silent"]),
        ({"is_redis_up": False, "sample_age_s": None}, ["redis_away"]),  # the cause, not the rest
        ({"is_postgres_up": False}, ["postgres_away"]),
    ],
)
def test_what_a_gateway_finds_wrong_itself(changes, wanted):
    given = {"is_redis_up": True, "is_postgres_up": True, "sample_age_s": 1.0, "at": AT}
    first = process_alarms(**(given | changes), before=[])
    assert [alarm.code for alarm in first] == wanted
    later = process_alarms(**(given | changes | {"at": AT + timedelta(hours=1)}), before=first)
    assert [alarm.since for alarm in later] == [iso(AT)] * len(wanted)
