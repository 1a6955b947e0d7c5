"""The engine process: it owns the model and the pool, and knows nothing but tokens.

    python -m headrace.worker.engine.loop --fd N --config JSON

N is an inherited socket whose other end is the courier's; JSON is a frames.EngineConfig. No socket
is opened here and no text is read. `Engine.step` is the whole life of a token: steps are submitted
ahead of their results, as many as the runner's depth, and each has one frame when it is collected.

Invariants:
 1. Every admitted sequence gets its tokens in order and one end, unless the courier says Stop; rows
    in flight behind its end are dropped.
 2. A failure of one sequence ends that one. An unexpected exception is sent as Fatal and ends the
    process with 1.
 3. The process waits only where there is nothing to do: no work, or a courier that does not read.
 4. It ends at the next step when the courier is gone, and is killed with its parent (Linux). Steps
    in flight then are waited for and told to nobody.
 5. At most depth + 1 steps are in flight, and results are collected in order of submission.

Called by: worker/engine_link.py, which starts it as a process.

Size: the whole life of a token is read here in one go.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass

import msgspec
import numpy as np

from headrace.contract import log
from headrace.worker import frames, stacks
from headrace.worker.engine import sampled
from headrace.worker.engine.batch import Batch
from headrace.worker.engine.canary import prove
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.last_words import last_words
from headrace.worker.engine.outcome import Outcome, end_entries, take_results
from headrace.worker.engine.runner import Runner, build_runner, resolve_config
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence import Sequence, SequenceError, check_asked
from headrace.worker.engine.startup import StartupLedger, fill_limits, gpu_uuid
from headrace.worker.frames import Admit, Cancel, EngineConfig, Reason, Stop

#: seconds given to the courier to read the last frames of an engine that ends.
LAST_WORDS_S = 2.0
#: prctl option: the signal this process gets when its parent ends. To the kernel the parent is the
#: thread that started it: the courier starts engines from a thread that lives as long as it does.
PR_SET_PDEATHSIG = 1


class CourierGone(Exception):
    """The other end is closed: what is computed here has no reader."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A step submitted and not collected."""

    batch: Batch
    submitted_ns: int


class Engine:
    """One model, one pool, one loop."""

    def __init__(self, runner: Runner, config: EngineConfig, sock: socket.socket) -> None:
        pool = KVPool(runner.num_blocks, runner.block_size)
        limit = min(runner.max_positions, pool.num_tokens)
        self.max_seq_tokens = min(config.max_seq_tokens or limit, limit)
        config = fill_limits(config)
        self.scheduler = Scheduler(
            pool,
            config.max_num_seqs,
            config.max_step_tokens,
            self.max_seq_tokens,
            (config.target_step_ms or 0.0) / 1e3,
        )
        self._runner = runner
        self._debug_check = config.debug_check
        self._sock = sock
        self._reader = frames.FrameReader()
        self._writer = frames.FrameWriter(sock)
        self._is_stopped = False
        self._num_admitted = 0
        self._num_frames = 0
        self._in_flight: deque[Flight] = deque()
        self._last_collected_ns = 0
        self._host_since_ns = 0  # when the work for the next frame began; moved on by each wait
        self._host_left_ns = 0  # worked for the next frame in the steps before
        self._ends: list[tuple[Sequence, Reason]] = []  # without a token, for the next frame

    def run(self) -> None:
        """Step until the courier says Stop; raise CourierGone when it is no more."""
        try:
            while not self._is_stopped:
                self.receive()
                if self.has_work:
                    self.step()
        except (CourierGone, ConnectionError):
            self._abandon_flights()
            raise
        self._abandon_flights()
        self._writer.drain(LAST_WORDS_S)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._ends) or bool(self._in_flight)

    def step(self) -> None:
        """Submit one step of everything, and tell of those that have come back."""
        self._host_since_ns = time.monotonic_ns() - self._host_left_ns
        batch = self._plan()
        if batch is not None:
            self._runner.submit(batch)
            self._in_flight.append(Flight(batch, time.monotonic_ns()))
            while len(self._in_flight) > self._runner.depth or self._is_result_there():
                self._collect()
        elif self._in_flight:
            self._collect()
        elif self._ends:
            self._emit(None, None)
        self._host_left_ns = time.monotonic_ns() - self._host_since_ns

    def _plan(self) -> Batch | None:
        """Return the next step, or None when there is nothing to compute before more results."""
        plan = self.scheduler.plan()
        if plan is None:
            while self._in_flight:
                self._collect()
            plan = self.scheduler.plan()
            assert plan is not None, "nothing is in flight any more"
        if self._debug_check:
            self.scheduler.check(plan)
        return self.scheduler.submit(plan) if plan.num_tokens else None

    def _is_result_there(self) -> bool:
        return bool(self._in_flight) and self._runner.is_ready()

    def _collect(self) -> None:
        """Take the oldest step's results: values, ends, one frame."""
        flight, asked_ns = self._in_flight.popleft(), time.monotonic_ns()
        sampled = self._runner.collect()
        came_ns = time.monotonic_ns()
        self._host_since_ns += came_ns - asked_ns
        outcome = take_results(flight.batch, sampled)
        self.scheduler.settle(outcome.sound)
        for slot, reason in outcome.ended:
            self._retire(self.scheduler.table.sequence(slot), reason)
        step_ns = came_ns - max(flight.submitted_ns, self._last_collected_ns)
        self._last_collected_ns = came_ns
        self.scheduler.learn(flight.batch, step_ns / 1e9)
        self._emit(flight.batch, outcome, step_ns)

    def _abandon_flights(self) -> None:
        """Let the runner come to rest: what it computes has no reader."""
        while self._in_flight:
            self._in_flight.popleft()
            self._runner.collect()

    def receive(self) -> None:
        """Take the courier's commands; wait for one only if there is nothing else to do."""
        while True:
            must_wait = self._writer.is_full or not self.has_work
            wants_write = [self._sock] if self._writer.backlog_bytes else []
            select.select([self._sock], wants_write, [], None if must_wait else 0)
            self._writer.flush()
            if not self._reader.receive(self._sock):
                raise CourierGone
            for kind, payload in self._reader.frames():
                self._obey(frames.unpack(kind, payload))
            if self._is_stopped or (self.has_work and not self._writer.is_full):
                return

    def _obey(self, command: object) -> None:
        match command:
            case Admit():
                self.admit(command)
            case Cancel():
                if (seq := self.scheduler.find(command.seq_id)) is not None:
                    self.scheduler.retire(seq, is_finished=False)
                    self._ends.append((seq, Reason.CANCELED))
            case Stop():
                self._is_stopped = True
            case _:
                raise frames.FrameError(f"courier sent {type(command).__name__}: no command")

    def admit(self, asked: Admit) -> None:
        """Queue a sequence, or end it at once with the reason."""
        if self.scheduler.find(asked.seq_id) is not None:
            raise frames.FrameError(f"seq_id {asked.seq_id} admitted twice: a courier's mistake")
        self._num_admitted += 1
        try:
            check_asked(asked, self._runner.vocab_size, self.max_seq_tokens)
            sampled.check_params(asked.params, self._runner.vocab_size)
            seq = Sequence.from_admit(asked, self._num_admitted)
            if (reason := seq.ending()) is not Reason.GOING_ON:
                # An earlier attempt died between its last token and its result.
                self._ends.append((seq, reason))
            else:
                self.scheduler.add(seq)
        except SequenceError as error:
            self._fail(asked, error)

    def _fail(self, asked: Admit, error: SequenceError) -> None:
        notice = frames.Failure(asked.seq_id, error.code, str(error))
        self._writer.send(frames.pack_notice(notice))
        self._ends.append((_no_tokens(asked), Reason.FAILED))

    def _retire(self, seq: Sequence, reason: Reason) -> None:
        """Forget a sequence that ended."""
        if reason is Reason.FAILED:
            self._runner.clear(self.scheduler.retire_spoiled(seq))
            text = (
                f"logits of output token {seq.num_output} are no finite numbers; weights, dtype "
                "or a logit_bias overflow: try float32, or report the prompt"
            )
            notice = frames.Failure(seq.asked.seq_id, "not_finite", text)
            self._writer.send(frames.pack_notice(notice))
        elif reason is not Reason.GOING_ON:
            self.scheduler.retire(seq, is_finished=True)

    def _emit(self, batch: Batch | None, outcome: Outcome | None, step_ns: int = 0) -> None:
        """Send one frame with a step's tokens, and with the ends that came without one."""
        entries = np.empty(0, frames.ENTRY) if outcome is None else outcome.entries
        logprobs = [] if outcome is None else outcome.logprobs
        if self._ends:
            entries = np.concatenate((entries, end_entries(self._ends)))
            self._ends = []
        self._writer.send(frames.pack_step(self._stats(batch, step_ns), entries, logprobs))

    def _stats(self, batch: Batch | None, step_ns: int) -> frames.StepStats:
        scheduler, pool = self.scheduler, self.scheduler.pool
        room_tokens = scheduler.room_tokens()
        self._num_frames += 1
        now_ns = time.monotonic_ns()
        host_ns, self._host_since_ns = now_ns - self._host_since_ns, now_ns
        return frames.StepStats(
            step=self._num_frames,
            time_ns=now_ns,
            num_preempted_total=scheduler.num_preempted_total,
            prefix_hit_tokens_total=scheduler.prefix_hit_tokens_total,
            room_tokens=room_tokens,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            free_blocks=pool.num_free,
            total_blocks=pool.num_blocks,
            cached_blocks=pool.num_cached,
            prefill_tokens=batch.num_prefill_tokens if batch is not None else 0,
            step_us=step_ns // 1000,
            predicted_output_tokens=round(scheduler.lengths.mean or 0),
            num_admits_total=self._num_admitted,
            host_us=host_ns // 1000,
            num_decodes=batch.num_decodes if batch is not None else 0,
        )


def _no_tokens(asked: Admit) -> Sequence:
    """Stand for a sequence that was refused before its tokens were looked at."""
    num_output = len(asked.output) // 4
    return Sequence(asked, 0, np.empty(0, np.int32), 0, num_output)


def main(arguments: list[str] | None = None) -> int:
    """Load, say Ready, and step until told to stop; return the exit status."""
    parser = argparse.ArgumentParser(prog="headrace.worker.engine.loop")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the courier")
    parser.add_argument("--stacks-fd", type=int, help="inherited file for stacks, when asked")
    parser.add_argument("--config", required=True, help="a frames.EngineConfig as JSON")
    options = parser.parse_args(arguments)
    if options.stacks_fd is not None:
        stacks.write_to(options.stacks_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the courier decides
    _die_with_parent()
    with socket.socket(fileno=options.fd) as sock:
        try:
            _serve(sock, options.config)
        except (CourierGone, ConnectionError):  # the second while we were writing
            return 0
        except Exception as error:  # noqa: BLE001 (outermost loop: it is told, and the process ends)
            _send_last_words(sock, error)
            return 1
    return 0


def _serve(sock: socket.socket, config_json: str) -> None:
    started_s = time.monotonic()
    ledger = StartupLedger()
    ledger.note_imports()
    config = resolve_config(msgspec.json.decode(config_json, type=EngineConfig))
    log.configure("INFO", "engine", config.log_format)
    log.identify(worker=config.worker)
    runner = build_runner(config, ledger)
    with ledger.stage("own job"):
        prove(lambda sock: Engine(runner, config, sock), runner.vocab_size)
    engine = Engine(runner, config, sock)
    if config.log_format == "text":  # else the courier's engine.opened says it
        print("\n".join(ledger.lines()), file=sys.stderr, flush=True)
    # What is loaded lives as long as the process: the collector need not walk it again.
    gc.collect()
    gc.freeze()
    ready = frames.Ready(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_seq_tokens=engine.max_seq_tokens,
        vocab_size=runner.vocab_size,
        dtype=runner.dtype_name,
        load_s=time.monotonic() - started_s,
        device="cuda" if config.device == "cuda" else "cpu",
        max_num_seqs=config.max_num_seqs,
        stages=ledger.entries,
        gpu=gpu_uuid(config),
    )
    sock.sendall(frames.pack_notice(ready))
    engine.run()


def _send_last_words(sock: socket.socket, error: Exception) -> None:
    words = last_words(error)
    if words.code == "engine_failed":  # for the worker's log, not the wire
        log.failure("engine.failed", error)
    writer = frames.FrameWriter(sock)
    try:
        writer.send(frames.pack_notice(words))
        writer.drain(LAST_WORDS_S)
    except OSError:
        return  # nobody is left to hear it


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Not sys.exit: torch's threads and the pool's memory need no orderly end, and it takes seconds.
    os._exit(status)
