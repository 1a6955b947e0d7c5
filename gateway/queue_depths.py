"""What waits for each model, as one gateway process sees it: read from Redis, and its own accepts.

One read of all models, at most every READ_EVERY_S, by the request that finds the last one old; the
others go by what is known. What this process has let in since the last read began is added, so a
burst between two reads is seen. Several processes see one another's jobs a read later.

Invariants:
1. A place counts from `take` until a read that began after it was settled, or until it is given
   back: a job is never missed while it goes from here to Redis, and counted twice at most until the
   next read.
2. No request waits for a Redis that is away but one every RETRY_S. Until it is back the last known
   depth stands, and every job accepted since adds to it.
3. Only models of the fleet are held, whatever names clients send.

Called by: gateway/admission.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.contract.errors import QueueUnavailable
from headrace.contract.live import Live
from headrace.contract.waiting import Load, Waiting

#: Seconds a read is believed.
READ_EVERY_S = 0.25
#: Seconds until a Redis that is away is asked again.
RETRY_S = 1.0
#: Seconds over which the drain rate is measured, and between two of its points.
RATE_WINDOW_S, RATE_STEP_S = 30.0, 0.5


@dataclass(slots=True)
class Place:
    """A job that is being let in, or was since the last read."""

    model: str
    tenant: str
    load: Load
    settled_at: float | None = None  # monotonic s; None: it is on its way


@dataclass(slots=True)
class _Queue:
    """One model."""

    total: Load = field(default_factory=Load)
    tenants: Mapping[str, Load] = field(default_factory=dict[str, Load])
    own: dict[str, Load] = field(default_factory=lambda: defaultdict(Load))  # by tenant
    drained: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def saw(self, waiting: Waiting, now_s: float) -> None:
        tenants: dict[str, Load] = defaultdict(Load)
        for (_, tenant), load in waiting.lanes.items():
            tenants[tenant] += load
        self.tenants, self.total = tenants, sum(tenants.values(), Load())
        num_left = waiting.num_accepted - self.total.num_jobs
        if self.drained and num_left < self.drained[-1][1]:
            self.drained.clear()  # Redis was emptied: it counts anew
        if not self.drained or now_s - self.drained[-1][0] >= RATE_STEP_S:
            self.drained.append((now_s, num_left))
        while now_s - self.drained[0][0] > RATE_WINDOW_S:
            self.drained.popleft()


class QueueDepths:
    """The depths of all models."""

    def __init__(self, live: Live, models: Callable[[], Sequence[str]]) -> None:
        self._live = live
        self._models = models  # those of the fleet, without a look-up
        self._queues: dict[str, _Queue] = {}
        self._places: list[Place] = []
        self._read_at = 0.0  # monotonic s; before this no read is due
        self._reading, self._lock = threading.Lock(), threading.Lock()
        self.is_away = False

    @property
    def num_unseen(self) -> int:
        """Jobs of this process that no read can have shown."""
        return len(self._places)

    def of(self, model: str, tenant: str) -> tuple[Load, Load] | None:
        """Return what waits for a model, in all and of a tenant; None for a model not known."""
        self._keep_fresh(model)
        queue = self._queues.get(model)
        if queue is None:
            return None
        with self._lock:
            own = sum(queue.own.values(), Load())
            return queue.total + own, queue.tenants.get(tenant, Load()) + queue.own[tenant]

    def jobs_per_s(self, model: str) -> float | None:
        """Return how fast jobs have left the queue; None where it was not watched yet."""
        queue = self._queues.get(model)
        if queue is None or len(queue.drained) < 2:
            return None
        (begin_s, before), (end_s, after) = queue.drained[0], queue.drained[-1]
        return (after - before) / (end_s - begin_s)

    def take(self, model: str, tenant: str, load: Load) -> Place | None:
        """Count a job that is let in; None for a model not known."""
        with self._lock:
            if (queue := self._queues.get(model)) is None:
                return None
            queue.own[tenant] += load
            place = Place(model, tenant, load)
            self._places.append(place)
        return place

    def settle(self, place: Place, *, is_accepted: bool) -> None:
        """The job was accepted, and counts until Redis shows it; or it was not."""
        with self._lock:
            place.settled_at = time.monotonic()
            if not is_accepted:
                self._drop(place)
                self._places.remove(place)

    def read(self) -> None:
        """Ask Redis now; QueueUnavailable when it is away."""
        began_at = time.monotonic()
        waiting = self._live.waiting(self._models())
        with self._lock:
            for model, found in waiting.items():
                self._queues.setdefault(model, _Queue()).saw(found, began_at)
            kept: list[Place] = []
            for place in self._places:
                if place.settled_at is None or place.settled_at > began_at:
                    kept.append(place)
                else:
                    self._drop(place)
            self._places = kept

    def _keep_fresh(self, model: str) -> None:
        if model not in self._queues and model not in self._models():
            return  # it is no model, or its first job: its acceptance makes it known
        is_due = time.monotonic() >= self._read_at or (
            model not in self._queues and not self.is_away
        )
        if not is_due or not self._reading.acquire(blocking=False):
            return
        try:
            self.read()
            self.is_away = False
            self._read_at = time.monotonic() + READ_EVERY_S
        except QueueUnavailable:
            self.is_away = True
            self._read_at = time.monotonic() + RETRY_S
            self._queues.setdefault(model, _Queue())  # what is accepted from here on counts
        finally:
            self._reading.release()

    def _drop(self, place: Place) -> None:
        queue = self._queues[place.model]
        left = queue.own[place.tenant]
        queue.own[place.tenant] = Load(
            left.num_jobs - place.load.num_jobs, left.num_tokens - place.load.num_tokens
        )
        if queue.own[place.tenant] == Load():
            del queue.own[place.tenant]
