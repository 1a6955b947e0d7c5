"""Passwords of operators: Argon2id, the same work whoever is named, few at a time.

A hash costs about 60 ms of CPU and 64 MiB (RFC 9106, second recommendation: 3 passes, 4 lanes), so
at most MAX_AT_ONCE are made at once in a process; the next is told to come back, before anything is
counted against the name.

Invariants:
1. A name that does not exist costs the work of one that does (DECOY).
2. Texts that look alike are one password: NFKC, as NIST SP 800-63B 5.1.1.2 asks.
3. No password and no hash stands in a log, an error or a repr.

Called by: contract.operators. The gateway passes a `run` that leaves its event loop free
(gateway/dashboard/threads).
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from headrace.contract.errors import InvalidText, LoginBusy, OutOfRange

T = TypeVar("T")

MIN_LENGTH, MAX_LENGTH = 12, 1024  # characters
#: Passwords that a process checks or hashes at once: two cores' worth, 128 MiB.
MAX_AT_ONCE = 2
#: Of a password nobody knows: what an unknown name's is compared with. A test holds its parameters
#: to those of new hashes.
DECOY = (
    "$argon2id$v=19$m=65536,t=3,p=4$RCNivBex/LthSxxI6qPSgQ"
    "$9PUtlgSUZjr7ODt6/WCgu0XTabVtQ1bb76nmb80wQNw"
)

_LONE = re.compile("[\ud800-\udfff]")


class Run(Protocol):
    """Runs blocking work: here, or in a thread while greenlets go on."""

    def __call__(self, work: Callable[[], T], /) -> T: ...


def run_here(work: Callable[[], T], /) -> T:
    return work()


class Passwords:
    """Hashes and compares, within the process's slots."""

    def __init__(self, run: Run = run_here) -> None:
        self._run = run
        self._hasher = PasswordHasher()
        self._slots = threading.BoundedSemaphore(MAX_AT_ONCE)

    @contextmanager
    def slot(self) -> Generator[None]:
        """Hold one of the slots, without which nothing is computed; raise LoginBusy if none is."""
        if not self._slots.acquire(blocking=False):
            raise LoginBusy(
                f"a password was sent; {MAX_AT_ONCE} are being checked, which is as many as one"
                " process does at once: try again in a second",
                retry_after_s=1,
            )
        try:
            yield
        finally:
            self._slots.release()

    def hash(self, password: str) -> str:
        return self._run(lambda: self._hasher.hash(_bytes_of(password)))

    def is_right(self, stored: str | None, password: str) -> bool:
        """Compare with a stored hash; None: do the work, and say no."""

        def compare() -> bool:
            try:
                return self._hasher.verify(stored or DECOY, _bytes_of(password))
            except (VerificationError, InvalidHashError):
                return False

        return self._run(compare) and stored is not None

    def is_outdated(self, stored: str) -> bool:
        """True when the hash was made with other parameters than a new one would be."""
        return self._hasher.check_needs_rehash(stored)


def check_password(password: str) -> None:
    """Refuse a new password that is too short, too long, or no text."""
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise OutOfRange(
            f"a password of {len(password):,} characters was given; {MIN_LENGTH} to"
            f" {MAX_LENGTH:,} are taken: choose another"
        )
    if _LONE.search(password):
        raise InvalidText("the password is not UTF-8 text: type it again")


def _bytes_of(password: str) -> bytes:
    return unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")
