"""Dead letters, for operators: groups by signature, search, and replay of one or of many at a rate.

A replay of one letter makes its new job at once. A replay of many is a row that the tasks process
works off (contract/replays), so that a poison that still kills meets the fleet at a pace somebody
chose, and can be stopped.

Invariants:
1. A new job made here is made as a retry's: for the tenant and key of the job it is made from.
2. A replay of many is counted first, and begun only with that count, give or take 1 %; it takes
   letters that nobody replayed, so beginning it twice makes nothing twice.
3. What is unlimited is asked for in so many words: an empty filter needs `all`.

Called by: gateway/dashboard/admin_routes (operations), dead_letter_pages (the methods of the area).
"""

from __future__ import annotations

import re
from typing import Any

from flask import Response, g, request
from sqlalchemy import RowMapping

from headrace.contract import log
from headrace.contract.dead_letters import DeadLetters, no_letter
from headrace.contract.errors import InvalidCursor, MissingField, NotFound, OutOfRange
from headrace.contract.ids import is_job_id
from headrace.contract.replays import Replays
from headrace.contract.roles import Role
from headrace.gateway.dashboard.dead_letter_schemas import (
    DeadLetter,
    DeadLetterGroups,
    DeadLetterList,
    GroupsQuery,
    LetterReplayRequest,
    LettersQuery,
    Replay,
    ReplayList,
    ReplayRequest,
    ReplaysQuery,
    ReplayStarted,
)
from headrace.gateway.dashboard.job_bulk import check_expected
from headrace.gateway.dashboard.job_schemas import AdminJob
from headrace.gateway.dashboard.jobs import Jobs, find_any_job
from headrace.gateway.dashboard.reading import json_body
from headrace.gateway.jobs import decode_cursor, encode_cursor, json_response
from headrace.gateway.openapi import Operation
from headrace.gateway.refusals import validate_query
from headrace.gateway.services import Services

_REPLAY_ID = re.compile(r"rpl_[0-9a-f]{32}")
_SHOWN = tuple(DeadLetter.model_fields)


class LetterArea:
    """What may be asked and done, as plain methods."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._jobs = Jobs(services)
        self._letters = DeadLetters(services.engine)
        self._replays = Replays(services.engine)

    def groups(self, query: GroupsQuery) -> dict[str, Any]:
        found = self._letters.groups(query.filter(), limit=query.limit)
        names = ("signature", "num_letters", "num_unreplayed", "first_at", "last_at", "models",
                 "tenants", "detail")  # fmt: skip
        groups = [{name: row[name] for name in names} for row in found.rows]
        return {"groups": groups, "num_groups": found.num_groups}

    def page(self, query: LettersQuery) -> dict[str, Any]:
        before = None if query.cursor is None else decode_cursor(query.cursor)
        page = self._letters.page(query.filter(), limit=query.limit, before=before)
        cursor = None if page.next_before is None else encode_cursor(page.next_before)
        return {"dead_letters": [_letter_json(row) for row in page.rows], "next_cursor": cursor}

    def letter(self, job_id: str) -> dict[str, Any]:
        row = self._letters.letter(job_id) if is_job_id(job_id) else None
        if row is None:
            raise no_letter(job_id)
        return _letter_json(row)

    def replay_one(self, job_id: str, *, again: bool) -> dict[str, Any]:
        """Make a new job of a letter's now; return it."""
        if not is_job_id(job_id):
            raise no_letter(job_id)
        made = self._letters.replay(job_id, again=again)
        g.audit_details = {"made": made, "again": again}
        return self._jobs.hand_over(find_any_job(self._services, made))

    def start(self, asked: ReplayRequest, *, by: str) -> dict[str, Any]:
        """Count what a replay would take, or begin it."""
        wanted = asked.filter.filter()
        if asked.filter.replayed:
            raise OutOfRange(
                "filter.replayed: many are replayed once each; found true: leave it out, or "
                "replay a letter again by itself (POST /v1/admin/dead-letters/<job_id>/replay)"
            )
        if wanted.is_empty and not asked.all:
            raise MissingField(
                "filter is empty, so it matches every letter: name a field of it, or send `all`"
            )
        num_matched = self._letters.num_replayable(wanted)
        if asked.dry_run:
            return {"num_matched": num_matched, "replay": None}
        if asked.rate_per_min is None:
            raise MissingField("rate_per_min is required; it was not sent: jobs a minute, 1 - 6000")
        check_expected(asked.expect, num_matched)
        if not num_matched:
            raise NotFound(
                "a replay was asked; no letter that was not replayed matches: look at the list"
            )
        row = self._replays.start(
            wanted, rate_per_min=asked.rate_per_min, by=by, num_matched=num_matched
        )
        log.event("replay.started", replay=row["id"], rate_per_min=asked.rate_per_min, by=by)
        return {"num_matched": num_matched, "replay": _replay_json(row)}

    def replay(self, replay_id: str) -> dict[str, Any]:
        return _replay_json(self._replays.replay(replay_id))

    def replays(self, query: ReplaysQuery) -> dict[str, Any]:
        before = query.cursor
        if before is not None and not _REPLAY_ID.fullmatch(before):
            raise InvalidCursor(
                f"cursor {before[:60]!r} is not one of ours: send the `next_cursor` of a page"
            )
        rows = self._replays.newest(limit=query.limit + 1, before=before)
        shown = [_replay_json(row) for row in rows[: query.limit]]
        return {
            "replays": shown,
            "next_cursor": shown[-1]["id"] if len(rows) > query.limit else None,
        }

    def stop(self, replay_id: str, *, by: str) -> dict[str, Any]:
        row = self._replays.stop(replay_id, by=by)
        log.event("replay.stopped", replay=replay_id, by=by)
        return _replay_json(row)


def _letter_json(row: RowMapping) -> dict[str, Any]:
    return {name: row[name] for name in _SHOWN}


def _replay_json(row: RowMapping) -> dict[str, Any]:
    num_left = max(0, row["num_matched"] - row["num_done"] - row["num_refused"])
    is_running = row["ended_at"] is None
    state = "running" if is_running else "done" if row["canceled_by"] is None else "stopped"
    same = ("id", "filter", "rate_per_min", "by", "created_at", "num_matched", "num_done",
            "num_refused", "ended_at")  # fmt: skip
    return {name: row[name] for name in same} | {
        "state": state,
        "left_s": round(60 * num_left / row["rate_per_min"], 1) if is_running else None,
        "stopped_by": row["canceled_by"],
    }


class LetterViews:
    """The JSON views."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._area = LetterArea(services)

    def groups(self) -> Response:
        return json_response(self._area.groups(validate_query(GroupsQuery, request.args)))

    def page(self) -> Response:
        return json_response(self._area.page(validate_query(LettersQuery, request.args)))

    def letter(self, job_id: str) -> Response:
        return json_response(self._area.letter(job_id))

    def replay_one(self, job_id: str) -> Response:
        asked = json_body(LetterReplayRequest, self._settings)
        return json_response(self._area.replay_one(job_id, again=asked.again), status=202)

    def start(self) -> Response:
        asked = json_body(ReplayRequest, self._settings)
        g.audit_target = asked.filter.signature or ""
        wanted = asked.filter.model_dump(mode="json", exclude_none=True)
        if (job_ids := wanted.pop("job_ids", None)) is not None:
            wanted["num_selected"] = len(job_ids)  # the replay's row names them
        g.audit_details = {
            "filter": wanted,
            "rate_per_min": asked.rate_per_min,
            "dry_run": asked.dry_run,
        }
        found = self._area.start(asked, by=g.actor.name)
        g.audit_details["num_matched"] = found["num_matched"]
        if found["replay"] is not None:
            g.audit_target = found["replay"]["id"]
        return json_response(found, status=200 if asked.dry_run else 202)

    def replays(self) -> Response:
        return json_response(self._area.replays(validate_query(ReplaysQuery, request.args)))

    def replay(self, replay_id: str) -> Response:
        return json_response(self._area.replay(replay_id))

    def stop(self, replay_id: str) -> Response:
        stopped = self._area.stop(replay_id, by=g.actor.name)
        g.audit_details = {"num_done": stopped["num_done"], "of": stopped["num_matched"]}
        return json_response(stopped)


def operations(services: Services) -> list[Operation]:
    views = LetterViews(services)
    letters, replays = "/v1/admin/dead-letters", "/v1/admin/replays"
    return [
        Operation(
            "GET", letters, "admin_dead_letters", views.page,
            "List the jobs that ended as poison, newest first.", {200: DeadLetterList},
            query=LettersQuery, problems=(400,), role=Role.VIEWER,
        ),
        Operation(
            "GET", f"{letters}/groups", "admin_dead_letter_groups", views.groups,
            "Count the dead letters by what they died of.", {200: DeadLetterGroups},
            query=GroupsQuery, problems=(400,), role=Role.VIEWER,
        ),
        Operation(
            "GET", f"{letters}/<job_id>", "admin_dead_letter", views.letter,
            "Show a job's dead letter.", {200: DeadLetter}, problems=(404,), role=Role.VIEWER,
        ),
        Operation(
            "POST", f"{letters}/<job_id>/replay", "admin_replay_dead_letter", views.replay_one,
            "Make a new job of a dead letter now; once, unless asked `again`.", {202: AdminJob},
            body=LetterReplayRequest, problems=(400, 404, 409, 413, 415), role=Role.OPERATOR,
            action="dead_letter.replay",
        ),
        Operation(
            "GET", replays, "admin_replays", views.replays, "List the replays, newest first.",
            {200: ReplayList}, query=ReplaysQuery, problems=(400,), role=Role.VIEWER,
        ),
        Operation(
            "POST", replays, "admin_start_replay", views.start,
            "Count the dead letters that a filter matches, or replay them at a rate.",
            {200: ReplayStarted, 202: ReplayStarted}, body=ReplayRequest,
            problems=(400, 404, 409, 413, 415), role=Role.OPERATOR, action="replay.start",
        ),
        Operation(
            "GET", f"{replays}/<replay_id>", "admin_replay", views.replay,
            "Show how far a replay is.", {200: Replay}, problems=(404,), role=Role.VIEWER,
        ),
        Operation(
            "POST", f"{replays}/<replay_id>/stop", "admin_stop_replay", views.stop,
            "End a replay where it is; the jobs it has made stay.", {200: Replay},
            problems=(404, 409), role=Role.OPERATOR, action="replay.stop",
        ),
    ]  # fmt: skip
