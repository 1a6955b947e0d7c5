"""Compile many kernels at once: processes that each run a share of the cases one time.

Triton compiles at the first launch, one kernel at a time, and keeps the result on disk: what these
processes compiled, the measuring process only loads. A process says on stdout which case it begins,
and how each ended; one that dies is started again behind the case it died of.

Invariants:
1. Every case is begun by exactly one process, once; cases of one workload by the same process.
2. A case that raised or took its process down is in the returned dict, with the reason.
3. No process outlives `compile_all`.

Called by: kernels.py, on both sides.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.bench.children import child_environ


class DeviceLost(Exception):
    """A case left its process' device in a state in which nothing more can run."""


@dataclass
class _Share:
    """One process' part, as its parent follows it."""

    index: int
    num_shares: int
    first: int = 0  # cases before this one are done with
    begun: int | None = None  # being run now
    broken: dict[int, str] = field(default_factory=dict)
    last_words: str = ""  # last line that was none of ours

    @property
    def argument(self) -> str:
        return f"{self.index}:{self.num_shares}:{self.first}"

    def hear(self, line: str) -> None:
        """Take one line of the process' stdout."""
        kind, _, payload = line.partition(" ")
        if kind == "BEGIN":
            self.begun = int(payload)
        elif kind == "END":
            number, failure = json.loads(payload)
            self.begun, self.first = None, number + 1
            if failure:
                self.broken[number] = failure
        elif line.strip():
            self.last_words = line.strip()[:200]

    def bury(self, status: int) -> bool:
        """Take note of the process' end; return whether it must be started again."""
        if status == 0:
            return False
        if self.begun is None:  # it did not get to a case: the next would not either
            self.broken[self.first] = f"compiling process ended with {status}: {self.last_words}"
            return False
        self.broken[self.begun] = f"took its process down, status {status}: {self.last_words}"
        self.first, self.begun = self.begun + 1, None
        return True


def compile_all(
    labels: Sequence[str],  # of all cases, in the order that every process lists them in
    command: Sequence[str],  # that calls compile_share with its last argument, added here
    *,
    num_jobs: int,
    timeout_s: float,
) -> dict[str, str]:
    """Run every case once, in other processes; return label and reason of those that failed."""
    shares = [_Share(index, num_jobs) for index in range(num_jobs)]
    deadline_s = time.monotonic() + timeout_s
    threads = [
        threading.Thread(target=_follow, args=(share, command, deadline_s)) for share in shares
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {labels[number]: why for share in shares for number, why in share.broken.items()}


def _follow(share: _Share, command: Sequence[str], deadline_s: float) -> None:
    """Run a share's process until all its cases are done with, or time is out."""
    is_needed = True
    while is_needed and (left_s := deadline_s - time.monotonic()) > 0:
        with subprocess.Popen(
            [*command, share.argument],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=child_environ(),
        ) as process:
            timer = threading.Timer(left_s, process.kill)
            timer.start()
            for line in process.stdout or ():
                share.hear(line)
            timer.cancel()
        is_needed = share.bury(process.returncode)


def compile_share(
    keys: Sequence[tuple[str, str]],  # part and name of every case
    runs: Sequence[Callable[[], object]],  # return when the device is done
    share: str,  # "index:num_shares:first"
    free_tensors: Callable[[str], None],  # of a part, when its workload is done
) -> None:
    """Run this process' cases once each, telling stdout of each one."""
    index, num_shares, first = map(int, share.split(":"))
    workloads = list(dict.fromkeys(keys))
    for number, run in enumerate(runs):
        if workloads.index(keys[number]) % num_shares != index or number < first:
            continue
        print(f"BEGIN {number}", flush=True)
        failure = _run_once(run)
        print(f"END {json.dumps([number, failure])}", flush=True)
        if number + 1 == len(keys) or keys[number + 1] != keys[number]:
            free_tensors(keys[number][0])


def _run_once(run: Callable[[], object]) -> str:
    """Return the first line of what a case raises, or nothing; DeviceLost ends the process."""
    try:
        run()
    except DeviceLost:
        raise
    except Exception as error:  # noqa: BLE001 (its own failure, not the others')
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return ""
