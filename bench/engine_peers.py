"""A peer's runs in a process of its own: its libraries, memory and clocks away from ours.

    python -m headrace.bench.engine_peers JOB.json      (the child; `run_peer` starts it)

The child gets a PeerJob, makes the same requests by the same seed, and tells stdout one line of
JSON an event behind the word PEER: that it has started, then the end of each workload in order.
What a peer itself prints goes on to stderr. The runs' logs are npz files in the job's folder.

Invariants:
1. A peer that cannot be imported is no error: `missing_peer` says so before anything is started.
2. No process of a peer outlives `run_peer`: the child leads a process group, which is killed.
3. A peer that does not start or end in its time gives an Event with `error`, and no later one.

Called by: engine.py.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from headrace.bench.children import child_environ
from headrace.bench.engine_log import RunLog
from headrace.bench.engine_requests import make_requests, make_warm_up
from headrace.bench.roofline import Request

#: name of a peer -> the setups it is run in, one process each.
SETUPS = {"vllm": ("equal", "defaults"), "transformers": ("continuous",)}
#: first word of the child's own lines.
WORD = "PEER "


class PeerJob(msgspec.Struct, frozen=True):
    """What a child is to do."""

    peer: str
    setup: str
    model_folder: str
    out_folder: str  # gets the logs
    workloads: list[str]
    scale: float
    vocab_size: int
    max_num_seqs: int
    max_step_tokens: int
    max_seq_tokens: int
    kv_bytes: int  # of our engine's pool
    kv_tokens: int  # that it holds
    kv_dtype: str | None = None
    weights_dtype: str | None = None
    seconds: float = 120.0  # for a workload
    is_traced: bool = True  # a second run for the times of tokens, where throughput needs its own


class Event(msgspec.Struct, frozen=True):
    """What a child tells."""

    workload: str = ""  # empty: it has started
    start_s: float = 0.0
    settings: dict[str, Any] = {}
    seconds: float = 0.0  # of the run whose throughput counts
    log: str = ""  # file of the run whose latencies count; empty where there was no time for one
    error: str = ""


class Peer(Protocol):
    """A peer inside its child, ready to run."""

    settings: dict[str, Any]  # as it runs, versions included

    def warm_up(self, requests: list[Request]) -> None:
        """Run these, unmeasured."""
        ...

    def measure(self, requests: list[Request]) -> tuple[float, list[int]]:
        """Run all requests its fastest way; return seconds and tokens made of each."""
        ...

    def trace(self, requests: list[Request]) -> RunLog | None:
        """Run them once more noting each token's time, if `measure` did not already."""
        ...


def missing_peer(peer: str) -> str | None:
    """Return why a peer cannot be run here, or None."""
    if importlib.util.find_spec(peer) is None:
        return f"{peer} is not installed: skipped (put it on PYTHONPATH to compare)"
    return None


def run_peer(job: PeerJob, start_s: float) -> Iterator[Event]:
    """Start a child and yield its events, the last of them with `error` if it did not end well."""
    path = Path(job.out_folder) / f"{job.peer}-{job.setup}.json"
    path.write_bytes(msgspec.json.encode(job))
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.bench.engine_peers", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=child_environ(),
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines))
    reader.start()
    try:
        for number in range(1 + len(job.workloads)):
            event = _next_event(lines, job.seconds if number else start_s)
            yield event
            if event.error:
                return
    finally:
        _end(process)
        reader.join()
        if process.stdout:
            process.stdout.close()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put(None)


def _next_event(lines: queue.Queue[str | None], seconds: float) -> Event:
    """Wait for the child's next event; pass on what is not one."""
    deadline_s, last = time.monotonic() + seconds, ""
    while True:
        try:
            line = lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            return Event(error=f"did not end in {seconds:.0f} s")
        if line is None:
            return Event(error=f"its process ended early; its last words: {last}")
        if line.startswith(WORD):
            return msgspec.json.decode(line[len(WORD) :], type=Event)
        last = line.strip() or last
        print(line, end="", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the child and all that it started; they are a group of their own."""
    with contextlib.suppress(ProcessLookupError):  # it may have ended, its children with it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: list[str]) -> int:
    """Be the child: start the peer, run the workloads, tell of each."""
    started_s = time.monotonic()
    job = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=PeerJob)
    start: Callable[[PeerJob], Peer] = importlib.import_module(
        f"headrace.bench.peer_{job.peer}"
    ).start
    peer = start(job)
    _tell(Event(start_s=time.monotonic() - started_s, settings=peer.settings))
    for workload in job.workloads:
        _tell(_run(peer, job, workload))
    return 0


def _run(peer: Peer, job: PeerJob, workload: str) -> Event:
    """Warm up, measure, and trace if there is time for it."""
    deadline_s = time.monotonic() + job.seconds
    requests = make_requests(workload, job.vocab_size, job.scale)
    peer.warm_up(make_warm_up(workload, job.vocab_size, job.scale))
    seconds, counts = peer.measure(requests)
    if counts != [num_output for _, num_output in requests]:
        return Event(workload, error=f"made {sum(counts)} tokens, not those asked for")
    log = None
    # As long again, and a half more for what noting the times costs.
    if job.is_traced and time.monotonic() + 1.5 * seconds < deadline_s:
        log = peer.trace(requests)
    path = Path(job.out_folder) / f"{job.peer}-{job.setup}-{workload}.npz"
    if log is not None:
        log.save(path)
    return Event(workload, seconds=seconds, log=str(path) if log is not None else "")


def _tell(event: Event) -> None:
    print("\n" + WORD + msgspec.json.encode(event).decode(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
