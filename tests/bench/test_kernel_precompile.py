"""Shares compiled by other processes: every case once, and a dead process takes one case only."""

import sys

from headrace.bench.kernel_precompile import compile_all, compile_share

#: Lists eight cases of three workloads; case 2 raises, case 3 and 6 end their process.
SCRIPT = """
import os, sys
from headrace.bench.kernel_precompile import compile_share

def run(number):
    with open(sys.argv[1], "a") as file:
        file.write(f"{number}\\n")
    if number == 2:
        raise ValueError("tile too large\\nsecond line")
    if number in (3, 6):
        print("last words", flush=True)
        os._exit(7)

keys = [("part", name) for name in "aaabbbcc"]
runs = [lambda n=n: run(n) for n in range(8)]
compile_share(keys, runs, sys.argv[2], lambda part: None)
"""


def test_a_case_that_dies_is_named_and_takes_no_other(tmp_path):
    log = tmp_path / "ran"
    broken = compile_all(
        [f"case {n}" for n in range(8)],
        [sys.executable, "-c", SCRIPT, str(log)],
        num_jobs=2,
        timeout_s=60,
    )
    assert broken == {
        "case 2": "ValueError: tile too large",
        "case 3": "took its process down, status 7: last words",
        "case 6": "took its process down, status 7: last words",
    }
    assert sorted(map(int, log.read_text().split())) == list(range(8))


def test_a_process_that_cannot_start_is_not_started_for_ever():
    command = [sys.executable, "-c", "import no_such_module"]
    broken = compile_all(["only"], command, num_jobs=1, timeout_s=60)
    assert list(broken) == ["only"]
    assert "No module named 'no_such_module'" in broken["only"]


def test_nothing_outlives_its_time():
    hang = "import threading; print('BEGIN 0', flush=True); threading.Event().wait()"
    command = [sys.executable, "-c", hang]
    broken = compile_all(["hangs"], command, num_jobs=1, timeout_s=1.0)
    assert list(broken) == ["hangs"]
    assert "status -9" in broken["hangs"]


def test_workloads_stay_together_and_free_their_tensors(capsys):
    keys = [("p", "a"), ("p", "a"), ("q", "b"), ("p", "c")]
    ran, freed = [], []
    for index in range(2):
        runs = [lambda n=n: ran.append((index, n)) for n in range(4)]  # noqa: B023
        compile_share(keys, runs, f"{index}:2:0", freed.append)
    assert ran == [(0, 0), (0, 1), (0, 3), (1, 2)]
    assert freed == ["p", "p", "q"]
    assert capsys.readouterr().out.count("BEGIN") == 4
