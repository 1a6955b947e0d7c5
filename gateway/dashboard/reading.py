"""What a request of the dashboard carries, as a model: JSON of programs and buttons, or a form.

Called by: the views in gateway/dashboard.
"""

from __future__ import annotations

from typing import TypeVar

from flask import request
from pydantic import BaseModel
from werkzeug.exceptions import RequestEntityTooLarge

from headrace.contract.errors import BodyTooLarge, UnsupportedMediaType
from headrace.contract.settings import GatewaySettings
from headrace.gateway.body import check_text, read_json_object
from headrace.gateway.refusals import validate

Model = TypeVar("Model", bound=BaseModel)

#: Forms of the dashboard are a few short fields.
MAX_FORM_BYTES = 64 * 1024


def json_body(model: type[Model], settings: GatewaySettings) -> Model:
    """Return the JSON body as the model, or raise the 4xx that says what is wrong with it."""
    body = read_json_object(
        request, max_body_bytes=settings.max_body_bytes, max_depth=settings.max_json_depth
    )
    return validate(model, body)


def form_fields() -> dict[str, str]:
    """Return the fields of an urlencoded form; the first, where one stands twice."""
    if request.mimetype != "application/x-www-form-urlencoded":
        raise UnsupportedMediaType(
            f"a form was expected; the body is {request.mimetype[:80]!r}: send it urlencoded"
        )
    request.max_content_length = MAX_FORM_BYTES
    try:
        fields = request.form.to_dict()
    except RequestEntityTooLarge:
        raise BodyTooLarge(
            f"the form has more than {MAX_FORM_BYTES:,} bytes: shorten its fields"
        ) from None
    check_text(fields)
    return fields
