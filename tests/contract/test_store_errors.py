"""What the stores say when they cannot serve now, each state brought about on a real server.

Everything here must be `Unavailable`: gateway, courier, endings, keeper and tasks wait and go on at
that, and at nothing else. What is wrong with the command itself must not be.
"""

import contextlib
import resource
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError

from headrace.contract import redis_client
from headrace.contract.database import connect, database_errors
from headrace.contract.errors import DatabaseUnavailable, QueueUnavailable, Unavailable
from headrace.contract.redis_client import redis_errors
from headrace.contract.streams import JobStreams, Workers
from headrace.fleet.server import Server
from headrace.fleet.valkey import start_valkey
from headrace.tests.contract.test_streams_loss import beat_of

PATIENCE_S = 30.0
UNLIMITED = resource.RLIM_INFINITY


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


# -- Redis -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Valkey of this module's own: what is done to it must not reach other tests."""
    options = {"enable-debug-command": "yes", "busy-reply-threshold": "1", "hz": "100"}
    with start_valkey(tmp_path_factory.mktemp("sick"), options=options) as server:
        yield server


@pytest.fixture
def admin(sick: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(sick.url) as client:
        client.flushall()
        yield client


Sickness = Callable[[Server, redis.Redis], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def full_memory(_: Server, admin: redis.Redis) -> Iterator[None]:
    admin.config_set("maxmemory", 1)
    try:
        yield
    finally:
        admin.config_set("maxmemory", 0)


@contextlib.contextmanager
def full_disk(server: Server, admin: redis.Redis) -> Iterator[None]:
    """A file limit of 0 makes every append to the append-only file fail, with EFBIG."""

    def is_failing() -> bool:
        with contextlib.suppress(redis.ResponseError):
            admin.set("probe", 1)
        return admin.info("persistence")["aof_last_write_status"] == "err"

    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, UNLIMITED))
    try:
        wait_for(is_failing, "the append-only file cannot be written")
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (UNLIMITED, UNLIMITED))
        wait_for(
            lambda: admin.info("persistence")["aof_last_write_status"] == "ok",
            "the server writes again by itself",
        )


@contextlib.contextmanager
def replica_of_nothing(_: Server, admin: redis.Redis) -> Iterator[None]:
    admin.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        admin.replicaof("NO", "ONE")


@contextlib.contextmanager
def cut_off_replica(server: Server, admin: redis.Redis) -> Iterator[None]:
    admin.config_set("replica-serve-stale-data", "no")
    try:
        with replica_of_nothing(server, admin):
            yield
    finally:
        admin.config_set("replica-serve-stale-data", "yes")


@contextlib.contextmanager
def too_few_replicas(_: Server, admin: redis.Redis) -> Iterator[None]:
    admin.config_set("min-replicas-to-write", 1)
    try:
        yield
    finally:
        admin.config_set("min-replicas-to-write", 0)


@contextlib.contextmanager
def endless_script(server: Server, admin: redis.Redis) -> Iterator[None]:
    def run() -> None:
        with redis.Redis.from_url(server.url) as client, contextlib.suppress(redis.RedisError):
            client.eval("while true do end", 0)

    def is_busy() -> bool:
        try:
            admin.ping()
        except redis.ResponseError as error:
            return str(error).startswith("BUSY")
        return False

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_for(is_busy, "the script runs for too long")
        yield
    finally:
        admin.script_kill()
        thread.join(PATIENCE_S)


@contextlib.contextmanager
def loading(server: Server, admin: redis.Redis) -> Iterator[None]:
    """DEBUG RELOAD with a delay a key: what a large file does after a restart."""
    for number in range(60):
        admin.set(f"key:{number}", secrets.token_bytes(4096))  # nothing to compress
    admin.config_set("key-load-delay", 25_000)  # us
    admin.config_set("loading-process-events-interval-bytes", 1024)

    def load() -> None:
        with redis.Redis.from_url(server.url, socket_timeout=PATIENCE_S) as client:
            client.execute_command("DEBUG", "RELOAD")

    def is_loading() -> bool:
        try:
            admin.ping()
        except redis.BusyLoadingError:
            return True
        return False

    thread = threading.Thread(target=load)
    thread.start()
    try:
        wait_for(is_loading, "the server loads its file")
        yield
    finally:
        thread.join(PATIENCE_S)
        admin.config_set("key-load-delay", 0)


@contextlib.contextmanager
def no_connection_left(_: Server, admin: redis.Redis) -> Iterator[None]:
    admin.config_set("maxclients", 1)
    try:
        yield
    finally:
        admin.config_set("maxclients", 1000)


SICKNESSES: list[Sickness] = [
    full_memory,
    full_disk,
    replica_of_nothing,
    cut_off_replica,
    too_few_replicas,
    endless_script,
    loading,
    no_connection_left,
]


def in_a_command(client: redis.Redis) -> None:
    client.set("key", "value")


def in_a_script(client: redis.Redis) -> None:
    client.register_script("return redis.call('SET', KEYS[1], 'value')")(keys=["key"])


def in_a_pipeline(client: redis.Redis) -> None:
    client.pipeline(transaction=False).set("key", "value").execute()


def in_a_transaction(client: redis.Redis) -> None:
    client.pipeline(transaction=True).set("key", "value").execute()


WAYS = [in_a_command, in_a_script, in_a_pipeline, in_a_transaction]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sickness", SICKNESSES)
def test_a_sick_redis_is_unavailable_and_recovers(sick, admin, sickness, way):
    with redis_client.connect(sick.url) as client:
        with (
            sickness(sick, admin),
            pytest.raises(QueueUnavailable) as caught,
            redis_errors("write"),
        ):
            way(client)
        assert "it is tried again" in caught.value.detail
        assert "value" not in caught.value.detail
        wait_for(lambda: admin.ping(), "the server is well")
        with redis_errors("write"):
            way(client)
        assert admin.get("key") == b"value"


def test_what_is_wrong_with_the_command_is_not_called_unavailable(sick, admin):
    admin.set("text", "MISCONF BUSY caused error: MISCONF")
    with redis_client.connect(sick.url) as client:
        for wrong in (
            lambda: client.lpush("text", "x"),
            lambda: client.pipeline(transaction=False).lpush("text", "BUSY").execute(),
            lambda: client.execute_command("NO SUCH COMMAND"),
        ):
            with pytest.raises(redis.ResponseError), redis_errors("ask"):
                wrong()


def test_a_full_disk_is_no_reason_to_restore_what_is_held(sick, admin, spec_for):
    """XCLAIM refused for the server's state says nothing about the entry: not `gone`."""
    streams, spec = JobStreams(redis_client.connect(sick.url)), spec_for()
    streams.enqueue(spec, 1)
    streams.claim(spec.model, "w", lease_ms=1000, room_tokens=10, max_jobs=1, is_idle=True)
    admin.hset(next(admin.scan_iter("*:job:*")), "attempt", 1)
    assert streams.renew(spec.model, "w", [(spec.job, 1)]) == ["held"]
    with full_disk(sick, admin), pytest.raises(QueueUnavailable):
        streams.renew(spec.model, "w", [(spec.job, 1)])
    assert streams.renew(spec.model, "w", [(spec.job, 1)]) == ["held"]


def test_a_heartbeat_that_a_full_disk_refuses_is_made_later(sick, admin):
    workers, beat = Workers(redis_client.connect(sick.url)), beat_of("w")
    with full_disk(sick, admin), pytest.raises(QueueUnavailable):
        workers.beat(beat, lifetime_ms=60_000)
    workers.beat(beat, lifetime_ms=60_000)
    assert workers.alive().keys() == {beat.worker}


# -- Postgres --------------------------------------------------------------------------------

#: SQLSTATEs that pass by themselves or with the operator's help, as the server words them.
PASSING = {
    "25006": "read_only_sql_transaction",
    "25P03": "idle_in_transaction_session_timeout",
    "40001": "serialization_failure",
    "40P01": "deadlock_detected",
    "53000": "insufficient_resources",
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "55P03": "lock_not_available",
    "57014": "query_canceled: the statement timeout",
    "57P01": "admin_shutdown",
    "57P02": "crash_shutdown",
    "57P03": "cannot_connect_now",
    "58030": "io_error",
    "08006": "connection_failure",
    "XX000": "internal_error: what a file too large, EFBIG, is called",
}

#: SQLSTATEs that would come back at every try.
LASTING = {
    "22001": "string_data_right_truncation",
    "22P05": "untranslatable_character",
    "23505": "unique_violation",
    "42P01": "undefined_table",
    "54000": "program_limit_exceeded: a row that no page holds",
}


def raising(code: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION 'told by the server' USING ERRCODE = '{code}'; END $$"


@pytest.mark.parametrize("code", PASSING)
def test_a_sick_postgres_is_unavailable(engine, code):
    with (
        pytest.raises(DatabaseUnavailable) as caught,
        database_errors("ask"),
        engine.begin() as db,
    ):
        db.execute(text(raising(code)))
    assert caught.value.retry_after_s == 1
    assert "told by the server" not in caught.value.detail
    with database_errors("ask"), engine.connect() as db:
        assert db.execute(text("select 1")).scalar_one() == 1


@pytest.mark.parametrize("code", LASTING)
def test_what_is_wrong_with_the_statement_is_not_called_unavailable(engine, code):
    with pytest.raises(DBAPIError), database_errors("ask"), engine.begin() as db:
        db.execute(text(raising(code)))


def ask(url: str, *statements: str) -> None:
    engine = connect(url)
    try:
        with database_errors("ask"), engine.begin() as db:
            for statement in statements:
                db.execute(text(statement))
    finally:
        engine.dispose()


def test_a_row_that_no_page_holds_is_told_at_once(engine, database_url):
    ask(database_url, "create table wide (key text primary key)")
    with pytest.raises(DBAPIError) as caught, database_errors("ask"), engine.begin() as db:
        db.execute(text("insert into wide select string_agg(md5(n::text), '')"
                        " from generate_series(1, 400) n"))  # fmt: skip
    assert getattr(caught.value.orig, "sqlstate", "") == "54000"


def test_states_a_postgres_can_be_in(database_url):
    for statements in (
        ("set statement_timeout = '20ms'", "select pg_sleep(60)"),
        ("set transaction read only", "create table refused (n int)"),
        ("select pg_terminate_backend(pg_backend_pid())",),
        ("set transaction_timeout = '20ms'", "select pg_sleep(60)"),
    ):
        with pytest.raises(DatabaseUnavailable):
            ask(database_url, *statements)
    ask(database_url, "select 1")


def test_no_connection_left_is_unavailable(database_url):
    name = database_url.rpartition("/")[2]
    plain = database_url.replace("+psycopg", "")
    user, password = f"few_{name}", "few"
    with psycopg.connect(plain, autocommit=True) as admin:
        admin.execute(f"create role {user} login password '{password}' connection limit 0")  # pyright: ignore[reportArgumentType]
        try:
            with pytest.raises(DatabaseUnavailable):
                ask(
                    database_url.replace(
                        database_url.split("@")[0], f"postgresql+psycopg://{user}:{password}"
                    )
                )
        finally:
            admin.execute(f"drop role {user}")  # pyright: ignore[reportArgumentType]


def test_a_pool_that_meets_only_closed_connections_is_unavailable(engine, database_url):
    pooled = connect(database_url)
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as admin:

        def end(connection: Any, *_: Any) -> None:
            ended = "select pg_terminate_backend(%s, 10000)"
            assert admin.execute(ended, [connection.info.backend_pid]).fetchone() == (True,)

        event.listen(pooled, "checkout", end, insert=True)  # before the check
        with pytest.raises(Unavailable), database_errors("ask"):
            pooled.connect()
    pooled.dispose()


def test_invariant_3_a_connection_is_waited_for_and_then_refused(database_url):
    pooled = connect(database_url, pool_size=2, pool_wait_s=0.05)
    with pooled.connect() as one, pooled.connect() as other:
        with pytest.raises(DatabaseUnavailable), database_errors("ask"):
            pooled.connect()
        one.close()
        with pooled.connect() as again:
            assert again.exec_driver_sql("select 1").scalar() == 1
        assert other.exec_driver_sql("select 1").scalar() == 1
    pooled.dispose()
    with pooled.connect(), pooled.connect():  # a pool made anew has all its turns
        pass
    pooled.dispose()


def test_a_connection_that_cannot_be_made_takes_no_turn_along(database_url):
    away = connect("postgresql+psycopg://nobody@127.0.0.1:1/none", pool_size=1, pool_wait_s=0.05)
    for _ in range(3):
        with pytest.raises(OperationalError):
            away.connect()
    away.dispose()


def test_a_fault_of_ours_is_not_called_unavailable(engine):
    with engine.connect() as db:
        db.begin()
        with pytest.raises(InvalidRequestError), database_errors("ask"):
            db.begin()
