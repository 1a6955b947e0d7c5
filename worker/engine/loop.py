"""The engine process: it owns the model and the pool, and knows nothing but tokens.

    python -m headrace.worker.engine.loop --fd N --config JSON

N is an inherited socket whose other end is the courier's; JSON is a frames.EngineConfig. No socket
is opened here and no text is read. `Engine.step` is the whole life of a token.

Invariants:
 1. Every admitted sequence gets its tokens in order and one end, unless the courier says Stop.
 2. A failure of one sequence ends that one. An unexpected exception is sent as Fatal and ends the
    process with 1.
 3. The process waits only where there is nothing to do: no work, or a courier that does not read.
 4. It ends at the next step when the courier is gone, and is killed with its parent (Linux).

Called by: worker/engine_link.py, which starts it as a process.
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

import msgspec
import numpy as np

from headrace.worker import frames
from headrace.worker.engine import sampling
from headrace.worker.engine.architecture import UnsupportedModel
from headrace.worker.engine.batch import build_batch
from headrace.worker.engine.kv_pool import KVPool
from headrace.worker.engine.runner import Runner, build_runner
from headrace.worker.engine.sampling import Sampled
from headrace.worker.engine.scheduler import Plan, Scheduler
from headrace.worker.engine.sequence import Sequence, SequenceError, check_asked
from headrace.worker.frames import Admit, Cancel, EngineConfig, Reason, Stop

#: seconds given to the courier to read the last frames of an engine that ends.
LAST_WORDS_S = 2.0
#: prctl option: the signal this process gets when its parent ends. To the kernel the parent is the
#: thread that started it: the courier starts engines from a thread that lives as long as it does.
PR_SET_PDEATHSIG = 1


class CourierGone(Exception):
    """The other end is closed: what is computed here has no reader."""


class Engine:
    """One model, one pool, one loop."""

    def __init__(self, runner: Runner, config: EngineConfig, sock: socket.socket) -> None:
        pool = KVPool(runner.num_blocks, runner.block_size)
        limit = min(runner.max_positions, pool.num_tokens)
        self.max_seq_tokens = min(config.max_seq_tokens or limit, limit)
        self.scheduler = Scheduler(pool, config.max_num_seqs, config.max_step_tokens)
        self._runner = runner
        self._debug_check = config.debug_check
        self._sock = sock
        self._reader = frames.FrameReader()
        self._writer = frames.FrameWriter(sock)
        self._is_stopped = False
        self._num_admitted = 0
        self._num_steps = 0
        self._ends: list[tuple[Sequence, Reason]] = []  # without a token, for the next frame

    def run(self) -> None:
        """Step until the courier says Stop; raise CourierGone when it is no more."""
        while not self._is_stopped:
            self.receive()
            if self._has_work:
                self.step()
        self._writer.drain(LAST_WORDS_S)

    @property
    def _has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._ends)

    def step(self) -> None:
        """Compute one step of everything, and tell of it."""
        started_ns = time.monotonic_ns()
        plan = self.scheduler.plan()
        if self._debug_check:
            self.scheduler.check(plan)
        due, sampled = self._compute(plan)
        reasons = [self._extend(seq, sampled, row) for row, seq in enumerate(due)]
        for seq, reason in zip(due, reasons, strict=True):
            self._retire(seq, reason)
        self._emit(plan, due, reasons, sampled, started_ns)

    def _compute(self, plan: Plan) -> tuple[list[Sequence], Sampled]:
        """Return the sequences that get a token from this step, and their tokens."""
        if not plan.num_tokens:  # there are only ends to tell of
            return [], Sampled(np.empty(0, np.int64), np.empty(0, bool))
        batch = build_batch(plan, self._runner.block_size)
        self._runner.run(batch)
        sampled = self._runner.sample(batch)
        self.scheduler.advance(plan)
        return batch.due, sampled

    def receive(self) -> None:
        """Take the courier's commands; wait for one only if there is nothing else to do."""
        while True:
            must_wait = self._writer.is_full or not self._has_work
            wants_write = [self._sock] if self._writer.backlog_bytes else []
            select.select([self._sock], wants_write, [], None if must_wait else 0)
            self._writer.flush()
            if not self._reader.receive(self._sock):
                raise CourierGone
            for kind, payload in self._reader.frames():
                self._obey(frames.unpack(kind, payload))
            if self._is_stopped or (self._has_work and not self._writer.is_full):
                return

    def _obey(self, command: object) -> None:
        match command:
            case Admit():
                self._admit(command)
            case Cancel():
                if (seq := self.scheduler.find(command.seq_id)) is not None:
                    self.scheduler.retire(seq, is_finished=False)
                    self._ends.append((seq, Reason.CANCELED))
            case Stop():
                self._is_stopped = True
            case _:
                raise frames.FrameError(f"courier sent {type(command).__name__}: no command")

    def _admit(self, asked: Admit) -> None:
        """Queue a sequence, or end it at once with the reason."""
        if self.scheduler.find(asked.seq_id) is not None:
            raise frames.FrameError(f"seq_id {asked.seq_id} admitted twice: a courier's mistake")
        self._num_admitted += 1
        try:
            check_asked(asked, self._runner.vocab_size, self.max_seq_tokens)
            sampling.check_params(asked.params, self._runner.vocab_size)
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

    def _extend(self, seq: Sequence, sampled: Sampled, row: int) -> Reason:
        """Give a sequence its next token, and say whether that ends it."""
        if not sampled.is_finite[row]:
            return Reason.FAILED
        seq.append(int(sampled.tokens[row]))
        return seq.ending()

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

    def _emit(
        self,
        plan: Plan,
        due: list[Sequence],
        reasons: list[Reason],
        sampled: Sampled,
        started_ns: int,
    ) -> None:
        """Send one frame with the step's tokens, and with the ends that came without one."""
        rows = [
            _entry(seq, reason, sampled, row)
            for row, (seq, reason) in enumerate(zip(due, reasons, strict=True))
        ]
        rows += [_entry(seq, reason) for seq, reason in self._ends]
        self._ends = []
        logprobs = [
            sampled.logprobs[row]
            for row in sorted(sampled.logprobs)
            if reasons[row] != Reason.FAILED
        ]
        entries = np.array(rows, frames.ENTRY)
        self._writer.send(frames.pack_step(self._stats(plan, started_ns), entries, logprobs))

    def _stats(self, plan: Plan, started_ns: int) -> frames.StepStats:
        scheduler, pool, now_ns = self.scheduler, self.scheduler.pool, time.monotonic_ns()
        self._num_steps += 1
        return frames.StepStats(
            step=self._num_steps,
            time_ns=now_ns,
            num_preempted_total=scheduler.num_preempted_total,
            prefix_hit_tokens_total=scheduler.prefix_hit_tokens_total,
            room_tokens=scheduler.room_tokens(),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            free_blocks=pool.num_free,
            total_blocks=pool.num_blocks,
            cached_blocks=pool.num_cached,
            prefill_tokens=plan.num_prefill_tokens,
            step_us=(now_ns - started_ns) // 1000,
            predicted_output_tokens=round(scheduler.lengths.mean or 0),
            num_admits_total=self._num_admitted,
        )


def _entry(
    seq: Sequence, reason: Reason, sampled: Sampled | None = None, row: int = -1
) -> tuple[int, int, int, int, int, int, int]:
    """Lay out one frames.ENTRY; a token was appended if the row was sampled and did not fail."""
    has_token = sampled is not None and reason is not Reason.FAILED
    token = int(seq.tokens[seq.num_known - 1]) if has_token else -1
    num_logprobs = -1
    if sampled is not None and has_token and row in sampled.logprobs:
        num_logprobs = len(sampled.logprobs[row][1])
    index = seq.num_output - has_token
    return seq.asked.seq_id, token, index, seq.cached_tokens, int(reason), num_logprobs, 0


def _no_tokens(asked: Admit) -> Sequence:
    """Stand for a sequence that was refused before its tokens were looked at."""
    num_output = len(asked.output) // 4
    return Sequence(asked, 0, np.empty(0, np.int32), num_prompt=0, num_known=num_output)


def main(arguments: list[str] | None = None) -> int:
    """Load, say Ready, and step until told to stop; return the exit status."""
    parser = argparse.ArgumentParser(prog="headrace.worker.engine.loop")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the courier")
    parser.add_argument("--config", required=True, help="a frames.EngineConfig as JSON")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the courier decides
    _die_with_parent()
    with socket.socket(fileno=options.fd) as sock:
        try:
            _serve(sock, options.config)
        except CourierGone:
            return 0
        except ConnectionError:
            return 0  # the courier went while we were writing: the same
        except Exception as error:  # noqa: BLE001 (outermost loop: it is told, and the process ends)
            _send_last_words(sock, error)
            return 1
    return 0


def _serve(sock: socket.socket, config_json: str) -> None:
    started_s = time.monotonic()
    config = msgspec.json.decode(config_json, type=EngineConfig)
    runner = build_runner(config)
    engine = Engine(runner, config, sock)
    # What is loaded lives as long as the process; the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    ready = frames.Ready(
        num_blocks=runner.num_blocks,
        block_size=runner.block_size,
        max_seq_tokens=engine.max_seq_tokens,
        vocab_size=runner.vocab_size,
        dtype=runner.dtype_name,
        load_s=time.monotonic() - started_s,
    )
    sock.sendall(frames.pack_notice(ready))
    engine.run()


def _send_last_words(sock: socket.socket, error: Exception) -> None:
    codes = {
        UnsupportedModel: "unsupported_model",
        MemoryError: "out_of_memory",
        frames.FrameError: "bad_frame",
        msgspec.ValidationError: "bad_config",
        msgspec.DecodeError: "bad_config",
        ValueError: "bad_config",
    }
    code = codes.get(type(error), "engine_failed")
    text = str(error) or type(error).__name__
    if code == "engine_failed":
        sys.excepthook(
            type(error), error, error.__traceback__
        )  # for the worker's log, not the wire
    writer = frames.FrameWriter(sock)
    try:
        writer.send(frames.pack_notice(frames.Fatal(code, text)))
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
