"""One pub/sub connection a process, shared by all of its live streams.

A courier publishes one frame a flush to this process's channel; the follower takes it apart and
gives each job's messages to the mailboxes of its subscribers.

Invariants:
1. A mailbox exists, and Redis was asked for the job's frames, before its owner reads row or log: so
   nothing falls between the log and the frames.
2. A mailbox never holds more than MAX_MESSAGES or MAX_BYTES: one that overflows is emptied, takes
   nothing more until its owner catches up, and is told that it is behind: the log, which holds all
   of it, is read instead. A slow subscriber costs no memory and slows nobody.
3. Whenever the connection was away, every mailbox is given what its log holds beyond its owner's
   place, many logs a round trip; where that cannot be (no place, a gap of FILL_RECORDS, another
   log) it is told that it is behind. An owner that read the log by itself meanwhile is given
   nothing: what it has is newer.
4. The wish for a job's frames is repeated while a mailbox lives, and lapses by itself otherwise.
5. From the first stream on this process reports how many it holds, also when it is none any more.

Locks, threads and queues are the standard library's: gunicorn's gevent worker makes them greenlets.

Called by: gateway/stream, gateway/wait; gateway/services owns the one instance.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

from headrace.contract import log, wire
from headrace.contract.errors import QueueUnavailable
from headrace.contract.tokens import SUBSCRIPTION_S, LogView, ShardSubscription, TokenLog
from headrace.contract.wire import WireError
from headrace.gateway.log_place import LogPlace

#: Messages a mailbox holds; at 20 ms a flush, five seconds of one job.
MAX_MESSAGES = 256
#: Bytes of them, by `size_of`: what many log probabilities or a large flush fill sooner.
MAX_BYTES = 256 << 10
#: Bytes a message takes besides its text, and each token and each logprob of it: about.
MESSAGE_BYTES, TOKEN_BYTES, LOGPROB_BYTES = 400, 72, 120
#: Seconds between two repetitions of all wishes.
RENEW_S = SUBSCRIPTION_S / 3
#: Wishes repeated in one pipeline. Few round trips: between two of them each stream has its turn.
RENEW_BATCH = 1000
#: Seconds a read waits for a frame; bounds how late a repetition or a stop can be.
READ_S = 0.5
#: Seconds between two reports of open streams: well under live.STREAMS_TTL_S.
REPORT_S = 5.0
#: Seconds between two attempts to reach Redis: a connection that held longer is replaced at once.
RECONNECT_S = 0.25
#: Logs that are read in one round trip after a gap, and records of each at most.
FILL_BATCH = 500
FILL_RECORDS = 16


class Mailbox:
    """What has come for one subscriber and was not yet taken."""

    def __init__(self, model: str, job: str) -> None:
        self.model = model
        self.job = job
        self.is_behind = False  # messages were lost: read the log
        self.is_closed = False  # the process stops: end the stream, the client resumes elsewhere
        self.place: LogPlace | None = None  # where in the log the owner is; None: it reads none
        self.num_catch_ups = 0  # times the owner read the log by itself
        self._is_full = False  # it overflowed: nothing is kept until the owner catches up
        self._num_bytes = 0
        self._messages: SimpleQueue[wire.StreamMessage | None] = SimpleQueue()

    def put(self, message: wire.StreamMessage, num_bytes: int = 0) -> None:
        if self._is_full:
            return  # the log is read next, and holds it
        has_room = self._messages.qsize() < MAX_MESSAGES
        if has_room and (not self._num_bytes or self._num_bytes + num_bytes <= MAX_BYTES):
            self._num_bytes += num_bytes
            self._messages.put(message)
            return
        self._is_full = True
        self._drain()
        self.wake_behind()

    def wake_behind(self) -> None:
        """Tell the owner that something may have been lost, also if it waits."""
        self.is_behind = True
        if self._messages.qsize() < MAX_MESSAGES:
            self._messages.put(None)

    def close(self) -> None:
        self.is_closed = True
        self._messages.put(None)

    def take(self, timeout_s: float) -> list[wire.StreamMessage]:
        """Wait for messages and return all there are; empty when woken or when time is up."""
        try:
            first = self._messages.get(timeout=timeout_s)
        except Empty:
            return []
        return ([] if first is None else [first]) + self._drain()

    def catch_up(self) -> None:
        """Forget what waits, because the log is read next: it holds all of it."""
        self.num_catch_ups += 1
        self.is_behind = self._is_full = False  # first: what is lost from here on must be noticed
        self._drain()

    def _drain(self) -> list[wire.StreamMessage]:
        self._num_bytes = 0
        found: list[wire.StreamMessage] = []
        for _ in range(self._messages.qsize()):
            try:
                message = self._messages.get_nowait()
            except Empty:
                break
            if message is not None:
                found.append(message)
        return found


def size_of(message: wire.StreamMessage) -> int:
    """Return about how many bytes a message takes while it waits."""
    if not isinstance(message, wire.TokenChunk):
        return MESSAGE_BYTES
    num_logprobs = sum(len(token.top) for token in message.logprobs or ())
    text_bytes = MESSAGE_BYTES + len(message.text)
    return text_bytes + TOKEN_BYTES * len(message.ids) + LOGPROB_BYTES * num_logprobs


class Follower:
    """Receives this process's frames and gives them to the mailboxes."""

    def __init__(
        self,
        subscription: ShardSubscription,
        token_log: TokenLog,
        shard: str,
        report: Callable[[], None] = lambda: None,  # says how many streams are open
    ) -> None:
        self._subscription = subscription
        self._log = token_log
        self._shard = shard
        self._report = report
        self._boxes: dict[str, set[Mailbox]] = {}  # by job
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._renew_at = 0.0
        self._report_at = 0.0

    @contextmanager
    def follow(self, model: str, job: str) -> Iterator[Mailbox]:
        """Give the job's messages from now on to a mailbox, as long as the context lasts."""
        box = Mailbox(model, job)
        with self._lock:
            self._boxes.setdefault(job, set()).add(box)
            if self._closing.is_set():
                box.is_closed = True
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
                self._thread.start()
        try:
            try:
                self._log.subscribe(self._shard, [(model, job)])
            except QueueUnavailable:
                box.is_behind = True  # asked again with all others when Redis is back
            yield box
        finally:
            self._leave(box)

    def close(self) -> None:
        """End all streams and stop."""
        self._closing.set()
        with self._lock:
            boxes = self._all_boxes()
        for box in boxes:
            box.close()
        if self._thread is not None:
            self._thread.join()

    def _leave(self, box: Mailbox) -> None:
        with self._lock:
            boxes = self._boxes[box.job]
            boxes.discard(box)
            is_last = not boxes
            if is_last:
                del self._boxes[box.job]
        if is_last and not self._closing.is_set():
            try:
                self._log.unsubscribe(self._shard, box.model, box.job)
            except QueueUnavailable:
                return  # it lapses
            with self._lock:
                is_wanted = box.job in self._boxes
            if is_wanted:  # somebody came while we asked: their wish may be the one removed
                self._ask_for([(box.model, box.job)])

    def _run(self) -> None:
        while not self._closing.is_set():
            began_at = time.monotonic()
            try:
                self._subscription.open()
                self._ask_for_all()
                self._fill_gaps()
                while not self._closing.is_set():
                    self._receive()
                    self._keep_up()
            except QueueUnavailable as error:
                log.event("follower.disconnected", level=logging.WARNING, why=error.detail)
                self._closing.wait(max(0.0, began_at + RECONNECT_S - time.monotonic()))
            except Exception as error:  # noqa: BLE001  the outermost loop: else all streams go deaf
                log.failure("follower.failed", error)
                self._closing.wait(RECONNECT_S)
            finally:
                self._subscription.close()

    def _receive(self) -> None:
        try:
            messages = self._subscription.messages(READ_S)
        except WireError as error:  # a courier of another version: its log says the same again
            log.event("frame.refused", level=logging.ERROR, why=error.detail)
            self._tell_all_behind()
            return
        for message in messages:
            boxes = tuple(self._boxes.get(message.job, ()))
            num_bytes = size_of(message) if boxes else 0
            for box in boxes:
                box.put(message, num_bytes)

    def _keep_up(self) -> None:
        """Repeat what lapses unless it is repeated."""
        now = time.monotonic()
        if now >= self._renew_at:
            self._ask_for_all()
        if now >= self._report_at:
            self._report_at = now + REPORT_S
            self._report()

    def _ask_for_all(self) -> None:
        self._renew_at = time.monotonic() + RENEW_S
        with self._lock:
            wanted = [(next(iter(boxes)).model, job) for job, boxes in self._boxes.items()]
        for start in range(0, len(wanted), RENEW_BATCH):
            self._log.subscribe(self._shard, wanted[start : start + RENEW_BATCH])

    def _ask_for(self, jobs: Iterable[tuple[str, str]]) -> None:
        try:
            self._log.subscribe(self._shard, list(jobs))
        except QueueUnavailable:
            self._tell_all_behind()

    def _fill_gaps(self) -> None:
        """Give each mailbox what was published while nobody listened (invariant 3)."""
        with self._lock:
            boxes = self._all_boxes()
        for start in range(0, len(boxes), FILL_BATCH):
            self._fill(boxes[start : start + FILL_BATCH])

    def _fill(self, boxes: list[Mailbox]) -> None:
        places = [(box, box.place, box.num_catch_ups) for box in boxes]
        wanted = [
            (box.model, box.job, place.begin) for box, place, _ in places if place is not None
        ]
        views = iter(self._log.read_each(wanted, FILL_RECORDS) if wanted else ())
        for box, place, num_catch_ups in places:
            found = None if place is None else _beyond(place, next(views))
            if box.num_catch_ups != num_catch_ups:
                continue
            if found is None:
                box.wake_behind()
                continue
            for message in found:
                box.put(message, size_of(message))

    def _tell_all_behind(self) -> None:
        with self._lock:
            boxes = self._all_boxes()
        for box in boxes:
            box.wake_behind()

    def _all_boxes(self) -> list[Mailbox]:
        return [box for boxes in self._boxes.values() for box in boxes]


def _beyond(
    place: LogPlace, view: LogView | WireError
) -> tuple[wire.TokenChunk | wire.JobEnd, ...] | None:
    """Return the records after the place, None where the owner must look for itself."""
    if isinstance(view, WireError) or view.num_records == FILL_RECORDS:
        return None
    return place.new_in(view)
