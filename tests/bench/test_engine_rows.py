"""What a row must have, where it is kept, and how it reads."""

import json

import pytest

from headrace.bench import engine_rows
from headrace.bench.engine_log import Figures
from headrace.bench.engine_rows import FIELDS, Machine, append_row, check_row, line_of, make_row

MACHINE = Machine("NVIDIA H200", "580.1", {"python": "3.12"}, "abc")
VALUES = {
    "engine": "headrace",
    "settings": {"max_num_seqs": 8},
    "start_s": 2.0,
    "model": "llama-8b",
    "workload": "single",
    "scale": 1.0,
    "num_requests": 1,
    "num_prompt_tokens": 128,
    "num_output_tokens": 512,
    "roofline_s": 1.8,
}


def good_row():
    return make_row(MACHINE, {**VALUES, "roofline_percent": 90.0, **Figures(2.0, 256.0).values()})


def test_every_figure_of_a_run_has_its_field():
    assert Figures(2.0, 256.0).values().keys() <= FIELDS.keys()
    row = good_row()
    assert list(row) == list(FIELDS)
    check_row(row)
    check_row(json.loads(json.dumps(row)))


def test_rows_are_appended_to_the_device_s_file(tmp_path):
    for _ in range(2):
        append_row(tmp_path / "results", MACHINE, good_row())
    lines = (tmp_path / "results" / "nvidia-h200.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines] == [2.0, 2.0]


def test_a_row_out_of_schema_is_not_written(tmp_path):
    for change in ({"seconds": None}, {"error": "x"}, {"model": 3}, {"num_steps": 1.5}):
        with pytest.raises(ValueError, match=r"found"):
            append_row(tmp_path, MACHINE, {**good_row(), **change})
    with pytest.raises(KeyError, match="tokens_per_second"):
        make_row(MACHINE, {**VALUES, "tokens_per_second": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_is_a_row_too(tmp_path):
    row = make_row(MACHINE, {**VALUES, "error": "did not end in 120 s"})
    append_row(tmp_path, MACHINE, row)
    assert line_of(row).endswith("FAILED did not end in 120 s")


def test_a_line_says_what_is_known():
    line = line_of(good_row())
    assert "256.0 tokens/s   90.0 % of roofline" in line
    assert "inter-token -  first -  host - a step  - steps" in line
    known = Figures(2.0, 256.0, 3.0, 4.0, 5.0, 6.0, 900.0, 120.0, 130.0, 512).values()
    line = line_of({**good_row(), **known})
    assert "inter-token p50 3.00 p99 4.00 ms  first p50 5.00 p99 6.00 ms" in line
    assert "host 120 us a step  512 steps" in line


def test_without_a_gpu_the_machine_is_a_cpu(monkeypatch):
    monkeypatch.setattr(engine_rows, "_ask", lambda *command: "")
    machine = Machine.here(None)
    assert machine.device.startswith("cpu ")
    assert (machine.driver, machine.commit) == (None, "unknown")
    assert machine.versions.keys() >= {"python", "torch"}
    assert Machine.here("given").commit == "given"


def test_a_gpu_is_named_with_its_driver(monkeypatch):
    said = {"nvidia-smi": "NVIDIA H200, 580.159.03", "git": "abc"}
    monkeypatch.setattr(engine_rows, "_ask", lambda program, *_: said[program])
    machine = Machine.here(None)
    assert (machine.device, machine.driver) == ("NVIDIA H200", "580.159.03")
    assert machine.file_name == "nvidia-h200.jsonl"
    assert machine.commit == "abc+changes"
