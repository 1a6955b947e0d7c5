"""Ids: UUIDv7 behind a prefix, in order of time, with a form that is checked whole."""

from __future__ import annotations

import time
import uuid

import pytest

from headrace.contract.ids import is_job_id, new_id, uuid7_hex


def test_an_id_is_a_uuid7_of_now():
    made = uuid.UUID(uuid7_hex())
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert abs((made.int >> 80) - time.time() * 1000) < 60_000


def test_ids_differ_and_sort_by_time():
    made = [uuid7_hex() for _ in range(2000)]
    assert len(set(made)) == len(made)
    times = [h[:16] for h in made]  # milliseconds and the place within
    assert times == sorted(times)


def test_ids_of_one_millisecond_sort_in_the_order_they_were_made(monkeypatch):
    """Lists are newest first by id: a random order within the millisecond would mix them up."""
    clock = iter(range(10**18, 10**18 + 900_000, 1000))  # ns: one each microsecond of one ms
    monkeypatch.setattr("headrace.contract.ids.time.time_ns", lambda: next(clock))
    made = [uuid7_hex() for _ in range(900)]
    assert made == sorted(made)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "job_",
        "job_" + "A" * 32,
        "job_" + "0" * 31,
        "job_" + "0" * 33,
        "key_" + "0" * 32,
        "job_" + "0" * 32 + "\n",
        " job_" + "0" * 32,
        "job_" + "٠" * 32,
    ],
)
def test_other_texts_are_no_job_ids(text):
    assert is_job_id(new_id("job"))
    assert not is_job_id(text)
