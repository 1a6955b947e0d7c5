"""What an engine's death says: its signature, and whether what ran is to blame.

Certain is only what the process did to itself: an exception that ended it, a signal that the kernel
sends for a fault of the program, a stall, memory used up. All else may have come from outside and
blames nobody: SIGKILL and SIGTERM, a lost device, an end without a word.

Invariants:
1. Equal causes have equal signatures: numbers, ids, addresses and quoted parts are taken out, and
   the place is a file and a function, not a line.
2. No signature and no detail holds anything of a prompt: the engine knows no text, and token ids
   are numbers.

Called by: engine_watch.
"""

from __future__ import annotations

import re
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.worker.frames import Fatal
from headrace.worker.stacks import ThreadStack

#: Characters of a signature.
MAX_SIGNATURE_CHARS = 200
#: Signals that the kernel sends, or the C library, for what the process did.
FAULTS = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP,
     signal.SIGSYS}
)  # fmt: skip
#: Codes of an engine's last words that blame the device.
_OF_THE_DEVICE = frozenset({"device_lost"})
STALLED = "stalled"
#: Looks for which a kill for lack of memory counts as recent.
NUM_LOOKS = 6

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+\b")
_ID = re.compile(r"\b[a-z]+_[0-9a-f]{8,}\b|\b[0-9a-fA-F]{16,}\b|\b[0-9a-f]{8}-[0-9a-f-]{27}\b")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Evidence:
    signature: str
    detail: str
    is_certain: bool


def of_death(
    *,
    fatal: Fatal | None,
    status: int | None,
    is_stalled: bool,
    num_oom_kills: int,
    limit_s: float,
    stacks: Sequence[ThreadStack] = (),
) -> Evidence:
    """Judge a death.

    Args:
        fatal: the engine's last words; None when it left none.
        status: of the process, negative for a signal; None when it had to be ended by us.
        is_stalled: the watchdog ended it.
        num_oom_kills: in our group of processes, lately.
        limit_s: how long the watchdog waited.
        stacks: where its threads stood, where that is known: a part of the detail.
    """
    found = _judged(fatal, status, is_stalled, num_oom_kills, limit_s)
    lines = [found.detail, *(f"{stack.name}: {stack}" for stack in stacks)]
    return replace(found, detail="\n".join(lines))


def _judged(
    fatal: Fatal | None,
    status: int | None,
    is_stalled: bool,
    num_oom_kills: int,
    limit_s: float,
) -> Evidence:
    if is_stalled:
        return Evidence(STALLED, f"it made no step for {limit_s:g} s with work in hand", True)
    if fatal is not None:
        is_certain = fatal.code not in _OF_THE_DEVICE
        text = normalised(f"{fatal.kind or fatal.code} at {fatal.where or '?'}: {fatal.text}")
        return Evidence(text[:MAX_SIGNATURE_CHARS], f"{fatal.code}: {text}", is_certain)
    if status is None:
        return Evidence("ended", "it closed its socket without a word and did not end", False)
    if status < 0:
        return _of_signal(-status, num_oom_kills)
    # Ours ends with 1 and last words, or with 0 because it was told to.
    return Evidence(f"exit status {status}", "it ended without a word", status != 0)


def _of_signal(number: int, num_oom_kills: int) -> Evidence:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL and num_oom_kills:
        return Evidence(
            "out of memory", "the kernel killed it: memory of the group is used up", True
        )
    return Evidence(name, f"a signal ended it: {name}", number in FAULTS)


def normalised(text: str) -> str:
    """Take out of a text what differs from death to death of one cause."""
    text = _QUOTED.sub("'...'", " ".join(text.split()))
    text = _ID.sub("<id>", _ADDRESS.sub("<address>", text))
    return _NUMBER.sub("N", text)


class OomKills:
    """Counts the kernel's kills for lack of memory in the control group of this process.

    The engine is in the same group. Version 2 tells in memory.events, version 1 in
    memory.oom_control; where neither can be read (no limit, no Linux) there are none.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._file = _find(root)
        self._seen = deque([self._read()], maxlen=NUM_LOOKS)

    def look(self) -> None:
        """Take what was killed NUM_LOOKS looks ago for known: it was not this engine.

        Not what is killed now: a process that holds much takes seconds to end.
        """
        self._seen.append(self._read())

    def recent(self) -> int:
        """Return how many were killed since then."""
        return max(0, self._read() - self._seen[0])

    def _read(self) -> int:
        try:
            said = "" if self._file is None else self._file.read_text()
        except OSError:
            return 0
        found = re.search(r"^oom_kill (\d+)$", said, re.MULTILINE)
        return int(found[1]) if found else 0


def _find(root: Path) -> Path | None:
    """Return the file that counts, of the group this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    groups = root / "sys/fs/cgroup"
    for line in lines:
        number, kinds, path = line.split(":", 2)
        inside = path.lstrip("/")
        if number == "0" and not kinds:
            roots = (groups, groups / "unified")
            tried = [at / name / "memory.events" for at in roots for name in (inside, "")]
        elif "memory" in kinds.split(","):
            # Inside a container the path is the host's, and its group is mounted as the root.
            tried = [groups / "memory" / at / "memory.oom_control" for at in (inside, "")]
        else:
            continue
        for file in tried:
            if file.is_file():
                return file
    return None
