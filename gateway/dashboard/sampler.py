"""One sample of the whole fleet every few seconds: rates, depths, latencies, alarms, history.

What counts up (jobs, tokens, latency buckets) is compared with a snapshot taken earlier; what is a
level (depth, workers) is read. The sample is published in Redis once, and every gateway shows that.

    figure                          from                             window
    jobs_in, jobs_out, failed, tokens  the scripts' counts           RATE_S
    ttft, itl, e2e quantiles        histograms in the beats          LATENCY_S
    share of failures (alarm)       the scripts' counts              FAILURES_S
    dead letters (alarm)            their rows                       FAILURES_S
    queued, held, oldest            the lanes                        now

Invariants:
1. A restarted sampler goes on where the last one stopped: it keeps nothing that is not in Redis but
   what Postgres said last.
2. Postgres being away changes what models, pauses, orders and letters are believed, and stops
   nothing; with Redis away there is no sample (QueueUnavailable), and the gateways raise the alarm.
3. Two samplers make one sample a tick (live invariant 1).
4. Counts that went back to zero (a new Redis, a new worker) count from there; no rate is negative.

Called by: gateway/tasks (the task `sample`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from headrace.contract.accounts import Accounts
from headrace.contract.dead_letters import DeadLetters
from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.latency_bounds import KINDS, difference, p50_p99, total
from headrace.contract.live import Live, Point, Sampled, Snapshot, Span, WorkerSnapshot
from headrace.contract.orders import Wanted, WorkerOrders
from headrace.contract.pauses import Pauses, by_model, is_paused
from headrace.contract.streams import JobStreams, LaneDepth, Workers
from headrace.contract.wire import WorkerBeat, WorkerState
from headrace.gateway.dashboard.alarms import Facts, ModelFacts, fleet_alarms, iso

#: Seconds of the windows; each begins with the oldest snapshot in it, so it needs the tick's slack.
RATE_S, LATENCY_S, FAILURES_S = 10.5, 60.0, 300.0
#: Share of a tick in which no other sampler gets a turn; the rest is for clocks that drift.
TURN_SHARE = 0.8

RATES = ("jobs_in_per_s", "jobs_out_per_s", "failed_per_s", "tokens_per_s")
LEVELS = ("num_queued", "num_running", "num_workers", "live_streams")
#: Series of which a minute keeps the mean; of all others it keeps the most.
_MEANS = {*RATES, *LEVELS}
#: States of a worker that takes jobs, or will when it has started.
_SERVING = {WorkerState.STARTING, WorkerState.READY}


@dataclass(frozen=True, slots=True)
class _Reading:
    """One model, as it is now and was."""

    depths: Sequence[LaneDepth]
    paused: frozenset[str]
    beats: Sequence[WorkerBeat]
    now: Mapping[str, int]  # counts
    recent: tuple[Mapping[str, int], float] | None  # earlier ones, and how many seconds ago
    long_ago: Mapping[str, int] | None
    latencies: Mapping[str, Sequence[int]]  # of the last minute, by kind


class Sampler:
    """Takes samples."""

    def __init__(
        self,
        *,
        accounts: Accounts,
        streams: JobStreams,
        workers: Workers,
        live: Live,
        pauses: Pauses,
        orders: WorkerOrders,
        letters: DeadLetters,
        every_s: float,
        oldest_target_s: float,
    ) -> None:
        self._accounts = accounts
        self._streams = streams
        self._workers = workers
        self._live = live
        self._pauses = pauses
        self._orders = orders
        self._letters = letters
        self._every_s = every_s
        self._oldest_target_s = oldest_target_s
        self._names: set[str] = set()
        self._paused: dict[str, set[str]] = {}
        self._quarantined: dict[str, datetime] = {}
        self._num_dead: Mapping[str, int] = {}

    def sample(self) -> bool:
        """Take and publish one sample; False when another sampler has this turn."""
        at_ms = self._live.take_turn(lasts_ms=max(1, int(self._every_s * TURN_SHARE * 1000)))
        if at_ms is None:
            return False
        at_s = at_ms / 1000
        self._ask_postgres()
        beats = list(self._workers.alive().values())
        names = sorted(self._names | {beat.model for beat in beats})
        snapshot = _snapshot(at_ms, self._live.counts(names), beats)
        readings = self._read(names, snapshot, beats)
        sample = _sample(readings, at_s) | {"live_streams": self._live.num_streams()}
        before = self._live.sampled()
        alarms = fleet_alarms(
            Facts(
                at=datetime.fromtimestamp(at_s, UTC),
                oldest_target_s=self._oldest_target_s,
                models={name: _facts(reading, at_s) for name, reading in readings.items()},
                beats=beats,
                quarantined={
                    beat.worker: self._quarantined[beat.worker]
                    for beat in beats
                    if beat.worker in self._quarantined
                },
                num_dead=self._num_dead,
            ),
            [] if before is None else before[0].alarms,
        )
        point = _point(sample, at_s)
        self._live.save(
            Sampled(at_ms=at_ms, sample=sample, alarms=alarms),
            snapshot,
            point,
            minute_before(self._live.history(Span.HOUR, newest=15), point),
        )
        return True

    def _ask_postgres(self) -> None:
        try:
            self._names = {card.name for card in self._accounts.list_models()}
            self._paused = by_model(self._names, self._pauses.list())
            self._quarantined = {
                worker: order.at
                for worker, order in self._orders.all().items()
                if order.wanted is Wanted.QUARANTINED and order.at is not None
            }
            self._num_dead = self._letters.num_new(newer_than_s=FAILURES_S)
        except DatabaseUnavailable:
            return  # what it said last is believed

    def _read(
        self, names: Sequence[str], snapshot: Snapshot, beats: Sequence[WorkerBeat]
    ) -> dict[str, _Reading]:
        now_ms = snapshot.at_ms
        recent, minute, long_ago = self._live.snapshots_since(
            *(now_ms - int(seconds * 1000) for seconds in (RATE_S, LATENCY_S, FAILURES_S))
        )
        found: dict[str, _Reading] = {}
        for name in names:
            before = None if recent is None else recent.counts.get(name, {})
            ago_s = 0 if recent is None else (now_ms - recent.at_ms) / 1000
            found[name] = _Reading(
                depths=self._streams.depths(name),
                paused=frozenset(self._paused.get(name, ())),
                beats=[beat for beat in beats if beat.model == name],
                now=snapshot.counts[name],
                recent=None if before is None or ago_s <= 0 else (before, ago_s),
                long_ago=None if long_ago is None else long_ago.counts.get(name, {}),
                latencies=latencies_between(name, snapshot, minute),
            )
        return found


def latencies_between(
    model: str, snapshot: Snapshot, before: Snapshot | None
) -> dict[str, list[int]]:
    """Return what the model's workers have counted since, kind by kind."""
    found: dict[str, list[int]] = {}
    for kind in KINDS:
        parts: list[list[int]] = []
        for worker, counted in snapshot.workers.items():
            counts = counted.latencies.get(kind)
            if counted.model != model or counts is None or before is None:
                continue
            old = before.workers.get(worker)
            is_same = old is not None and old.started_ms == counted.started_ms
            if is_same or counted.started_ms >= before.at_ms:
                parts.append(difference(counts, old.latencies.get(kind) if old else None))
        found[kind] = total(parts)
    return found


def minute_before(points: Sequence[Point], point: Point) -> Point | None:
    """Return the point of the minute that has just ended, if `point` is the first of the next."""
    minute = _minute(points[-1]) if points else None
    if minute is None or minute == _minute(point):
        return None
    of_it = [one for one in points if _minute(one) == minute]
    ended: Point = {"at": minute * 60.0}
    for name in of_it[-1]:
        values = [value for one in of_it if (value := one.get(name)) is not None]
        if name != "at":
            is_mean = name in _MEANS
            ended[name] = (
                None if not values else sum(values) / len(values) if is_mean else max(values)
            )
    return ended


def _minute(point: Point) -> int:
    return int(point["at"] or 0) // 60


def _snapshot(
    at_ms: int, counts: dict[str, dict[str, int]], beats: Sequence[WorkerBeat]
) -> Snapshot:
    return Snapshot(
        at_ms=at_ms,
        counts=counts,
        workers={
            beat.worker: WorkerSnapshot(
                model=beat.model,
                started_ms=beat.started_ms,
                latencies={kind: list(counts) for kind, counts in beat.latencies.items()},
            )
            for beat in beats
        },
    )


def _sample(readings: Mapping[str, _Reading], at_s: float) -> dict[str, Any]:
    """Return the figures of the fleet, and the same of each model."""
    models = {name: _figures([reading], at_s) for name, reading in readings.items()}
    fleet = _figures(list(readings.values()), at_s)
    return {"at": iso(datetime.fromtimestamp(at_s, UTC)), **fleet, "models": models}


def _figures(readings: Sequence[_Reading], at_s: float) -> dict[str, Any]:
    depths = [depth for reading in readings for depth in reading.depths]
    figures: dict[str, Any] = dict(zip(RATES, _rates(readings), strict=True))
    figures["num_queued"] = sum(depth.num_queued for depth in depths)
    figures["num_running"] = sum(depth.num_held for depth in depths)
    figures["oldest_s"] = _oldest_s(depths, at_s)
    for kind in KINDS:
        figures[kind] = p50_p99(total([reading.latencies[kind] for reading in readings]))
    figures["num_workers"] = sum(len(reading.beats) for reading in readings)
    return figures


def _rates(readings: Sequence[_Reading]) -> list[float | None]:
    """Return RATES, summed over the models that can be compared; None if none can."""
    found: list[list[float]] = []
    for reading in readings:
        if reading.recent is None:
            continue
        then, ago_s = reading.recent
        ended = [name for name in reading.now if name.startswith("ended:")]
        fields = (["accepted"], ended, ["ended:failed"], ["tokens"])
        found.append([_grown(reading.now, then, names) / ago_s for names in fields])
    if not found:
        return [None] * len(RATES)
    return [round(sum(values), 3) for values in zip(*found, strict=True)]


def _grown(now: Mapping[str, int], then: Mapping[str, int], names: Sequence[str]) -> int:
    """Return how much the counts grew; one that went back began anew."""
    grown = 0
    for name in names:
        new, old = now.get(name, 0), then.get(name, 0)
        grown += new - old if new >= old else new
    return grown


def _oldest_s(depths: Sequence[LaneDepth], at_s: float) -> float | None:
    oldest_ms = min((d.oldest_ms for d in depths if d.oldest_ms is not None), default=None)
    return None if oldest_ms is None else round(max(0.0, at_s - oldest_ms / 1000), 1)


def _facts(reading: _Reading, at_s: float) -> ModelFacts:
    open_lanes = [d for d in reading.depths if not is_paused(reading.paused, *d.key)]
    then = reading.long_ago
    ended = [name for name in reading.now if name.startswith("ended:")]
    return ModelFacts(
        num_queued=sum(depth.num_queued for depth in open_lanes),
        num_held=sum(depth.num_held for depth in reading.depths),
        oldest_s=_oldest_s(open_lanes, at_s),
        num_serving=sum(beat.state in _SERVING for beat in reading.beats),
        num_workers=len(reading.beats),
        num_ended=0 if then is None else _grown(reading.now, then, ended),
        num_failed=0 if then is None else _grown(reading.now, then, ["ended:failed"]),
    )


def _point(sample: Mapping[str, Any], at_s: float) -> Point:
    """Return the sample's figures of the fleet as one point of the history."""
    point: Point = {"at": round(at_s)}
    for name in (*RATES, *LEVELS, "oldest_s"):
        point[name] = sample[name]
    for kind in KINDS:
        for share in ("p50", "p99"):
            name = f"{kind.removesuffix('_ms')}_{share}_ms"
            point[name] = None if sample[kind] is None else sample[kind][share]
    return point
