"""The queues: model x class x tenant, with what waits, who holds what, and what is paused.

A queue is the lanes (priorities) of one class and tenant of a model. It is shown while it holds
anything; a pause is shown as long as it stands.

Invariants:
1. Reading never needs Postgres: names of tenants and pauses are what it said last.
2. A pause or resume is committed before Redis is told; Redis being away delays it until the next
   sweep, and the answer says so by nothing but the log.
3. A purge cancels what never ran, and nothing else; it wants the model's name typed.

Called by: live_routes.py, feed.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import RowMapping

from headrace.contract import log
from headrace.contract.errors import (
    DatabaseUnavailable,
    NotConfirmed,
    NotFound,
    NotPaused,
    QueueUnavailable,
)
from headrace.contract.pauses import ALL
from headrace.contract.purge import Purge
from headrace.contract.streams import LaneDepth
from headrace.gateway.cancel import tell_ended
from headrace.gateway.dashboard.alarms import iso
from headrace.gateway.services import Services

#: Seconds names and pauses are believed without asking Postgres.
CACHE_S = 2.0
#: Workers that are named beside a queue.
MAX_HOLDERS = 3
#: Jobs a purge ends in one transaction, and at most in one call.
PURGE_PAGE, MAX_PURGED = 500, 100_000

Row = dict[str, Any]


class Queues:
    """The operations on queues."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._purge = Purge(services.engine)
        self._lock = threading.Lock()
        self._read_at = float("-inf")  # monotonic s
        self._models: list[str] = []
        self._tenants: dict[str, str] = {}
        self._pauses: Sequence[RowMapping] = ()

    def list(self) -> dict[str, list[Row]]:
        """Return every queue that holds anything, and every pause."""
        self._ask_postgres(is_due=True)
        return self._list()

    def figures(self, *, limit: int) -> dict[str, Row]:
        """Return the fullest queues as the page and the feed show them, by a key of their own."""
        self._ask_postgres()
        rows = self._list()["queues"]
        rows.sort(key=lambda row: row["num_queued"] + row["num_held"], reverse=True)
        return {key_of(row): _shown(row) for row in rows[:limit]}

    def pause(
        self, *, model: str | None, job_class: str | None, tenant: str | None, by: str
    ) -> dict[str, list[Row]]:
        """Give nothing new of these queues to any worker until they are resumed."""
        name, tenant_id = self._checked(model, tenant)
        self._services.pauses.pause(
            model=name, job_class=job_class or ALL, tenant_id=tenant_id, by=by
        )
        self._tell_redis()
        return self.list()

    def resume(
        self, *, model: str | None, job_class: str | None, tenant: str | None
    ) -> dict[str, list[Row]]:
        """Lift all pauses within these queues."""
        name, tenant_id = self._checked(model, tenant)
        num_lifted = self._services.pauses.resume(
            model=name, job_class=job_class or ALL, tenant_id=tenant_id
        )
        if not num_lifted:
            raise NotPaused(
                f"resume of {_named(model, job_class, tenant)} was asked; there is no pause of it "
                "or within it: resume the wider pause that holds it (GET /v1/admin/queues)"
            )
        self._tell_redis()
        return self.list()

    def purge(
        self, *, model: str, job_class: str | None, tenant: str | None, confirm: str
    ) -> dict[str, Any]:
        """Cancel what waits in these queues and never ran; at most MAX_PURGED a call."""
        if confirm != model:
            raise NotConfirmed(
                f"confirm: the model's name, {model!r}, must be typed to purge its queue; "
                f"found {confirm[:60]!r}"
            )
        name, tenant_id = self._checked(model, tenant)
        num_canceled, after = 0, ""
        while num_canceled < MAX_PURGED:
            rows = self._purge.cancel_page(
                model=name,
                job_class=job_class,
                tenant_id=None if tenant_id == ALL else tenant_id,
                after=after,
                limit=PURGE_PAGE,
            )
            if not rows:
                break
            after = rows[-1]["id"]
            num_canceled += len(rows)
            self._end(name, rows)
        log.event("queue.purged", level=logging.WARNING, model=name, jobs=num_canceled)
        return {"num_canceled": num_canceled, "has_more": num_canceled >= MAX_PURGED}

    # -- parts -------------------------------------------------------------------------------

    def _list(self) -> dict[str, list[Row]]:
        depths = {model: self._services.streams.depths(model) for model in self._models}
        held = {depth.key[1] for found in depths.values() for depth in found}
        if held - self._tenants.keys():  # tenants that are newer than what is believed
            self._ask_postgres(is_due=True)
        return {
            "queues": [row for model, found in depths.items() for row in self._of(model, found)],
            "pauses": [self._pause_json(pause) for pause in self._pauses],
        }

    def _of(self, model: str, found: Sequence[LaneDepth]) -> list[Row]:
        lanes: dict[tuple[str, str], list[LaneDepth]] = defaultdict(list)
        for depth in found:
            lanes[depth.key].append(depth)
        takeovers = self._services.live.takeovers(model) if lanes else {}
        now_s = time.time()
        return [
            self._row(model, *key, depths, takeovers, now_s)
            for key, depths in sorted(lanes.items())
        ]

    def _row(
        self,
        model: str,
        job_class: str,
        tenant_id: str,
        depths: Sequence[LaneDepth],
        takeovers: dict[str, int],
        now_s: float,
    ) -> Row:
        oldest_ms = min((d.oldest_ms for d in depths if d.oldest_ms is not None), default=None)
        claimed: dict[str, int] = defaultdict(int)
        for worker, num in (pair for depth in depths for pair in depth.claimed_by):
            claimed[worker] += num
        pause = self._pause_of(model, job_class, tenant_id)
        return {
            "model": model,
            "job_class": job_class,
            "tenant_id": tenant_id,
            "tenant": self._tenants.get(tenant_id, tenant_id),
            "num_queued": sum(depth.num_queued for depth in depths),
            "num_held": sum(depth.num_held for depth in depths),
            "oldest_s": None if oldest_ms is None else round(max(0.0, now_s - oldest_ms / 1000), 1),
            "claimed_by": [{"worker": w, "num_jobs": n} for w, n in sorted(claimed.items())],
            "lag": sum(depth.lag for depth in depths),
            "num_takeovers": sum(takeovers.get(depth.lane, 0) for depth in depths),
            "is_paused": pause is not None,
            "paused_by": None if pause is None else pause["paused_by"],
            "paused_at": None if pause is None else _iso(pause["paused_at"]),
        }

    def _pause_of(self, model: str, job_class: str, tenant_id: str) -> RowMapping | None:
        for pause in self._pauses:
            named = (pause["model"], pause["job_class"], pause["tenant_id"])
            if all(
                name in (ALL, one)
                for name, one in zip(named, (model, job_class, tenant_id), strict=True)
            ):
                return pause
        return None

    def _pause_json(self, pause: RowMapping) -> Row:
        tenant_id = pause["tenant_id"]
        return {
            "model": _or_none(pause["model"]),
            "job_class": _or_none(pause["job_class"]),
            "tenant_id": _or_none(tenant_id),
            "tenant": None if tenant_id == ALL else self._tenants.get(tenant_id, tenant_id),
            "paused_by": pause["paused_by"],
            "paused_at": _iso(pause["paused_at"]),
        }

    def _checked(self, model: str | None, tenant: str | None) -> tuple[str, str]:
        """Return model and tenant id, `*` for all; raise for what this fleet does not know."""
        if model is not None:
            self._services.cards.card(model)
        if tenant is None:
            return model or ALL, ALL
        names = self._services.accounts.tenant_names()
        if tenant in names:
            return model or ALL, tenant
        for tenant_id, name in names.items():
            if name == tenant:
                return model or ALL, tenant_id
        raise NotFound(f"there is no tenant {tenant[:60]!r}: send its name or id, or null for all")

    def _ask_postgres(self, *, is_due: bool = False) -> None:
        with self._lock:
            if not is_due and time.monotonic() - self._read_at < CACHE_S:
                return
            try:
                self._pauses = self._services.pauses.list()
                self._tenants = self._services.accounts.tenant_names()
                self._models = [card.name for card in self._services.cards.all()]
            except DatabaseUnavailable:
                return
            self._read_at = time.monotonic()

    def _tell_redis(self) -> None:
        with self._lock:
            self._read_at = float("-inf")
        try:
            self._services.pauses.restore()
        except QueueUnavailable as error:
            log.event("pause.left_to_sweeper", level=logging.WARNING, why=error.detail)

    def _end(self, model: str, rows: Sequence[RowMapping]) -> None:
        services = self._services
        try:
            tell_ended(services, model, rows)
            services.ledger.outbox_done([row["id"] for row in rows])
        except QueueUnavailable as error:
            log.event("purge.left_to_sweeper", level=logging.WARNING, why=error.detail)


def key_of(row: Row) -> str:
    """Return the name of a queue in the feed; a model's name may hold a bar, the rest cannot."""
    return f"{row['model']}|{row['job_class']}|{row['tenant_id']}"


def _named(model: str | None, job_class: str | None, tenant: str | None) -> str:
    parts = (model or "all models", job_class or "all classes", tenant or "all tenants")
    return ", ".join(part[:60] for part in parts)


def _or_none(name: str) -> str | None:
    return None if name == ALL else name


def _shown(row: Row) -> Row:
    """Return a row with texts for people; its age in whole seconds, so that it changes seldom."""
    oldest_s = row["oldest_s"]
    holders = [f"{one['worker']} ({one['num_jobs']})" for one in row["claimed_by"][:MAX_HOLDERS]]
    if len(row["claimed_by"]) > MAX_HOLDERS:
        holders.append(f"{len(row['claimed_by']) - MAX_HOLDERS} more")
    return row | {
        "oldest_s": None if oldest_s is None else float(int(oldest_s)),
        "holders": ", ".join(holders),
        "state": "paused" if row["is_paused"] else "active",
    }


def blank_row() -> Row:
    """Return the row from which pages make those of queues that come later (live.js fills it)."""
    numbers = dict.fromkeys(("num_queued", "num_held", "lag", "num_takeovers"), 0)
    texts = {name: f"{{={name}}}" for name in ("model", "job_class", "tenant_id", "tenant")}
    return {
        **numbers,
        **texts,
        "holders": "",
        "state": "active",
        "oldest_s": None,
        "is_paused": False,
        "paused_by": None,
    }


def _iso(at: datetime) -> str:
    return iso(at)
