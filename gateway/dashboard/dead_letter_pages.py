"""The pages of dead letters: by signature with the replays, the search, and one letter.

Each page shows what the JSON view of the same name answers; what they do, static/page.js and
static/dead_letters.js send to the JSON views. A search that is refused is shown with the form.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar
from urllib.parse import urlencode

from flask import Response, request

from headrace.contract.errors import HeadraceError
from headrace.contract.replays import MAX_RATE, MIN_RATE
from headrace.contract.roles import Role
from headrace.gateway.dashboard.dead_letter_schemas import (
    GroupsQuery,
    LetterCriteria,
    LettersQuery,
    ReplaysQuery,
)
from headrace.gateway.dashboard.dead_letters import LetterArea
from headrace.gateway.dashboard.frame import render
from headrace.gateway.openapi import Operation
from headrace.gateway.refusals import validate_query
from headrace.gateway.services import Services

PATH = "/dashboard/dead-letters"
#: Jobs a minute that the pages suggest.
SUGGESTED_RATE = 60

_FIELDS = tuple(LetterCriteria.model_fields)
Query = TypeVar("Query", bound=LetterCriteria)


class LetterPages:
    """The views of the pages."""

    def __init__(self, services: Services) -> None:
        self._area = LetterArea(services)

    def groups(self) -> Response:
        query, shown = _read(GroupsQuery)
        found: dict[str, Any] = {"groups": [], "num_groups": 0}
        if query is not None:
            found = self._area.groups(query)
        return render(
            "dead_letters.html",
            found=found,
            replays=self._area.replays(ReplaysQuery())["replays"],
            letters_url=_letters_url,
            **shown,
        )

    def search(self) -> Response:
        query, shown = _read(LettersQuery)
        page: dict[str, Any] = {"dead_letters": [], "next_cursor": None}
        if query is not None:
            try:
                page = self._area.page(query)
            except HeadraceError as error:  # its cursor
                shown |= _refused(error)
        return render(
            "dead_letter_list.html", page=page, next_url=_next_url(page["next_cursor"]), **shown
        )

    def show(self, job_id: str) -> Response:
        letter = self._area.letter(job_id)
        url = _letters_url({"signature": letter["signature"]})
        return render("dead_letter.html", letter=letter, same_url=url)


def _read(model: type[Query]) -> tuple[Query | None, dict[str, Any]]:
    """Return the query, None if it is refused, and what pages with its form show of it."""
    shown: dict[str, Any] = {
        "status": 200,
        "problem": None,
        "asked": {name: request.args.get(name, "") for name in _FIELDS},
        "criteria": "{}",
        "is_all": True,
        "rates": (MIN_RATE, SUGGESTED_RATE, MAX_RATE),
    }
    try:
        query = validate_query(model, request.args)
    except HeadraceError as error:
        return None, shown | _refused(error)
    criteria = query.model_dump(mode="json", include=set(_FIELDS), exclude_none=True)
    criteria.pop("replayed", None)  # many are replayed once each, whatever the page shows
    return query, shown | {"criteria": json.dumps(criteria), "is_all": not criteria}


def _refused(error: HeadraceError) -> dict[str, Any]:
    return {
        "status": error.http_status,
        "problem": {"code": error.code, "detail": error.detail},
    }


def _letters_url(wanted: dict[str, str]) -> str:
    """Return the address of the search by these fields and what this page was asked for."""
    given = {name: value for name in _FIELDS if (value := request.args.get(name))}
    return f"{PATH}/letters?{urlencode(given | wanted)}"


def _next_url(cursor: str | None) -> str | None:
    return None if cursor is None else _letters_url({"cursor": cursor})


def page_operations(services: Services) -> list[Operation]:
    pages = LetterPages(services)
    return [
        Operation(
            "GET", PATH, "dead_letters_page", pages.groups, "Dead letters by signature.",
            {200: "text/html"}, role=Role.VIEWER, is_page=True,
        ),
        Operation(
            "GET", f"{PATH}/letters", "dead_letter_list_page", pages.search,
            "Search dead letters.", {200: "text/html"}, role=Role.VIEWER, is_page=True,
        ),
        Operation(
            "GET", f"{PATH}/<job_id>", "dead_letter_page", pages.show, "One dead letter.",
            {200: "text/html"}, role=Role.VIEWER, is_page=True,
        ),
    ]  # fmt: skip
