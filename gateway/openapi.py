"""The OpenAPI 3.1 document, made from the route table that also makes the routes.

Own code rather than flask-openapi3, which was tried (4.3.2): it builds the JSON schema of a query
model anew on each request (0.8 ms here, as much as the whole of a status poll), parses bodies
leniently (`silent=True`, a JSON text as a body is parsed again), and its documentation page loads
what a strict Content-Security-Policy forbids.

Called by: gateway/routes (Operation), gateway/pages (the document).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flask.typing import ResponseReturnValue
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from headrace.contract.roles import Role
from headrace.gateway.answers import Problem

Models = type[BaseModel]

_PARAMETER = re.compile(r"<(?:\w+:)?(\w+)>")

#: What an answer of 429 or 503 may say.
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds to wait before asking again.",
        "schema": {"type": "integer"},
    }
}

#: The cookie that holds an operator's session.
SESSION_COOKIE = "headrace_session"


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the route table."""

    method: str
    path: str  # as Flask writes it: /v1/jobs/<job_id>
    name: str
    view: Callable[..., ResponseReturnValue]
    summary: str
    answers: Mapping[int, Models | str]  # a model, or the media type of what is not JSON
    body: Models | None = None
    query: Models | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])  # name -> what it does
    is_open: bool = False  # needs no key
    problems: Sequence[int] = ()  # statuses beyond those every operation has
    # Needs an operator's session, or a key, of this role at least; None: a tenant's key.
    role: Role | None = None
    action: str | None = None  # audited under this name, however it ends: worker.drain
    is_page: bool = False  # HTML for a browser: not in the document, its errors are pages too


def document(operations: Sequence[Operation], *, version: str) -> dict[str, Any]:
    """Return the OpenAPI document of the operations that are no pages."""
    operations = [op for op in operations if not op.is_page]
    models = {Problem: None} | {
        model: None
        for op in operations
        for model in (op.body, op.query, *op.answers.values())
        if isinstance(model, type)
    }
    _, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    components = schemas["$defs"]
    paths: dict[str, dict[str, Any]] = {}
    for op in operations:
        path = paths.setdefault(_PARAMETER.sub(r"{\1}", op.path), {})
        path[op.method.lower()] = _operation(op, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "headrace",
            "version": version,
            "description": "Asynchronous LLM inference: post a job, follow its tokens.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key, `hr_...`."},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": SESSION_COOKIE,
                    "description": "An operator who logged in at /dashboard/login.",
                },
            },
        },
        "security": [{"key": []}],
    }


def _operation(op: Operation, components: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [_parameter("path", name) for name in _PARAMETER.findall(op.path)]
    parameters += [_parameter("header", name, text) for name, text in op.headers.items()]
    if op.query is not None:
        query = components[op.query.__name__]
        for name, schema in query["properties"].items():
            parameters.append(
                {"in": "query", "name": name, "schema": schema}
                | ({"description": schema["description"]} if "description" in schema else {})
            )
    described: dict[str, Any] = {
        "operationId": op.name,
        "summary": op.summary,
        "parameters": parameters,
        "responses": _responses(op),
    }
    if op.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _ref(op.body)}},
        }
    if op.is_open:
        described["security"] = []
    if op.role is not None:
        described["security"] = [{"key": []}, {"session": []}]
        described["description"] = f"For the role {op.role} or above."
    return described


def _responses(op: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status, answer in op.answers.items():
        media, schema = ("application/json", _ref(answer)) if isinstance(answer, type) else (
            answer, {"type": "string"}
        )  # fmt: skip
        found[str(status)] = {"description": op.summary, "content": {media: {"schema": schema}}}
    problems = {*op.problems, 500, *(() if op.is_open else (401, 503))}
    problems |= set() if op.role is None else {403}
    for status in sorted(problems):
        found[str(status)] = {
            "description": "A problem.",
            "content": {"application/problem+json": {"schema": _ref(Problem)}},
        }
        if status in (429, 503):
            found[str(status)]["headers"] = _RETRY_AFTER
    return found


def _parameter(place: str, name: str, text: str = "") -> dict[str, Any]:
    return {"in": place, "name": name, "schema": {"type": "string"}} | (
        {"required": True} if place == "path" else {"description": text}
    )


def _ref(model: Models) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
