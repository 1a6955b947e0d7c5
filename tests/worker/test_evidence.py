"""What a death says, from words, status and kills that a test made up."""

import signal
from pathlib import Path

import pytest

from headrace.worker.evidence import MAX_SIGNATURE_CHARS, NUM_LOOKS, OomKills, normalised, of_death
from headrace.worker.frames import Fatal
from headrace.worker.stacks import ThreadStack


def death(**changes):
    facts = {"fatal": None, "status": None, "is_stalled": False, "num_oom_kills": 0, "limit_s": 30}
    return of_death(**(facts | changes))


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"])
def test_a_fault_of_the_process_is_certain(name):
    found = death(status=-signal.Signals[name])
    assert (found.signature, found.is_certain) == (name, True)


@pytest.mark.parametrize(("status", "signature"), [
    (-signal.SIGKILL, "SIGKILL"),
    (-signal.SIGTERM, "SIGTERM"),
    (-200, "signal 200"),
    (0, "exit status 0"),
    (None, "ended"),
])  # fmt: skip
def test_what_may_have_come_from_outside_blames_nobody(status, signature):
    found = death(status=status)
    assert (found.signature, found.is_certain) == (signature, False)


def test_an_exit_without_a_word_is_certain():
    assert death(status=3) == death(status=3, num_oom_kills=1)
    assert (death(status=3).signature, death(status=3).is_certain) == ("exit status 3", True)


def test_a_kill_for_lack_of_memory_is_certain_and_other_kills_beside_it_are_not():
    found = death(status=-signal.SIGKILL, num_oom_kills=1)
    assert (found.signature, found.is_certain) == ("out of memory", True)
    assert not death(status=-signal.SIGTERM, num_oom_kills=1).is_certain


def test_a_stall_is_certain_however_the_process_was_ended():
    found = death(status=None, is_stalled=True, fatal=Fatal("engine_failed", "x"))
    assert (found.signature, found.is_certain) == ("stalled", True)
    assert "30 s" in found.detail


def test_where_the_threads_stood_is_in_the_detail_and_not_in_the_signature():
    stacks = [ThreadStack("main", ("loop.py:150 step", "loop.py:90 run")), ThreadStack("io", ())]
    found = death(is_stalled=True, stacks=stacks)
    assert found.signature == "stalled"
    assert found.detail.splitlines()[1:] == [
        "main: loop.py:150 step < loop.py:90 run",
        "io: no Python frame",
    ]


def test_invariant_1_equal_causes_have_equal_signatures():
    texts = (
        "slot 7 of 'job_01a20a595ca77dcc' at 0x7f293c49bcd0 needs 1,024.5 of 12 blocks",
        "slot 12 of 'x' at 0x10 needs 3 of 9 blocks",
    )
    found = {
        death(status=1, fatal=Fatal("engine_failed", text, "ValueError", "slots.py:take"))
        for text in texts
    }
    (one,) = found
    assert one.signature == (
        "ValueError at slots.py:take: slot N of '...' at <address> needs N of N blocks"
    )
    assert one.is_certain


def test_other_places_and_kinds_have_other_signatures():
    words = [("ValueError", "a.py:f"), ("ValueError", "a.py:g"), ("KeyError", "a.py:f")]
    found = {death(fatal=Fatal("engine_failed", "x", *each)).signature for each in words}
    assert len(found) == len(words)


def test_a_lost_device_blames_nobody():
    found = death(status=1, fatal=Fatal("device_lost", "fell off", "DeviceLost", "gpu.py:f"))
    assert not found.is_certain
    assert death(fatal=Fatal("out_of_memory", "no room", "MemoryError", "a.py:f")).is_certain


def test_invariant_2_signatures_are_short_and_hold_no_ids():
    text = "tokens [11, 12, 13] \n of " + "f" * 40 + " and 'secret prompt' " + "x" * 900
    found = death(fatal=Fatal("engine_failed", text, "RuntimeError", "a.py:f"))
    assert len(found.signature) == MAX_SIGNATURE_CHARS
    for leak in ("11", "secret", "ffff", "\n"):
        assert leak not in found.signature + found.detail


def test_normalising_is_done_once():
    once = normalised("5 of 'x' at 0xff: job_0123456789 12e-3")
    assert once == normalised(once) == "N of '...' at <address>: <id> N"


def group(root: Path, said: str, lines: str, file: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    at = root / "sys/fs/cgroup" / file
    at.parent.mkdir(parents=True)
    at.write_text(said)
    return at


@pytest.mark.parametrize(
    ("lines", "file"),
    [
        ("0::/system.slice/x\n", "system.slice/x/memory.events"),
        ("0::/of-the-host\n", "memory.events"),
        ("4:memory:/docker/1\n0::/\n", "memory/docker/1/memory.oom_control"),
        ("4:cpu,memory:/docker/1\n0::/\n", "memory/memory.oom_control"),
    ],
)
def test_kills_are_counted_in_both_versions_and_within_a_container(tmp_path, lines, file):
    at = group(tmp_path, "low 1\noom 4\noom_kill 2\n", lines, file)
    kills = OomKills(tmp_path)
    assert kills.recent() == 0, "what was killed before is not this engine"
    at.write_text("low 1\noom 4\noom_kill 3\n")
    kills.look()
    assert kills.recent() == 1, "a process that holds much takes seconds to end"
    for _ in range(NUM_LOOKS):
        kills.look()
    assert kills.recent() == 0


def test_without_groups_there_are_no_kills(tmp_path):
    assert OomKills(tmp_path).recent() == 0
    at = group(tmp_path, "nothing of it", "0::/\n", "memory.events")
    kills = OomKills(tmp_path)
    at.unlink()
    assert kills.recent() == 0


def test_the_file_of_this_process_can_be_read():
    assert OomKills().recent() == 0
