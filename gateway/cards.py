"""The models that may be asked for: cards from Postgres, remembered for a few seconds.

Called by: gateway/intake (one card), gateway/models (all), gateway/services (known).
"""

from __future__ import annotations

import time

from headrace.contract.accounts import Accounts
from headrace.contract.errors import UnknownModel
from headrace.contract.wire import ModelCard

#: Seconds a card is believed without asking Postgres.
CACHE_S = 5.0


class ModelCards:
    """The cards of all models that were ever served."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._cards: dict[str, ModelCard] = {}
        self._read_at: float | None = None  # monotonic

    def card(self, name: str) -> ModelCard:
        """Return a model's card; a name that is not known is looked up before it is refused."""
        card = self._cards.get(name)
        is_fresh = self._read_at is not None and time.monotonic() - self._read_at < CACHE_S
        if card is None or not is_fresh:
            card = {card.name: card for card in self.all()}.get(name)
        if card is None:
            served = ", ".join(sorted(self._cards)[:10]) or "none yet"
            raise UnknownModel(
                f"model {name[:200]!r} is not served here; there is {served}: choose one of them"
            )
        return card

    def known(self) -> list[str]:
        """Return the names that are remembered, without asking Postgres."""
        return list(self._cards)

    def all(self) -> list[ModelCard]:
        """Return all cards, by name, as Postgres has them now."""
        cards = self._accounts.list_models()
        self._cards = {card.name: card for card in cards}
        self._read_at = time.monotonic()
        return cards
