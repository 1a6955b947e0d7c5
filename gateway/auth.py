"""Who is asking: `Authorization: Bearer hr_...`, deny by default.

A route is open only if its row in gateway/routes says so. Keys that were found good are remembered
by their hash for CACHE_S, so a status poll costs no look-up, and a revoked key works no longer than
that; keys that were not are looked up each time. Who comes with a key that is being looked up waits
for that look-up: the hundred requests of a burst ask once.

Called by: gateway/app (before each request).
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import Future

from headrace.contract.accounts import Accounts, Principal
from headrace.contract.errors import DatabaseUnavailable, HeadraceError, Unauthenticated

#: Seconds a good key is believed without asking Postgres.
CACHE_S = 5.0
#: Keys remembered at most; beyond it the memory starts anew.
MAX_CACHED = 10_000


class KeyGuard:
    """Authenticates requests, with a short memory."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._known: dict[bytes, tuple[Principal, float]] = {}  # key's SHA-256 -> until when
        self._asked: dict[bytes, Future[Principal]] = {}  # what is being looked up

    def principal(self, authorization: str | None) -> Principal:
        """Return whom the header speaks for, or raise Unauthenticated."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated(
                "a key is required; none was sent: add the header `Authorization: Bearer hr_...`"
            )
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        known = self._remembered(digest)
        if known is not None:
            return known
        asked = Future[Principal]()
        first = self._asked.setdefault(digest, asked)
        if first is not asked:
            return first.result()
        try:
            asked.set_result(principal := self._look_up(digest, key.strip()))
        except BaseException as error:
            asked.set_exception(error if isinstance(error, HeadraceError) else _interrupted())
            raise
        finally:
            del self._asked[digest]
        return principal

    def _remembered(self, digest: bytes) -> Principal | None:
        known = self._known.get(digest)
        return known[0] if known is not None and known[1] > time.monotonic() else None

    def _look_up(self, digest: bytes, key: str) -> Principal:
        principal = self._accounts.authenticate(key)
        if principal is None:
            self._known.pop(digest, None)
            raise Unauthenticated(
                "the key is not valid here: it is mistyped, revoked, or another fleet's"
            )
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[digest] = (principal, time.monotonic() + CACHE_S)
        return principal


def _interrupted() -> DatabaseUnavailable:
    return DatabaseUnavailable("look up key: it was interrupted: try again in a second")
