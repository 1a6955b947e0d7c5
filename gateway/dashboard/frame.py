"""The frame of every page: templates, navigation, security headers, and how figures are written.

A page is `return render("workers.html", workers=...)`; its template extends layout.html (blocks
`title`, `content`, `scripts`) and finds in its context: `actor` (None before the login),
`may(role)`, `csrf_token`, `nav`, `path`, and the functions `asset(name)`, `script(name)` and
`csrf_field()`. Views leave `g.actor` and `g.csrf_token`, which the guard set.

Invariants:
1. A page runs only our own files: the Content-Security-Policy forbids inline scripts and styles,
   other hosts, frames and plugins. No template marks data as safe; everything is escaped.
2. Pages are never cached: what they show belongs to who is logged in.
3. Figures read the same whether written here or by static/live.js: one rule each, below and there.

To add a page: a row in NAV, a template, an Operation with `is_page`.

Called by: the page views in gateway/dashboard.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from flask import Response, g, request
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from headrace.contract.roles import Role
from headrace.gateway.dashboard.actor import Actor
from headrace.gateway.dashboard.assets import URL_PREFIX, asset_url, send_asset
from headrace.gateway.openapi import Operation

#: What the navigation shows, in this order, to those with the role at least.
NAV: Sequence[tuple[str, str, Role]] = (
    ("/dashboard", "Overview", Role.VIEWER),
    ("/dashboard/workers", "Workers", Role.VIEWER),
    ("/dashboard/queues", "Queues", Role.VIEWER),
    ("/dashboard/jobs", "Jobs", Role.VIEWER),
    ("/dashboard/dead-letters", "Dead letters", Role.VIEWER),
    ("/dashboard/playground", "Playground", Role.OPERATOR),
    ("/dashboard/keys", "Keys", Role.ADMIN),
    ("/dashboard/operators", "Operators", Role.ADMIN),
    ("/dashboard/audit", "Audit log", Role.ADMIN),
)

TEMPLATES = Path(__file__).parent / "templates"

_POLICY = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; font-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def render(template: str | Template, *, status: int = 200, **context: Any) -> Response:
    """Return the page made from a template, with the headers every page has."""
    actor: Actor | None = g.get("actor")
    nonce = secrets.token_urlsafe(16)
    text = environment().get_template(template).render(
        actor=actor,
        may=_may(actor),
        csrf_token=g.get("csrf_token") or "",
        nav=_nav(actor, request.path),
        path=request.path,
        nonce=nonce,
        **context,
    )  # fmt: skip
    response = Response(text, status, content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = _POLICY.format(nonce=nonce)
    response.headers["Referrer-Policy"] = "same-origin"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
    response.headers["Cache-Control"] = "no-store"
    return response


def render_problem(*, status: int, code: str, detail: str) -> Response:
    """Return the page that says what went wrong and what to do."""
    return render("problem.html", status=status, problem={"code": code, "detail": detail} | {
        "status": status, "title": code.replace("_", " ").capitalize()
    })  # fmt: skip


def asset_operations() -> list[Operation]:
    """Return the route of the dashboard's files; open, as the login page needs them."""
    return [
        Operation(
            "GET", f"{URL_PREFIX}/<version>/<name>", "dashboard_asset", send_asset,
            "A script, style or picture of the dashboard.", {200: "text/css"},
            is_open=True, is_page=True,
        )
    ]  # fmt: skip


def _may(actor: Actor | None) -> Callable[[str], bool]:
    """Return the test that templates use to leave out what would be refused."""
    return lambda role: actor is not None and actor.role.includes(Role(role))


def _nav(actor: Actor | None, path: str) -> list[tuple[str, str, bool]]:
    """Return (path, label, is this page) of the entries the actor may open."""
    return [
        (entry, label, path == entry or (entry != "/dashboard" and path.startswith(entry + "/")))
        for entry, label, role in NAV
        if actor is not None and actor.role.includes(role)
    ]


@cache
def environment() -> Environment:
    """Return the templates' environment; made once a process."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"asset": asset_url, "script": _script, "csrf_field": _csrf_field}
    made.filters |= {
        "ago": ago,
        "iso": iso,
        "bytes": bytes_text,
        "duration": duration,
        "ms": milliseconds,
        "rate": rate,
        "count": count,
        "percent": percent,
    }
    return made


@pass_context
def _script(context: Context, name: str) -> Markup:
    """Write the tag of one of our scripts; it runs when the document is parsed."""
    return Markup('<script src="{}" nonce="{}" defer></script>').format(
        asset_url(name), context["nonce"]
    )


@pass_context
def _csrf_field(context: Context) -> Markup:
    """Write the hidden field of a plain form; scripts send the header instead."""
    return Markup('<input type="hidden" name="csrf_token" value="{}">').format(
        context["csrf_token"]
    )


# -- figures: the same rules as `formats` in static/live.js ----------------------------------

#: What stands where there is nothing to show.
NOTHING = "–"


def rate(value: float | None) -> str:
    """Write something per second: one decimal below 100."""
    if value is None:
        return NOTHING
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"


def count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """Write a share of one."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float | None) -> str:
    """Write a duration given in ms: in ms below a second, else in seconds and more."""
    if value is None:
        return NOTHING
    if value < 1000:
        return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"
    return duration(value / 1000)


def duration(value_s: float | None) -> str:
    """Write a duration given in seconds with its two largest units."""
    if value_s is None:
        return NOTHING
    if value_s < 1:
        return f"{1000 * value_s:.0f} ms"
    if value_s < 60:
        return f"{value_s:.1f} s"
    whole = int(value_s)
    for size, name, small, small_name in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name} {rest} {small_name}"
    raise AssertionError("60 s and more fit one of the units")


def bytes_text(value: float | None) -> str:
    """Write bytes with a binary unit."""
    if value is None:
        return NOTHING
    size, units = float(value), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def iso(value: str | datetime | None) -> str:
    """Write a time as our JSON does; empty where there is none."""
    return value.isoformat() if isinstance(value, datetime) else value or ""


def ago(value: str | datetime | None) -> str:
    """Write how long ago a time is; pages count on from there (static/live.js)."""
    if value is None or value == "":
        return NOTHING
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    age_s = int((datetime.now(UTC) - moment).total_seconds())
    if age_s == 0:
        return "now"
    written = f"{abs(age_s)} s" if abs(age_s) < 60 else duration(abs(age_s))
    return f"in {written}" if age_s < 0 else f"{written} ago"
