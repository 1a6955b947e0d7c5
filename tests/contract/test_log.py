"""Log lines: one event a line, key=value, whatever the values are."""

from __future__ import annotations

import logging

import pytest

from headrace.contract import log


@pytest.fixture(autouse=True)
def _unchanged_logger():
    before = (log.logger.handlers, log.logger.level, log.logger.propagate)
    yield
    log.logger.handlers, log.logger.level, log.logger.propagate = before


def test_an_event_is_one_line_with_process_name_and_fields(capsys):
    log.configure("INFO", "gateway")
    log.event("job.claimed", job="job_1", worker="w1", num_tokens=3, step_ms=1.23456)
    line = capsys.readouterr().err
    assert line.endswith(
        "INFO process=gateway job.claimed job=job_1 worker=w1 num_tokens=3 step_ms=1.235\n"
    )


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two words", "'two words'"),
        ("", "''"),
        ("a\nINFO job.claimed job=forged", r"'a\nINFO job.claimed job=forged'"),
        ('a"b', "'a\"b'"),
        ("\x1b[31m", r"'\x1b[31m'"),
        ("\u2028", r"'\u2028'"),
        ("é", "é"),
        (None, "None"),
    ],
)
def test_a_value_cannot_break_the_line(capsys, value, shown):
    log.configure("INFO", "p")
    log.event("job.claimed", value=value)
    line = capsys.readouterr().err
    assert line.endswith(f" job.claimed value={shown}\n")
    assert line.count("\n") == 1


def test_levels_below_the_set_one_are_not_written(capsys):
    log.configure("WARNING", "p")
    log.event("job.claimed")
    log.event("worker.lost", level=logging.WARNING, worker="w")
    assert capsys.readouterr().err.count("\n") == 1
    log.configure("WARNING", "p")  # again: no second handler
    log.event("worker.lost", level=logging.ERROR)
    assert capsys.readouterr().err.count("\n") == 1
