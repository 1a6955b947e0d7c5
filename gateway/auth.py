"""Who is asking: `Authorization: Bearer hr_...`, deny by default.

A route is open only if its row in gateway/routes says so. Keys that were found good are remembered
by their hash for CACHE_S, so a status poll costs no look-up, and a revoked key works no longer than
that; keys that were not are looked up each time.

Called by: gateway/app (before each request).
"""

from __future__ import annotations

import hashlib
import time

from headrace.contract.accounts import Accounts, Principal
from headrace.contract.errors import Unauthenticated

#: Seconds a good key is believed without asking Postgres.
CACHE_S = 5.0
#: Keys remembered at most; beyond it the memory starts anew.
MAX_CACHED = 10_000


class KeyGuard:
    """Authenticates requests, with a short memory."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._known: dict[bytes, tuple[Principal, float]] = {}  # key's SHA-256 -> until when

    def principal(self, authorization: str | None) -> Principal:
        """Return whom the header speaks for, or raise Unauthenticated."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated(
                "a key is required; none was sent: add the header `Authorization: Bearer hr_...`"
            )
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        known = self._known.get(digest)
        now = time.monotonic()
        if known is not None and known[1] > now:
            return known[0]
        principal = self._accounts.authenticate(key.strip())
        if principal is None:
            self._known.pop(digest, None)
            raise Unauthenticated(
                "the key is not valid here: it is mistyped, revoked, or another fleet's"
            )
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[digest] = (principal, now + CACHE_S)
        return principal
