"""Who may act on the fleet: an operator's session or a key with a role; and the record of it.

Before a view of an operation with a role: whose request is it (401), did the operator's own page
send it (403), does the role allow it (403), and, for an action, the audit row. After it: how the
action ended. A view finds `g.actor`, may set `g.audit_target` (else: what the path names) and
`g.audit_details`; pages find `g.csrf_token`.

Invariants:
1. An action has its audit row before its view runs; where none can be written, it is not done.
2. How it ended is written whatever happened: `done`, or the code of the refusal; if Postgres went
   away meanwhile, the row stays `begun` and the log line `action.audited` has the outcome.
3. A request with a session's cookie that could change something is refused unless the browser says
   that a page of this origin sent it, and it carries the session's own token. That token is a hash
   of the session's, so it is stored nowhere and tells nothing of it.
4. Sessions found good are remembered for CACHE_S: one that was ended elsewhere works no longer.
5. Rows about requests of nobody are at most NOBODY_PER_MIN a minute and process: whoever has no key
   cannot fill the table. The log lines of the rest are written.

Called by: gateway/app (before and after each request), gateway/dashboard/login.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import time
from typing import Any
from urllib.parse import quote

from flask import Request, Response, abort, g, redirect, request

from headrace.contract import log
from headrace.contract.audit import DONE, Audit, Entry, plain_text
from headrace.contract.errors import (
    CsrfRefused,
    DatabaseUnavailable,
    Forbidden,
    HeadraceError,
    Unauthenticated,
)
from headrace.contract.operators import Operators, Session
from headrace.gateway.auth import KeyGuard
from headrace.gateway.dashboard.actor import Actor
from headrace.gateway.dashboard.reading import form_fields
from headrace.gateway.openapi import SESSION_COOKIE, Operation

#: Seconds a good session is believed without asking Postgres.
CACHE_S = 5.0
#: Sessions remembered at most; beyond it the memory starts anew.
MAX_CACHED = 1_000
NOBODY_PER_MIN = 60

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOGIN_PATH = "/dashboard/login"


class SessionGuard:
    """Finds sessions by their cookie, with a short memory."""

    def __init__(self, operators: Operators) -> None:
        self._operators = operators
        self._known: dict[bytes, tuple[Session, float]] = {}  # token's SHA-256 -> until when

    def session(self, token: str) -> Session | None:
        digest = _digest(token)
        known = self._known.get(digest)
        now = time.monotonic()
        if known is not None and known[1] > now:
            return known[0]
        session = self._operators.session(token)
        if session is None:
            self._known.pop(digest, None)
            return None
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[digest] = (session, now + CACHE_S)
        return session

    def end(self, token: str) -> None:
        """Log out, here at once."""
        self._operators.logout(token)
        self._known.pop(_digest(token), None)

    def forget(self) -> None:
        """Ask Postgres again for each session: an operator was changed."""
        self._known.clear()


class OperatorGuard:
    """Admits requests to operations that need a role, and keeps the audit log of actions."""

    def __init__(self, keys: KeyGuard, sessions: SessionGuard, audit: Audit) -> None:
        self._keys = keys
        self._sessions = sessions
        self._trail = AuditTrail(audit)

    def admit(self, op: Operation) -> None:
        """Set `g.actor`, or raise what refuses the request."""
        is_action = op.action is not None and request.method == op.method
        try:
            actor, token = self._actor()
            if token is not None:
                if request.method not in SAFE_METHODS:
                    check_origin(request)
                    _check_csrf_token(csrf_token(token))
                g.csrf_token = csrf_token(token)  # pages put it in, but no page of a refused one
            _check_role(actor, op)
        except HeadraceError as error:
            if is_action:
                self._trail.refused(op, error.code)
            if isinstance(error, Unauthenticated) and op.is_page:
                _send_to_login()
            raise
        if is_action:
            self._trail.begin(op, actor)

    def finish(self, response: Response) -> Response:
        """Complete the audit row of an action, whatever its answer is."""
        self._trail.end(response)
        return response

    def _actor(self) -> tuple[Actor, str | None]:
        """Return who asks, and the session's token if it is one."""
        address = request.remote_addr or ""
        if (header := request.headers.get("Authorization")) is not None:
            principal = self._keys.principal(header)
            if principal.role is None:
                g.audit_actor = principal.key_id
                raise Forbidden(
                    "this path is for operators; the key has no role: make one with"
                    " `headrace keys create --role`"
                )
            g.actor = Actor(principal.key_id, "key", principal.role, address)
            return g.actor, None
        token = request.cookies.get(SESSION_COOKIE)
        session = None if token is None else self._sessions.session(token)
        if session is None:
            raise Unauthenticated(
                "an operator's session or a key with a role is required; none was sent that is"
                f" valid now: log in at {LOGIN_PATH}, or send `Authorization: Bearer hr_...`"
            )
        g.actor = Actor(session.operator, "operator", session.role, address)
        return g.actor, token


class AuditTrail:
    """Writes what `Audit` keeps, from the request under way."""

    def __init__(self, audit: Audit) -> None:
        self._audit = audit
        self._nobody_since = 0.0  # monotonic s
        self._num_nobody = 0

    def begin(self, op: Operation, actor: Actor) -> None:
        g.audit_row = self._audit.begin(_entry(op.action or "", actor))

    def end(self, response: Response) -> None:
        row = g.pop("audit_row", None)
        if row is None:
            return
        outcome = DONE if response.status_code < 400 else g.get("problem_code", "internal")
        entry = _entry(g.operation.action, g.actor)
        _tell(entry, outcome)
        try:
            self._audit.end(row, outcome, entry.target, entry.details)
        except DatabaseUnavailable as error:
            log.event("audit.left_begun", level=logging.ERROR, row=row, why=error.detail)

    def refused(self, op: Operation, code: str) -> None:
        """Write that the guard let an action not happen."""
        self.write(_entry(op.action or "", g.get("actor")), code)

    def write(self, entry: Entry, outcome: str) -> None:
        """Write a row of what has ended already; losing it is logged, and changes nothing else."""
        _tell(entry, outcome)
        if entry.actor_kind == "nobody" and not self._has_room_for_nobody():
            return
        try:
            self._audit.write(entry, outcome)
        except DatabaseUnavailable as error:
            log.event("audit.lost", level=logging.ERROR, action=entry.action, why=error.detail)

    def _has_room_for_nobody(self) -> bool:
        now = time.monotonic()
        if now - self._nobody_since > 60:
            self._nobody_since, self._num_nobody = now, 0
        self._num_nobody += 1
        return self._num_nobody <= NOBODY_PER_MIN


def csrf_token(session_token: str) -> str:
    """Return what the session's own pages send back with each request that changes something."""
    return base64.urlsafe_b64encode(_digest("csrf:" + session_token)).decode().rstrip("=")


def check_origin(asked: Request) -> None:
    """Refuse what another origin's page made the browser send."""
    site, origin = asked.headers.get("Sec-Fetch-Site"), asked.headers.get("Origin")
    if site is not None:  # sent by browsers over https and to localhost, and not by scripts
        is_ours, found = site == "same-origin", f"Sec-Fetch-Site {site[:40]!r}"
    else:
        is_ours = origin in (f"https://{asked.host}", f"http://{asked.host}")
        found = "no Origin" if origin is None else f"Origin {origin[:80]!r}"
    if not is_ours:
        raise CsrfRefused(
            f"the dashboard's own pages may send this; it came with {found}: reload the page, or"
            " use a key with a role"
        )


def _check_csrf_token(wanted: str) -> None:
    sent = request.headers.get("X-CSRF-Token")
    if sent is None and request.mimetype == "application/x-www-form-urlencoded":
        sent = form_fields().get("csrf_token")
    if not hmac.compare_digest((sent or "").encode("utf-8", "replace"), wanted.encode()):
        found = "none" if sent is None else "another"
        raise CsrfRefused(
            f"the session's CSRF token is required; {found} was sent: reload the page"
        )


def _check_role(actor: Actor, op: Operation) -> None:
    if op.role is not None and not actor.role.includes(op.role):
        raise Forbidden(
            f"this needs the role {op.role}; {actor.name} is {actor.role}: ask an admin"
        )


def _send_to_login() -> None:
    """Lead a browser to the login and back; what a script asked for gets the problem."""
    if request.method in SAFE_METHODS and "HX-Request" not in request.headers:
        here = request.full_path.rstrip("?")
        abort(redirect(f"{LOGIN_PATH}?next={quote(here, safe='/')}", 303))


def _entry(action: str, actor: Actor | None) -> Entry:
    path_names = "/".join(str(value) for value in (request.view_args or {}).values())
    known: dict[str, Any] = {"actor": "?", "actor_kind": "nobody", "role": None}
    if actor is not None:
        known = {"actor": actor.name, "actor_kind": actor.kind, "role": actor.role}
    elif "audit_actor" in g:
        known |= {"actor": g.audit_actor, "actor_kind": "key"}
    return Entry(
        **known,
        action=action,
        address=request.remote_addr,
        target=plain_text(str(g.get("audit_target", path_names))),
        details=g.get("audit_details", {}),
    )


def _tell(entry: Entry, outcome: str) -> None:
    log.event(
        "action.audited",
        action=entry.action,
        target=entry.target,
        actor=entry.actor,
        kind=entry.actor_kind,
        address=entry.address,
        outcome=outcome,
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
