"""Every error as RFC 9457 problem details: one form for ours, Flask's and the unforeseen.

Invariants:
1. Each answer of 400 and above is application/problem+json with a stable `code`; below /dashboard,
   where a person reads it, it is a page with the same status, code and text.
2. An unforeseen exception tells the client nothing but `internal`; the log gets its type and its
   frames, never its text, which may quote a prompt.

Called by: gateway/app (handlers), gateway/connections (what never reached the app).
"""

from __future__ import annotations

from typing import Any

import msgspec
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from headrace.contract import log
from headrace.contract.errors import HeadraceError
from headrace.gateway.dashboard.frame import render_problem

MIMETYPE = "application/problem+json"

#: Codes of what Flask itself refuses, where our tree has a class for it.
_HTTP_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
}


def problem(
    *, status: int, code: str, detail: str, retryable: bool = False, **more: Any
) -> Response:
    """Return the response for a problem; `more` are extension members."""
    g.problem_code = code  # how the audit log calls this ending
    if is_for_a_page():
        return render_problem(status=status, code=code, detail=detail)
    body = problem_body(status=status, code=code, detail=detail, retryable=retryable) | more
    response = Response(msgspec.json.encode(body), status=status, mimetype=MIMETYPE)
    response.headers["Cache-Control"] = "no-store"
    return response


def problem_body(*, status: int, code: str, detail: str, retryable: bool) -> dict[str, Any]:
    """Return what every problem has."""
    return {
        "type": f"urn:headrace:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": status,
        "detail": detail,
        "code": code,
        "retryable": retryable,
    }


def is_for_a_page() -> bool:
    """True when the request is of a page, or of a path below /dashboard that does not exist."""
    operation = g.get("operation")
    if operation is not None:
        return operation.is_page
    return request.path == "/dashboard" or request.path.startswith("/dashboard/")


def problem_of(error: HeadraceError) -> Response:
    """Return the response for one of our errors."""
    response = problem(
        status=error.http_status, code=error.code, detail=error.detail, retryable=error.retryable
    )
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if error.http_status == 401 and not is_for_a_page():
        response.headers["WWW-Authenticate"] = 'Bearer realm="headrace"'
    return response


def handle_problems(app: Flask) -> None:
    """Let every error that leaves a view become a problem."""
    app.register_error_handler(HeadraceError, _ours)
    app.register_error_handler(HTTPException, _flasks)
    app.register_error_handler(Exception, _unforeseen)


def _ours(error: HeadraceError) -> Response:
    if error.http_status == 500:  # no class of the tree that a client may see
        return _unforeseen(error)
    return problem_of(error)


def _flasks(error: HTTPException) -> Response:
    status = error.code or 500
    code = _HTTP_CODES.get(status, "internal" if status >= 500 else "invalid_request")
    detail = error.description or error.name
    if status == 404:
        detail = "there is nothing at this path: /openapi.json lists what there is"
    response = problem(status=status, code=code, detail=detail, retryable=False)
    for name, value in error.get_headers():
        if name in ("Allow", "Retry-After"):
            response.headers[name] = value
    return response


def _unforeseen(error: Exception) -> Response:
    log.failure("request.failed", error, route=request.url_rule, method=request.method)
    return problem(
        status=500, code="internal", detail="the gateway failed at this; its log says where"
    )
