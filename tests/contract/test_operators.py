"""Operators and sessions on a real Postgres: logins, locks, ends."""

from __future__ import annotations

import hashlib
import threading
from datetime import datetime, timedelta

import pytest
from argon2 import PasswordHasher
from sqlalchemy import func, select, update

from headrace.contract.database import connect
from headrace.contract.errors import (
    DatabaseUnavailable,
    InvalidText,
    LastAdmin,
    LockedOut,
    LoginBusy,
    LoginRefused,
    NameTaken,
    NotFound,
    OutOfRange,
)
from headrace.contract.operators import MAX_FAILURES, Operators, Session
from headrace.contract.passwords import DECOY, MAX_AT_ONCE, Passwords
from headrace.contract.records import operators, sessions
from headrace.contract.roles import Role

PASSWORD = "correct horse battery"
WRONG = "wrong horse battery"


@pytest.fixture(scope="module")
def people(engine) -> Operators:
    return Operators(engine)


@pytest.fixture
def name(people, request) -> str:
    """The name of a fresh operator."""
    made = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    people.create(name=made, password=PASSWORD, role=Role.OPERATOR)
    return made


def stored(engine, name: str):
    with engine.connect() as db:
        return db.execute(select(operators).where(operators.c.name == name)).one()


def change(engine, table, where, **values):
    with engine.begin() as db:
        assert db.execute(update(table).where(where).values(**values)).rowcount == 1


def session_row(token: str):
    return sessions.c.token_sha256 == hashlib.sha256(token.encode()).digest()


def fail(people, name: str, times: int = 1):
    for _ in range(times):
        with pytest.raises(LoginRefused):
            people.login(name, WRONG, None)


# -- operators -------------------------------------------------------------------------------


def test_a_password_is_stored_as_argon2id_only(people, engine, name):
    row = stored(engine, name)
    assert row.password_hash.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    assert PASSWORD not in repr(row)
    assert "password_hash" not in people.operator(name)
    assert all("password_hash" not in each for each in people.list())


@pytest.mark.parametrize("bad", ["", "A", "a b", "a/b", "ä", "a\n", "a" * 65, "<script>", "a\x00"])
def test_names_have_one_form(people, bad):
    with pytest.raises(OutOfRange):
        people.create(name=bad, password=PASSWORD, role=Role.VIEWER)
    with pytest.raises(LoginRefused):
        people.login(bad, PASSWORD, None)


@pytest.mark.parametrize(
    ("bad", "error"),
    [("x" * 11, OutOfRange), ("x" * 1025, OutOfRange), ("\ud800" * 12, InvalidText)],
)
def test_passwords_have_a_length_and_are_text(people, name, bad, error):
    with pytest.raises(error) as raised:
        people.set_password(name, bad)
    assert bad not in raised.value.detail
    with pytest.raises(error):
        people.create(name="never-made", password=bad, role=Role.VIEWER)
    with pytest.raises(NotFound):
        people.operator("never-made")


def test_a_name_is_taken_also_by_a_disabled_operator(people, name):
    people.disable(name)
    with pytest.raises(NameTaken):
        people.create(name=name, password=PASSWORD, role=Role.ADMIN)
    assert people.operator(name)["role"] == "operator"


def test_texts_that_look_alike_are_one_password(people, name):
    people.set_password(name, "Ångström ﬁeld 12")  # Å and a ligature, composed
    assert people.login(name, "A\u030angstro\u0308m field 12", None).operator == name


def test_invariant_5_the_last_admin_stays(people, engine):
    for one in ("first-admin", "second-admin"):
        people.create(name=one, password=PASSWORD, role=Role.ADMIN)
    people.disable("first-admin")
    for lose in (
        lambda: people.disable("second-admin"),
        lambda: people.set_role("second-admin", Role.OPERATOR),
    ):
        with pytest.raises(LastAdmin):
            lose()
    assert stored(engine, "second-admin").disabled_at is None
    assert people.login("second-admin", PASSWORD, None).role is Role.ADMIN
    people.set_password("second-admin", PASSWORD)
    people.enable("first-admin")
    barrier, outcomes = threading.Barrier(2), []

    def disable(one: str):
        barrier.wait(10)
        try:
            people.disable(one)
            outcomes.append("done")
        except LastAdmin:
            outcomes.append("refused")

    threads = [threading.Thread(target=disable, args=(f"{n}-admin",)) for n in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["done", "refused"]


# -- logins ----------------------------------------------------------------------------------


def test_a_login_opens_a_session_of_which_only_the_hash_is_stored(people, engine, name):
    made = people.login(name, PASSWORD, "10.0.0.1")
    assert people.session(made.token) == Session(name, Role.OPERATOR, made.expires_at)
    with engine.connect() as db:
        row = db.execute(select(sessions).where(session_row(made.token))).one()
    assert made.token not in repr(row)
    assert made.token not in repr(made)
    assert row.address == "10.0.0.1"
    assert row.expires_at - row.created_at == timedelta(hours=12)
    assert stored(engine, name).last_login_at is not None
    assert len({people.login(name, PASSWORD, None).token for _ in range(3)}) == 3


def test_invariant_1_five_failures_lock_the_name_even_at_once(people, engine, name):
    barrier, outcomes = threading.Barrier(8), []

    def guess():
        barrier.wait(10)
        while True:
            try:
                people.login(name, WRONG, None)
            except LoginBusy:
                continue
            except (LoginRefused, LockedOut) as error:
                outcomes.append(error.code)
                return

    threads = [threading.Thread(target=guess) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(outcomes) == ["locked_out"] * 3 + ["login_refused"] * 5
    assert stored(engine, name).num_failures == 5


def test_invariant_2_a_locked_name_is_refused_with_the_right_password(people, engine, name):
    fail(people, name, 5)
    until = stored(engine, name).locked_until
    with pytest.raises(LockedOut) as raised:
        people.login(name, PASSWORD, None)
    assert raised.value.retry_after_s is not None
    assert 50 <= raised.value.retry_after_s <= 60
    assert stored(engine, name).locked_until == until
    assert stored(engine, name).num_failures == 5


def test_invariant_2_each_further_failure_doubles_the_lock_up_to_an_hour(people, engine, name):
    found = []
    fail(people, name, 4)
    for _ in range(8):
        fail(people, name)
        with engine.connect() as db:
            left = select(operators.c.locked_until - func.now()).where(operators.c.name == name)
            found.append(db.execute(left).scalar_one())
        change(engine, operators, operators.c.name == name, locked_until=func.now())
    minutes = [round(left.total_seconds() / 60, 1) for left in found]
    wanted = [1, 2, 4, 8, 16, 32, 60, 60]
    assert all(w - 0.5 <= m <= w for m, w in zip(minutes, wanted, strict=True)), minutes


def test_a_login_forgets_the_failures_and_so_does_an_admin(people, engine, name):
    fail(people, name, 4)
    people.login(name, PASSWORD, None)
    assert stored(engine, name).num_failures == 0
    fail(people, name, 5)
    people.enable(name)
    assert people.login(name, PASSWORD, None).operator == name
    fail(people, name, 5)
    people.set_password(name, PASSWORD)
    assert people.login(name, PASSWORD, None).operator == name


def test_the_fifth_try_with_the_right_password_is_a_login(people, name):
    fail(people, name, 4)
    assert people.login(name, PASSWORD, None).operator == name


def test_invariant_3_unknown_wrong_and_disabled_cost_the_same_and_say_the_same(
    engine, name, monkeypatch
):
    compared: list[bool] = []
    real = PasswordHasher.verify

    def verify(self, stored, password):
        compared.append(stored == DECOY)
        return real(self, stored, password)

    monkeypatch.setattr(PasswordHasher, "verify", verify)
    people, said = Operators(engine), set()
    people.create(name="disabled-one", password=PASSWORD, role=Role.VIEWER)
    people.disable("disabled-one")
    for who, password in ((name, WRONG), ("nobody", PASSWORD), ("disabled-one", PASSWORD)):
        with pytest.raises(LoginRefused) as raised:
            people.login(who, password, None)
        said.add(raised.value.detail)
    assert compared == [False, True, False]
    assert len(said) == 1


def test_the_decoy_costs_what_a_new_hash_costs():
    assert not PasswordHasher().check_needs_rehash(DECOY)
    assert not Passwords().is_right(None, PASSWORD)


def test_a_hash_of_other_parameters_is_made_anew_at_the_login(people, engine, name):
    weak = PasswordHasher(time_cost=1, memory_cost=8192).hash(PASSWORD)
    change(engine, operators, operators.c.name == name, password_hash=weak)
    people.login(name, PASSWORD, None)
    assert stored(engine, name).password_hash.startswith("$argon2id$v=19$m=65536,t=3,p=4$")
    people.login(name, PASSWORD, None)


def test_a_stored_hash_that_is_none_lets_nobody_in(people, engine, name):
    change(engine, operators, operators.c.name == name, password_hash="")
    with pytest.raises(LoginRefused):
        people.login(name, PASSWORD, None)


def test_a_password_changed_while_it_is_compared_opens_nothing(people, engine, name, monkeypatch):
    real = Passwords.is_right

    def is_right(self, stored, password):
        answer = real(self, stored, password)
        change(engine, operators, operators.c.name == name, password_hash=DECOY)
        return answer

    monkeypatch.setattr(Passwords, "is_right", is_right)
    with pytest.raises(LoginRefused):
        people.login(name, PASSWORD, None)


def test_what_finds_no_slot_comes_back_later_and_is_not_counted(engine, name):
    passwords = Passwords()
    people = Operators(engine, passwords)
    with passwords.slot(), passwords.slot():
        for call in (
            lambda: people.login(name, PASSWORD, None),
            lambda: people.set_password(name, PASSWORD),
        ):
            with pytest.raises(LoginBusy) as raised:
                call()
            assert raised.value.retry_after_s == 1
    assert MAX_AT_ONCE == 2
    assert stored(engine, name).num_failures == 0
    assert people.login(name, PASSWORD, None).operator == name


def test_the_work_is_given_to_whoever_runs_it(engine, name):
    ran = []

    def run(work):
        ran.append(threading.current_thread().name)
        return work()

    Operators(engine, Passwords(run)).login(name, PASSWORD, None)
    assert len(ran) == 1


# -- sessions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "age", "is_live"),
    [
        ("expires_at", timedelta(seconds=-5), True),
        ("expires_at", timedelta(seconds=1), False),
        ("seen_at", timedelta(hours=1, minutes=59), True),
        ("seen_at", timedelta(hours=2, seconds=1), False),
    ],
)
def test_a_session_ends_by_age_and_by_idleness(people, engine, name, column, age, is_live):
    token = people.login(name, PASSWORD, None).token
    change(engine, sessions, session_row(token), **{column: func.now() - age})
    assert (people.session(token) is not None) is is_live
    people.delete_ended_sessions()
    with engine.connect() as db:
        assert (
            db.execute(select(sessions).where(session_row(token))).first() is not None
        ) is is_live


def test_use_keeps_a_session_alive_and_is_written_once_a_minute(people, engine, name):
    token = people.login(name, PASSWORD, None).token

    def seen_at() -> datetime:
        with engine.connect() as db:
            return db.execute(select(sessions.c.seen_at).where(session_row(token))).scalar_one()

    first = seen_at()
    people.session(token)
    assert seen_at() == first
    change(engine, sessions, session_row(token), seen_at=first - timedelta(minutes=61))
    people.session(token)
    assert seen_at() >= first


@pytest.mark.parametrize(
    "end",
    [
        lambda people, name: people.set_password(name, PASSWORD),
        lambda people, name: people.set_role(name, Role.OPERATOR),
        lambda people, name: people.disable(name),
    ],
    ids=["password", "role", "disable"],
)
def test_a_change_of_the_operator_ends_all_its_sessions(people, name, end):
    tokens = [people.login(name, PASSWORD, None).token for _ in range(2)]
    other = people.create(name=f"{name}-2", password=PASSWORD, role=Role.VIEWER)["name"]
    kept = people.login(other, PASSWORD, None).token
    end(people, name)
    assert [people.session(token) for token in tokens] == [None, None]
    assert people.session(kept) is not None


def test_a_logout_ends_one_session(people, name):
    one, two = (people.login(name, PASSWORD, None).token for _ in range(2))
    assert people.logout(one)
    assert not people.logout(one)
    assert people.session(one) is None
    assert people.session(two) is not None


@pytest.mark.parametrize("token", ["", "x", "A" * 43, "A" * 44, "'; --", "\ud800" * 43, "é" * 43])
def test_any_other_token_is_nobodys(people, token):
    assert people.session(token) is None
    assert not people.logout(token)


def test_a_postgres_that_is_away_is_database_unavailable():
    engine = connect("postgresql+psycopg://postgres:x@127.0.0.1:1/headrace")
    people = Operators(engine)
    for call in (
        lambda: people.create(name="n", password=PASSWORD, role=Role.ADMIN),
        lambda: people.login("n", PASSWORD, None),
        lambda: people.session("A" * 43),
        lambda: people.logout("A" * 43),
        lambda: people.disable("n"),
        people.list,
        people.delete_ended_sessions,
    ):
        with pytest.raises(DatabaseUnavailable):
            call()
    engine.dispose()


# -- one's own password ----------------------------------------------------------------------


def test_a_password_is_changed_by_whoever_knows_it_and_ends_the_sessions(people, name):
    opened = [people.login(name, PASSWORD, None) for _ in range(2)]
    people.change_password(name, PASSWORD, "another horse battery")
    assert [people.session(each.token) for each in opened] == [None, None]
    with pytest.raises(LoginRefused):
        people.login(name, PASSWORD, None)
    assert people.login(name, "another horse battery", None).operator == name


def test_wrong_old_passwords_lock_the_name_and_change_nothing(people, name):
    session = people.login(name, PASSWORD, None)
    for _ in range(MAX_FAILURES):
        with pytest.raises(LoginRefused):
            people.change_password(name, WRONG, "another horse battery")
    with pytest.raises(LockedOut):
        people.change_password(name, PASSWORD, "another horse battery")
    assert people.session(session.token) is not None


def test_a_new_password_that_cannot_be_one_costs_no_try(people, name):
    for bad in ("short", "x" * 1025, PASSWORD):
        with pytest.raises(OutOfRange):
            people.change_password(name, PASSWORD, bad)
    assert people.operator(name)["num_failures"] == 0
