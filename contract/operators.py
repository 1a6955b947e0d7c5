"""Operators who log in with a password, and their sessions.

A session is a random token of 256 bits in the browser's cookie; only its SHA-256 is stored. It ends
SESSION_S after the login, IDLE_S after it was last used, at a logout, and with every change of its
operator's password, role or state.

Invariants:
1. A try is counted before its password is looked at, in one statement, so however many come at once
   no more than MAX_FAILURES are looked at before the name is locked. A login sets the count to 0.
2. A locked name is refused whatever password comes, and the try is not counted: the lock ends.
   It lasts LOCK_S, and twice as long after each further failure, up to MAX_LOCK_S.
3. An unknown name, a wrong password and a disabled operator get the same answer after the same
   work. (That a name exists shows when it can be locked: names are no secrets here.)
4. A login makes a new session, never takes over one that a browser brought.
5. There is always an enabled admin once there was one: the last cannot be disabled or demoted.

Called by: gateway/dashboard (login, guard, operators), gateway/upkeep, the CLI.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Engine,
    Float,
    RowMapping,
    case,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy import cast as as_type
from sqlalchemy.dialects.postgresql import insert as upsert

from headrace.contract.database import autocommitting, database_errors
from headrace.contract.errors import (
    LastAdmin,
    LockedOut,
    LoginRefused,
    NameTaken,
    NotFound,
    OutOfRange,
)
from headrace.contract.ids import new_id
from headrace.contract.passwords import MAX_LENGTH, Passwords, check_password
from headrace.contract.records import operators, sessions
from headrace.contract.roles import Role

SESSION_S = 12 * 3600
IDLE_S = 2 * 3600
#: Failures before a name is locked, then for how long.
MAX_FAILURES = 5
LOCK_S, MAX_LOCK_S = 60, 3600
#: `seen_at` is written at most this often.
SEEN_EVERY_S = 60

_NAME = re.compile(r"[a-z0-9._-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")

_is_locked = func.coalesce(operators.c.locked_until > func.now(), False)
_is_live_session = (sessions.c.expires_at > func.now()) & (
    sessions.c.seen_at > func.now() - text(f"interval '{IDLE_S} seconds'")
)


@dataclass(frozen=True, slots=True)
class Session:
    """A live session, as the guard needs it."""

    operator: str  # the name
    role: Role
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class NewSession:
    token: str  # for the cookie: shown once, kept nowhere
    operator: str
    role: Role
    expires_at: datetime

    def __repr__(self) -> str:  # the token stays out of logs and tracebacks
        return f"NewSession(operator={self.operator!r}, role={self.role!r})"


@dataclass(frozen=True, slots=True)
class _Tried:
    """An operator as it was when a try was counted."""

    id: str
    password_hash: str

    def __repr__(self) -> str:
        return f"_Tried(id={self.id!r})"


class Operators:
    """Transactions on operators and sessions, over one engine."""

    def __init__(self, engine: Engine, passwords: Passwords | None = None) -> None:
        self._engine = engine
        self._single = autocommitting(engine)
        self._passwords = passwords or Passwords()

    # -- operators ---------------------------------------------------------------------------

    def create(self, *, name: str, password: str, role: Role) -> RowMapping:
        """Make an operator; NameTaken if the name is used, also by a disabled one."""
        check_name(name)
        row = {"id": new_id("operator"), "name": name, "role": role}
        row["password_hash"] = self._hash(password)
        statement = upsert(operators).values(row).on_conflict_do_nothing(index_elements=["name"])
        with database_errors("create operator"), self._engine.begin() as db:
            if db.execute(statement.returning(operators.c.id)).first() is None:
                raise NameTaken(
                    f"an operator {name!r} was asked for; one exists: choose another name, or"
                    " change that one's password"
                )
        return self.operator(name)

    def operator(self, name: str) -> RowMapping:
        """Return one operator without the hash, or raise NotFound."""
        query = select(*_shown()).where(operators.c.name == name)
        with database_errors("read operator"), self._single.connect() as db:
            row = db.execute(query).mappings().first()
        if row is None:
            raise _unknown(name)
        return row

    def list(self) -> Sequence[RowMapping]:
        """Return all operators by name, without their hashes."""
        query = select(*_shown()).order_by(operators.c.name)
        with database_errors("list operators"), self._single.connect() as db:
            return db.execute(query).mappings().all()

    def set_password(self, name: str, password: str) -> None:
        """Give a new password; ends the operator's sessions and lock."""
        hashed = self._hash(password)
        self._change(name, password_hash=hashed, num_failures=0, locked_until=None)

    def set_role(self, name: str, role: Role) -> None:
        self._change(name, role=role)

    def disable(self, name: str) -> None:
        self._change(name, disabled_at=func.coalesce(operators.c.disabled_at, func.now()))

    def enable(self, name: str) -> None:
        self._change(name, disabled_at=None, num_failures=0, locked_until=None)

    def _hash(self, password: str) -> str:
        check_password(password)
        with self._passwords.slot():
            return self._passwords.hash(password)

    def _change(self, name: str, **values: Any) -> None:
        """Change one operator and end all its sessions."""
        with database_errors("change operator"), self._engine.begin() as db:
            # Two admins who disable each other at once must not both succeed: one waits here.
            had_admin = bool(db.execute(_live_admins().with_for_update()).all())
            changed = update(operators).where(operators.c.name == name).values(**values)
            operator_id = db.execute(changed.returning(operators.c.id)).scalar()
            if operator_id is None:
                raise _unknown(name)
            if had_admin and not db.execute(_live_admins()).all():
                raise LastAdmin(
                    f"{name!r} was to lose its rights; it is the last enabled admin: make another"
                    " one first"
                )
            db.execute(delete(sessions).where(sessions.c.operator_id == operator_id))

    # -- sessions ----------------------------------------------------------------------------

    def login(self, name: str, password: str, address: str | None) -> NewSession:
        """Check a password and open a session; LoginRefused, LockedOut or LoginBusy if not."""
        with self._passwords.slot():
            row = self._prove(name, password)
            password_hash = row.password_hash
            if self._passwords.is_outdated(password_hash):
                password_hash = self._passwords.hash(password)
        return self._open(row, password_hash, address)

    def change_password(self, name: str, password: str, new_password: str) -> None:
        """Give a new password to whoever knows the old one; refused as a login is.

        Ends all sessions of the operator, also the one it was asked in.
        """
        check_password(new_password)
        if new_password == password:
            raise OutOfRange("new_password: it is the old one: choose another")
        with self._passwords.slot():
            row = self._prove(name, password)
            hashed = self._passwords.hash(new_password)
        changed = (
            update(operators)
            .where(operators.c.id == row.id, operators.c.password_hash == row.password_hash)
            .values(password_hash=hashed, num_failures=0, locked_until=None)
        )
        with database_errors("change password"), self._engine.begin() as db:
            if not db.execute(changed).rowcount:  # changed by another meanwhile
                raise _refused()
            db.execute(delete(sessions).where(sessions.c.operator_id == row.id))

    def _prove(self, name: str, password: str) -> _Tried:
        """Count a try and compare the password, within a slot; LoginRefused or LockedOut if not."""
        if len(password) > MAX_LENGTH:
            raise _refused()
        row = self._count_try(name) if _NAME.fullmatch(name) else None
        stored = None if row is None else row.password_hash
        if not self._passwords.is_right(stored, password) or row is None:
            raise _refused()
        return row

    def _count_try(self, name: str) -> _Tried | None:
        """Count a try as a failure, until it proves right; None for an unknown name."""
        num = operators.c.num_failures + 1
        doubled = LOCK_S * func.power(2, func.least(num - MAX_FAILURES, 10))
        seconds = func.least(as_type(doubled, Float), MAX_LOCK_S)
        until = func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
        counted = (
            update(operators)
            .where(operators.c.name == name, ~_is_locked)
            .values(num_failures=num, locked_until=case((num >= MAX_FAILURES, until)))
            .returning(operators.c.id, operators.c.password_hash)
        )
        left = func.ceil(func.extract("epoch", operators.c.locked_until - func.now()))
        with database_errors("count login"), self._engine.begin() as db:
            row = db.execute(counted).first()
            if row is None:
                left_s = db.execute(select(left).where(operators.c.name == name, _is_locked))
                if (seconds_left := left_s.scalar()) is not None:
                    raise _locked(max(1, int(seconds_left)))
        return None if row is None else _Tried(row.id, row.password_hash)

    def _open(self, row: _Tried, password_hash: str, address: str | None) -> NewSession:
        """Open a session, if the operator is still as it was when its password was compared."""
        token = secrets.token_urlsafe(32)
        proven = (
            update(operators)
            .where(
                operators.c.id == row.id,
                operators.c.disabled_at.is_(None),
                operators.c.password_hash == row.password_hash,
            )
            .values(
                num_failures=0,
                locked_until=None,
                last_login_at=func.now(),
                password_hash=password_hash,
            )
            .returning(operators.c.name, operators.c.role)
        )
        with database_errors("open session"), self._engine.begin() as db:
            found = db.execute(proven).first()
            if found is None:
                raise _refused()
            expires_at = db.execute(
                insert(sessions)
                .values(
                    token_sha256=_digest(token),
                    operator_id=row.id,
                    expires_at=func.now() + text(f"interval '{SESSION_S} seconds'"),
                    address=address,
                )
                .returning(sessions.c.expires_at)
            ).scalar_one()
        return NewSession(token, found.name, Role(found.role), expires_at)

    def session(self, token: str) -> Session | None:
        """Return the live session of a token and note that it is used."""
        if not _TOKEN.fullmatch(token):
            return None
        mine = sessions.c.token_sha256 == _digest(token)
        query = (
            select(operators.c.name, operators.c.role, sessions.c.expires_at)
            .join(operators, operators.c.id == sessions.c.operator_id)
            .where(mine, _is_live_session, operators.c.disabled_at.is_(None))
        )
        stale = sessions.c.seen_at < func.now() - text(f"interval '{SEEN_EVERY_S} seconds'")
        with database_errors("look up session"), self._engine.begin() as db:
            row = db.execute(query).first()
            if row is None:
                return None
            db.execute(update(sessions).where(mine, stale).values(seen_at=func.now()))
        return Session(row.name, Role(row.role), row.expires_at)

    def logout(self, token: str) -> bool:
        """End a session; False when there was none."""
        statement = delete(sessions).where(sessions.c.token_sha256 == _digest(token))
        with database_errors("end session"), self._engine.begin() as db:
            return bool(db.execute(statement).rowcount)

    def delete_ended_sessions(self) -> int:
        """Delete the sessions that nobody can use any more."""
        with database_errors("delete sessions"), self._engine.begin() as db:
            return db.execute(delete(sessions).where(~_is_live_session)).rowcount


def check_name(name: str) -> None:
    """Refuse a new operator's name that is not of the one form names have."""
    if not _NAME.fullmatch(name):
        raise OutOfRange(
            f"operator's name is {name[:40]!r}: give 1 to 64 of the characters a-z, 0-9, . _ -"
        )


def _shown() -> list[Any]:
    columns: list[Any] = [c for c in operators.c if c.key not in ("id", "password_hash")]
    return columns


def _live_admins() -> Any:
    is_live_admin = (operators.c.role == Role.ADMIN) & operators.c.disabled_at.is_(None)
    return select(operators.c.id).where(is_live_admin).order_by(operators.c.id)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no operator {name[:64]!r}: see the list of operators")


def _refused() -> LoginRefused:
    return LoginRefused("name and password do not belong together: type them again")


def _locked(seconds: int) -> LockedOut:
    return LockedOut(
        f"{MAX_FAILURES} or more wrong passwords were sent for this name; it is locked for"
        f" {seconds:,} s more: wait, or let an admin set a new password",
        retry_after_s=seconds,
    )
