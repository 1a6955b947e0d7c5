"""A worker as operators see it, from its last beat, its order and its jobs' rows.

`state` is what the worker says of itself (duty.py of the worker), but:

    dead         no live beat; kept in sight for an hour. Its figures are those of its last beat,
                 its rates are 0, and what it holds is what the rows say is still its own
    suspect      it says starting, ready or draining, and there is a reason to look at it (`why`)
    broken       its engines die before they serve; it says so itself
    quarantined  and drained stay what they are: nothing runs there that could suffer

Called by: gateway/dashboard/workers, and by whoever shows workers live (feed).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from headrace.contract.orders import Order
from headrace.contract.streams import SeenWorker
from headrace.contract.wire import GpuFigures, WorkerBeat, WorkerState

#: ms: a beat older than two is late (workers beat each second, and a beat lives for three).
LATE_MS = 2_000
#: ms during which the death of an engine is a reason to look.
DEATH_MS = 60_000

DEAD, SUSPECT = "dead", "suspect"


def worker_figures(
    seen: Sequence[SeenWorker],
    orders: Mapping[str, Order],
    num_running: Mapping[str, int] | None = None,  # of dead workers, as far as it is known
    now_ms: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the figures of each worker by name; values are plain, so they can be sent as JSON."""
    now_ms = time.time() * 1000 if now_ms is None else now_ms
    return {
        worker.beat.worker: _figures(
            worker, orders.get(worker.beat.worker), num_running or {}, now_ms
        )
        for worker in seen
    }


def _figures(
    worker: SeenWorker, order: Order | None, num_running: Mapping[str, int], now_ms: float
) -> dict[str, Any]:
    beat, is_alive = worker.beat, worker.is_alive
    state, why = _state(worker, now_ms)
    gpus = [_gpu(gpu) for gpu in beat.gpus] if is_alive else []
    held = beat.num_held if is_alive else num_running.get(beat.worker, beat.num_held)
    return {
        "worker": beat.worker,
        "model": beat.model,
        "state": state,
        "why": why,
        "version": beat.version or None,
        "host": beat.host,
        "pid": beat.pid,
        "engine_pid": beat.engine_pid or None,
        "started_at": _iso(datetime.fromtimestamp(beat.started_ms / 1000, UTC)),
        "gpus": gpus,
        "gpu": gpus[0] if gpus else None,
        "total_blocks": beat.total_blocks,
        "free_blocks": beat.free_blocks,
        "cached_blocks": beat.cached_blocks,
        "kv_used": _share(beat.total_blocks - beat.free_blocks - beat.cached_blocks,
                          beat.total_blocks) or 0.0,
        "num_held": held,
        "num_running": beat.num_running if is_alive else 0,
        "num_waiting": beat.num_waiting if is_alive else 0,
        "num_preempted": beat.num_preempted,
        "max_num_seqs": beat.max_num_seqs,
        "batch": beat.batch if is_alive else 0.0,
        "prefix_hit_rate": _share(beat.prefix_hit_tokens_total, beat.prompt_tokens_total),
        "tokens_per_s": beat.tokens_per_s if is_alive else 0.0,
        "step_ms": round(beat.step_us / 1000, 2) if beat.step_us and is_alive else None,
        "step_age_s": round(beat.step_age_ms / 1000, 1),
        "beat_age_s": round(worker.beat_age_ms / 1000, 1),
        "engine_restarts": beat.engine_restarts,
        "order": None if order is None else order_json(order),
    }  # fmt: skip


def unseen_figures(worker: str, order: Order | None = None) -> dict[str, Any]:
    """Return what there is to say of a worker whose last beat is forgotten: no more than its name.

    Also what a page's empty row is made from.
    """
    nothing = dict.fromkeys(
        ("pid", "started_ms", "step", "step_age_ms", "num_running", "num_waiting", "free_blocks",
         "total_blocks"), 0
    )  # fmt: skip
    beat = WorkerBeat(worker=worker, model="", host="", state="", **nothing)
    figures = _figures(SeenWorker(beat, 0, is_alive=False), order, {}, 0.0)
    unknown = dict.fromkeys(("model", "host", "pid", "started_at", "beat_age_s"))
    return figures | unknown | {"why": "it was not seen within the hour"}


def order_json(order: Order) -> dict[str, Any] | None:
    if order.at is None:
        return None
    return {"wanted": order.wanted.value, "by": order.by, "at": _iso(order.at)}


def _state(worker: SeenWorker, now_ms: float) -> tuple[str, str]:
    """Return the state, and in words why it is not simply what the worker says."""
    beat = worker.beat
    if not worker.is_alive:
        return DEAD, "no heartbeat: its jobs move on when their leases run out"
    if beat.state in (WorkerState.DRAINED, WorkerState.QUARANTINED):
        return beat.state, ""
    if beat.state == WorkerState.BROKEN:
        return beat.state, "its engines die of their own first job: look at its log and device"
    reasons = [text for is_so, text in (
        (_is_stalled(beat), "it has work and no step for over half its limit"),
        (worker.beat_age_ms > LATE_MS, "its heartbeat is late"),
        (now_ms - beat.engine_died_ms < DEATH_MS, "its engine died within the last minute"),
    ) if is_so]  # fmt: skip
    return (SUSPECT, "; ".join(reasons)) if reasons else (beat.state, "")


def _is_stalled(beat: WorkerBeat) -> bool:
    is_loading = beat.state == WorkerState.STARTING  # which has a limit of its own
    return not is_loading and beat.step_age_ms * 2 > beat.step_timeout_ms


def _gpu(gpu: GpuFigures) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "utilization": gpu.utilization,
        "memory_used_bytes": gpu.memory_used_bytes,
        "memory_total_bytes": gpu.memory_total_bytes,
        "power_w": gpu.power_w,
        "temperature_c": gpu.temperature_c,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _iso(moment: datetime) -> str:
    """Write a time as the encoder of our answers writes those of rows."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
