"""`GET /v1/models`: what may be asked for, and whether a live worker serves it now.

Called by: gateway/routes.
"""

from __future__ import annotations

from flask import Response

from headrace.contract.errors import QueueUnavailable
from headrace.gateway.jobs import json_response
from headrace.gateway.services import Services


class ModelRoutes:
    """The view of models."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def page(self) -> Response:
        try:
            beats = self._services.workers.alive().values()
            ready = {beat.model for beat in beats if beat.state == "ready"}
        except QueueUnavailable:
            ready = set[str]()  # nobody can be reached without Redis
        models = [
            {
                "id": card.name,
                "object": "model",
                "max_seq_tokens": card.max_seq_tokens,
                "vocab_size": card.vocab_size,
                "dtype": card.dtype,
                "has_chat_template": card.has_chat_template,
                "ready": card.name in ready,
            }
            for card in self._services.cards.all()
        ]
        return json_response({"object": "list", "data": models})
