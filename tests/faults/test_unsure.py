"""Wrappers reach a program's inside, in each process it forks, and do there what they say.

The engine stays free of them: test_planted looks at its process.
"""

import os
import subprocess
import sys

import psycopg
import pytest
import redis

from headrace.tests.faults import wrapped
from headrace.tests.fleet.fleet_parts import PATIENCE_S

PREPARE = """
import os, sys
from headrace.tests.faults import wrapped
wrapped.install({spec!r}, "worker")
from headrace.contract import database, redis_client
from headrace.contract.errors import Unavailable
"""

REDIS = """
import redis
client = redis_client.connect({url!r})
for _ in range(4):
    try:
        client.incr("count")
        print("told")
    except redis.RedisError as error:
        print(type(error).__name__)
pipe = client.pipeline(transaction=False)
pipe.incr("piped").incr("piped")
try:
    pipe.execute()
except redis.RedisError as error:
    print(type(error).__name__)
"""

SQL = """
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
engine = database.connect({url!r})
for number in range(3):
    try:
        with engine.begin() as db:
            db.execute(text("INSERT INTO seen VALUES (:number)"), {{"number": number}})
        print("told")
    except OperationalError as error:
        print("broken", error.connection_invalidated)
"""

FORKED = """
import redis
pid = os.fork()
client = redis_client.connect({url!r})
try:
    client.incr("forked")
except redis.RedisError as error:
    print("child" if pid == 0 else "parent", type(error).__name__, flush=True)
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
"""


def run(script: str, spec: str, url: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREPARE.format(spec=spec) + script.format(url=url)],
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath},
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
        text=True,
    )


@pytest.fixture
def table(database_url: str):
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS seen (number int)")
        connection.execute("TRUNCATE seen")
        yield connection


def test_a_redis_call_is_done_and_its_answer_lost(redis_url):
    done = run(REDIS, "unsure:share=1,before=0,only=redis.INCRBY", redis_url)
    assert done.stdout.split() == ["TimeoutError"] * 5
    assert done.stderr.splitlines() == ["fault.unsure call=redis.INCRBY when=after"] * 5
    with redis.Redis.from_url(redis_url) as client:
        assert client.get("count") == b"4", "each was done once: nothing below retries"
        assert client.get("piped") == b"2"


def test_a_redis_call_that_is_not_done_leaves_no_trace(redis_url):
    with redis.Redis.from_url(redis_url) as client:
        client.delete("count", "piped")
    done = run(REDIS, "unsure:share=1,before=1,only=redis.INCRBY", redis_url)
    assert done.stdout.split() == ["ConnectionError"] * 5
    with redis.Redis.from_url(redis_url) as client:
        assert client.get("count") is None
        assert client.get("piped") is None


def test_a_commit_is_done_and_its_answer_lost(table, database_url):
    done = run(SQL, "unsure:share=1,before=0,only=sql.commit", database_url)
    assert done.stdout.splitlines() == ["broken True"] * 3
    assert sorted(table.execute("SELECT number FROM seen").fetchall()) == [(0,), (1,), (2,)]


@pytest.mark.parametrize("fault", ["before=1,only=sql.commit", "before=0,only=sql.execute"])
def test_a_transaction_that_broke_earlier_leaves_no_trace(table, database_url, fault):
    done = run(SQL, f"unsure:share=1,{fault}", database_url)
    assert done.stdout.splitlines() == ["broken True"] * 3
    assert table.execute("SELECT number FROM seen").fetchall() == []


def test_a_share_is_a_share_and_the_rest_is_well(table, database_url):
    done = run(SQL, "unsure:share=0,only=sql", database_url)
    assert done.stdout.split() == ["told"] * 3
    assert done.stderr == ""
    assert len(table.execute("SELECT number FROM seen").fetchall()) == 3


def test_a_forked_process_is_wrapped_too(redis_url):
    done = run(FORKED, "unsure:share=1,before=0,only=redis.INCRBY", redis_url)
    assert sorted(done.stdout.splitlines()) == ["child TimeoutError", "parent TimeoutError"]


def test_draws_differ_from_process_to_process():
    script = """
from headrace.tests.faults.unsure import Dice
dice = Dice("7:worker", 0.5, 0.5)
draw = lambda: [dice.draw("redis.GET") for _ in range(64)]
pid = os.fork()
print(("child" if pid == 0 else "parent"), draw(), flush=True)
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
"""
    lines = run(script, "unsure:share=0").stdout.splitlines()
    assert len({line.split(" ", 1)[1] for line in lines}) == len(lines) == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("unsur", "wrapper 'unsur' was asked for"),
        ("unsure:share", "write key=value"),
        ("unsure:shar=1", "shar is no option"),
        ("unsure:share=2", "from 0 to 1"),
        ("unsure:share=much", "could not convert"),
        ("unsure:only=mysql", "calls are named"),
        ("planted:bug=none", "name bug="),
        ("repeated:times=3", "the only option is seed"),
        ("crash:at=lunch", "name at="),
    ],
)
def test_a_spec_that_cannot_be_read_is_refused(spec, said):
    with pytest.raises(wrapped.SpecError, match=said):
        wrapped.install(spec, "worker")


def test_a_mistyped_fault_starts_nothing():
    argv = wrapped.argv_of("unsure:share=2", "worker")
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath}
    environ |= {"HEADRACE_REDIS_URL": "redis://127.0.0.1:1/0", "HEADRACE_MODEL": "/nowhere"}
    environ |= {"HEADRACE_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none"}
    done = subprocess.run(argv, env=environ, capture_output=True, timeout=PATIENCE_S, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("wrapped: unsure was given")
