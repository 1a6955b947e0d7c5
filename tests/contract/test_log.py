"""Log lines: one event a line, key=value or JSON, whatever the values are; libraries' lines too."""

from __future__ import annotations

import json
import logging

import pytest

from headrace.contract import log


@pytest.fixture(autouse=True)
def _unchanged_loggers():
    root = logging.getLogger()
    kept = [(item, item.handlers, item.level, item.propagate) for item in (log.logger, root)]
    identity = dict(log._identity)
    yield
    log._identity.clear()
    log._identity.update(identity)
    for item, handlers, level, propagate in kept:
        item.handlers, item.level, item.propagate = handlers, level, propagate


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
def test_invariant_1_a_value_cannot_break_the_line(capsys, value, shown):
    log.configure("INFO", "p")
    log.event("job.claimed", value=value)
    line = capsys.readouterr().err
    assert line.endswith(f" job.claimed value={shown}\n")
    assert line.count("\n") == 1
    log.configure("INFO", "p", "json")
    log.event("job.claimed", value=value)
    line = capsys.readouterr().err
    assert json.loads(line)["value"] == value
    assert line.count("\n") == 1
    assert line.isprintable() or line[:-1].isprintable()


def test_a_json_line_is_typed_and_its_own_fields_cannot_be_forged(capsys):
    log.configure("INFO", "worker", "json")
    log.identify(worker="w1")
    fields = {"job": "job_1", "num_tokens": 3, "step_ms": 1.5, "rate": float("nan"), "ok": True}
    log.event("job.claimed", **fields, process="forged", event_=None)
    line = json.loads(capsys.readouterr().err)
    assert line.pop("at").endswith("Z")
    assert line == {
        "level": "INFO",
        "process": "worker",
        "event": "job.claimed",
        "job": "job_1",
        "num_tokens": 3,
        "step_ms": 1.5,
        "rate": "nan",
        "ok": True,
        "process_": "forged",
        "event_": None,
        "worker": "w1",
    }


@pytest.mark.parametrize("form", ["text", "json"])
def test_invariant_2_what_a_process_is_stands_on_each_line_once(capsys, form):
    log.configure("INFO", "worker", form)
    log.identify(worker="w1")
    log.event("worker.ready")
    log.event("job.claimed", worker="w1")
    logging.getLogger("a.library").warning("retrying %s", "soon")
    for line in capsys.readouterr().err.splitlines():
        wanted = '"worker": "w1"' if form == "json" else " worker=w1"
        assert line.count(wanted) == 1, line
        process = '"process": "worker"' if form == "json" else " process=worker "
        assert line.count(process) == 1, line


@pytest.mark.parametrize("form", ["text", "json"])
def test_invariant_3_a_failure_tells_type_and_frames_and_no_text(capsys, form):
    def break_down() -> None:
        raise RuntimeError("the prompt was: swordfish")

    log.configure("INFO", "worker", form)
    try:
        break_down()
    except RuntimeError as error:
        log.failure("thread.died", error, thread="endings")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "swordfish" not in line
    assert "RuntimeError" in line
    assert "in break_down" in line
    assert "thread.died" in line


def test_invariant_3_a_librarys_exception_is_named_and_not_quoted(capsys):
    log.configure("INFO", "worker", "json")
    try:
        raise ValueError("swordfish")
    except ValueError:
        logging.getLogger("a.library").exception("export failed")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["logger"]) == ("log.written", "a.library")
    assert (line["text"], line["error"]) == ("export failed", "ValueError")


def test_levels_below_the_set_one_are_not_written(capsys):
    log.configure("WARNING", "p")
    log.event("job.claimed")
    log.event("worker.lost", level=logging.WARNING, worker="w")
    assert capsys.readouterr().err.count("\n") == 1
    log.configure("WARNING", "p")  # again: no second handler
    log.event("worker.lost", level=logging.ERROR)
    assert capsys.readouterr().err.count("\n") == 1
    logging.getLogger("a.library").info("not from a library either")
    assert capsys.readouterr().err == ""
