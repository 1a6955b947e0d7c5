"""Two tenants on one gateway: whatever one sends, nothing of the other comes back.

Everything the victim has carries a marker; every operation of the route table, so a new one too, is
asked by the other tenant with the victim's ids in every place, as they are, mutated and guessed.
"""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import event

from headrace.contract import wire
from headrace.contract.ids import new_id
from headrace.contract.ledger import Ending, Ledger
from headrace.contract.roles import Role
from headrace.contract.tokens import Append
from headrace.contract.wire import FinishReason, JobStatus
from headrace.gateway import auth
from headrace.gateway.jobs import encode_cursor
from headrace.gateway.openapi import SESSION_COOKIE, Operation
from headrace.gateway.routes import route_table
from headrace.gateway.services import Services
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL, Courier, Held
from headrace.tests.gateway.operators import make_operator
from headrace.tests.gateway.reader import Reader

MARK = "victims-own"
PROMPT, NOTE, LABEL, OUTPUT, FAULT, TENANT = (
    f"{MARK}-{what}" for what in ("prompt", "note", "label", "output", "fault", "name")
)
IDEMPOTENCY_KEY = "a-key-that-both-may-use"
SEED = 5
#: Requests with everything drawn at random, beside those that walk all combinations.
NUM_RANDOM = 600


@dataclass
class Victim:
    """A tenant with a job in each state, and all that names any of it."""

    key_id: str
    tenant_id: str
    secret: str
    jobs: dict[str, str] = field(default_factory=dict)  # state -> id
    running: Held | None = None

    @property
    def ids(self) -> list[str]:
        return [*self.jobs.values(), self.key_id, self.tenant_id]


BODY = {"model": MODEL, "prompt": PROMPT, "metadata": {LABEL: NOTE}}


def say(courier: Courier, held: Held, text: str) -> None:
    """Log and publish one token with a text of its own."""
    first = len(held.ids)
    held.ids.append(100 + first)
    chunk = wire.TokenChunk(
        job=held.claim.job,
        attempt=held.attempt,
        gen=held.gen,
        first=first,
        ids=(100 + first,),
        text=text,
        ends=(len(text),),
    )
    assert courier.token_log.append(MODEL, [(held.spec.tenant, chunk)]) == [Append.LOGGED]


def end(courier: Courier, held: Held, status: JobStatus) -> None:
    failed = status is JobStatus.FAILED
    ending = Ending(
        status=status,
        finish_reason=None if failed else FinishReason.STOP,
        error_code="engine_refused" if failed else None,
        error_text=FAULT if failed else None,
        text=OUTPUT * len(held.ids),
        token_ids=tuple(held.ids),
        ends=tuple(len(OUTPUT) * (n + 1) for n in range(len(held.ids))),
    )
    courier.ledger.finish(held.claim.job, held.attempt, ending)
    courier.streams.finish(MODEL, [(held.claim.job, held.claim.entry)])


@pytest.fixture(scope="module")
def victim(app: Flask, services: Services) -> Victim:
    key = services.accounts.create_key(tenant=TENANT, name=MARK)
    client = client_of(app, key)
    victim = Victim(key.id, key.tenant_id, key.secret)
    courier = Courier(services.ledger, services.streams, services.token_log, name="w-fuzz")
    services.redis.flushall()
    for state in ("succeeded", "failed", "running", "canceled", "queued"):
        headers = {"Idempotency-Key": IDEMPOTENCY_KEY} if state == "succeeded" else {}
        response = client.post("/v1/jobs", json=BODY, headers=headers)
        assert response.status_code == 202
        job = victim.jobs[state] = response.get_json()["id"]
        if state in ("succeeded", "failed", "running"):
            held = courier.take()
            say(courier, held, OUTPUT)
            victim.running = held
        if state in ("succeeded", "failed"):
            end(courier, held, JobStatus(state))
        if state == "canceled":
            assert client.post(f"/v1/jobs/{job}/cancel").status_code == 200
    for state, job in victim.jobs.items():
        found = client.get(f"/v1/jobs/{job}")
        assert found.get_json()["status"] == state
        assert PROMPT in found.get_data(as_text=True)
    assert OUTPUT in client.get(f"/v1/jobs/{victim.jobs['succeeded']}").get_data(as_text=True)
    return victim


@pytest.fixture(scope="module")
def attacker(app: Flask, services: Services) -> FlaskClient:
    return client_of(app, services.accounts.create_key(tenant="attacker", name="a"))


@pytest.fixture(scope="module")
def table(services: Services) -> list[Operation]:
    return route_table(services)


@dataclass
class Sent:
    """One request of the attacker."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    body: object = None

    def by(self, client: FlaskClient) -> tuple[int, str]:
        """Send it; return the status, and all that came back as one text."""
        response = client.open(
            self.path,
            method=self.method,
            query_string=self.query,
            headers=self.headers,
            **({} if self.body is None else {"json": self.body}),
            buffered=False,
        )
        body = b""
        for part in response.iter_encoded():
            body += part
            if b": ping" in body:  # an endless stream of the attacker's own
                break
        response.close()
        assert response.status_code < 500, (self, body)
        return response.status_code, f"{response.headers}\n{body.decode('utf-8', 'replace')}"

    def text(self) -> str:
        return unquote(f"{self.path} {self.query} {self.headers} {self.body}")


def check(sent: Sent, answer: tuple[int, str], victim: Victim) -> None:
    """Nothing of the victim's may come back, but an id that was sent may be repeated."""
    _, text = answer
    assert MARK not in text, sent
    assert victim.secret not in text, sent
    for one in victim.ids:
        assert one in sent.text() or one not in text, sent


def mutations(one: str, chance: random.Random) -> list[str]:
    """Return what a clever guesser makes of an id."""
    at = chance.randrange(len(one))
    return [
        one, one.upper(), one[:-1], one + "0", one[:at] + "%00" + one[at:], f"%20{one}",
        f"{one}%0A",
        one.removeprefix("job_"), f"{one}%2Fcancel", f"{one}/../{one}", f"..%2F{one}", f"{one};",
        one.replace("_", "%5F"), f"{one}'--", f"%25{one[4:20]}%25", one[:12], f"{one}%C0%80",
        "".join(chance.sample(one, len(one))), "*", "null", "0", "me",
    ]  # fmt: skip


def path_of(op: Operation, value: str) -> str:
    return re.sub(r"<[^>]+>", value, op.path)


def test_every_operation_with_every_id_of_the_victim(table, attacker, victim):
    chance = random.Random(SEED)
    num_sent = 0
    for op in table:
        for one in victim.ids if "<" in op.path else victim.ids[:1]:
            for value in mutations(one, chance):
                sent = Sent(op.method, path_of(op, value))
                check(sent, sent.by(attacker), victim)
                num_sent += 1
                if "<" not in op.path:
                    break
    assert num_sent > 500


def test_an_id_of_the_victim_is_answered_as_one_that_never_was(
    table, attacker, victim, services, monkeypatch
):
    """The same answer, and by the same queries: neither text nor time tells them apart."""
    monkeypatch.setattr(auth, "CACHE_S", 3600.0)  # whose key it is, is asked once
    services.keys._known.clear()
    assert attacker.get("/v1/models").status_code == 200
    walked = [op for op in table if "<job_id>" in op.path]
    assert {op.name for op in walked} >= {"get_job", "cancel_job", "follow_job"}
    for op in walked:
        for one in victim.jobs.values():
            headers = {"Last-Event-ID": "0"} if op.name == "follow_job" else {}
            never = new_id("job")
            real, guessed = (
                Sent(op.method, path_of(op, job), headers=headers, body={} if op.body else None)
                for job in (one, never)
            )
            with queries_of(services) as asked_real:
                real_status, real_text = real.by(attacker)
            with queries_of(services) as asked_guessed:
                guessed_status, guessed_text = guessed.by(attacker)
            assert real_status == guessed_status == (404 if op.role is None else 403)
            assert plain(real_text, one) == plain(guessed_text, never)
            assert asked_real == asked_guessed


def plain(text: str, job: str) -> str:
    """Leave out what differs from answer to answer: the id, and a page's nonce."""
    return re.sub(r"nonce(-|=.)[\w-]+", "nonce", text.replace(job, "ID"))


@contextmanager
def queries_of(services: Services) -> Iterator[list[str]]:
    """Collect the statements that are sent to Postgres, and the uses of Redis."""
    found: list[str] = []

    def note(*arguments: object) -> None:
        found.append(str(arguments[2]))

    pool = services.redis.connection_pool
    original = pool.get_connection

    def get_connection(*arguments: object, **options: object):
        found.append("redis")
        return original(*arguments, **options)

    event.listen(services.engine, "before_cursor_execute", note)
    pool.get_connection = get_connection
    try:
        yield found
    finally:
        pool.get_connection = original
        event.remove(services.engine, "before_cursor_execute", note)


def test_the_collector_of_queries_sees_them(attacker, services):
    with queries_of(services) as found:
        assert attacker.get(f"/v1/jobs/{new_id('job')}").status_code == 404
    assert any("jobs" in statement for statement in found)


def hostile_values(victim: Victim, chance: random.Random) -> list[str]:
    """Return what the attacker puts anywhere."""
    cursors = [encode_cursor(one) for one in victim.jobs.values()]
    raw = base64.urlsafe_b64encode(b"job_" + bytes(range(16))).decode()
    made = [m for one in victim.ids for m in mutations(one, chance)]
    return [
        *victim.ids, *cursors, raw, IDEMPOTENCY_KEY, "0", "0.0", "0.1", "-1", "5.7", "9" * 30,
        "queued,running", "%", "_", "' OR '1'='1", "\x7f", f"label:{victim.tenant_id}",
        chance.choice(made), chance.choice(made),
    ]  # fmt: skip


def test_hostile_values_in_every_place_at_once(table, attacker, victim):
    """Path, query, headers and body are drawn anew for each request, by the seed."""
    chance = random.Random(SEED)
    headers = ("Last-Event-ID", "Idempotency-Key", "Prefer", "X-Tenant", "X-Forwarded-For",
               "X-Original-URL", "Cookie", "If-None-Match", "traceparent", "Host")  # fmt: skip
    fields = ("id", "tenant", "tenant_id", "key_id", "made_from", "model", "prompt", "metadata",
              "filter", "job", "jobs", "cursor")  # fmt: skip
    methods = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")
    statuses = set()
    for _ in range(NUM_RANDOM):
        op, values = chance.choice(table), hostile_values(victim, chance)
        names = list(op.query.model_json_schema()["properties"]) if op.query else ["cursor"]
        body = None
        if op.method == "POST" and chance.random() < 0.8:
            extra = {name: chance.choice(values) for name in chance.sample(fields, 3)}
            body = {"model": MODEL, "prompt": "mine"} | chance.choice([{}, extra])
        sent = Sent(
            op.method if chance.random() < 0.7 else chance.choice(methods),
            path_of(op, quote(chance.choice(values), safe="%")),
            {name: chance.choice(values) for name in chance.sample(names, chance.randint(0, 1))},
            {name: chance.choice(values) for name in chance.sample(headers, chance.randint(0, 4))},
            body,
        )
        answer = sent.by(attacker)
        statuses.add(answer[0])
        check(sent, answer, victim)
    assert {200, 202, 400, 403, 404} <= statuses  # the fuzz got past the door, and was refused


def test_lists_hold_ones_own_jobs_only_whatever_the_cursor(attacker, victim):
    mine = {
        attacker.post("/v1/jobs", json={"model": MODEL, "prompt": "mine"}).get_json()["id"]
        for _ in range(3)
    }
    seen: set[str] = set()
    cursors = [None, *(encode_cursor(one) for one in victim.jobs.values())]
    for cursor in cursors:
        for status in (None, "queued", "running", "succeeded", "failed", "canceled"):
            query = {"limit": "2"} | ({} if cursor is None else {"cursor": cursor})
            query |= {} if status is None else {"status": status}
            while True:
                sent = Sent("GET", "/v1/jobs", query)
                answer = sent.by(attacker)
                check(sent, answer, victim)
                page = json.loads(answer[1][answer[1].index("\n{") :])
                seen |= {job["id"] for job in page["data"]}
                if page["next_cursor"] is None:
                    break
                query = query | {"cursor": page["next_cursor"]}
    assert mine <= seen
    assert not seen & set(victim.jobs.values())


def without_tenant(which: str, victim: Victim):
    """Return one of the ledger's reads as it would be if it forgot to look at the tenant."""
    read = getattr(Ledger, which)
    if which == "list_jobs":
        return lambda self, tenant_id, **given: read(self, victim.tenant_id, **given)
    return lambda self, job_id, *, tenant_id=None: read(self, job_id, tenant_id=victim.tenant_id)


@pytest.mark.parametrize("which", ["job", "summary", "list_jobs"])
def test_the_fuzz_sees_a_tenant_check_that_is_gone(table, attacker, victim, monkeypatch, which):
    monkeypatch.setattr(Ledger, which, without_tenant(which, victim))
    with pytest.raises(AssertionError, match=MARK if which == "job" else None):
        test_every_operation_with_every_id_of_the_victim(table, attacker, victim)
    monkeypatch.undo()
    test_every_operation_with_every_id_of_the_victim(table, attacker, victim)


def test_an_idempotency_key_is_each_tenants_own(app, services, victim):
    """The same key and the same body, to the byte, by a tenant that knows both."""
    attacker = client_of(app, services.accounts.create_key(tenant="copier", name="c"))
    first = attacker.post("/v1/jobs", json=BODY, headers={"Idempotency-Key": IDEMPOTENCY_KEY})
    assert first.status_code == 202
    assert "Idempotent-Replayed" not in first.headers
    assert first.get_json()["id"] not in victim.ids
    # Another body under it: a conflict with one's own job, and only with that.
    other = {"model": MODEL, "prompt": "else"}
    second = attacker.post("/v1/jobs", json=other, headers={"Idempotency-Key": IDEMPOTENCY_KEY})
    assert second.status_code == 422
    assert victim.jobs["succeeded"] not in second.get_data(as_text=True)


def test_streams_side_by_side_carry_their_own_tokens(app, attacker, victim, services):
    """Tokens of both tenants' jobs, one flush after the other, through the same follower."""
    courier = Courier(services.ledger, services.streams, services.token_log, name="w-two")
    services.redis.flushall()
    job = attacker.post("/v1/jobs", json={"model": MODEL, "prompt": "mine"}).get_json()["id"]
    mine = courier.take()
    assert mine.claim.job == job
    owner = app.test_client()
    owner.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {victim.secret}"
    posted = owner.post("/v1/jobs", json=BODY).get_json()["id"]
    theirs = courier.take()
    assert theirs.claim.job == posted
    with Reader(attacker, job) as one, Reader(owner, posted) as other:
        one.until("started")
        other.until("started")
        for number in range(10):
            say(courier, theirs, OUTPUT)
            say(courier, mine, f"mine{number}")
        end(courier, mine, JobStatus.SUCCEEDED)
        courier.token_log.end(MODEL, [ended(mine)])
        events = one.rest()
        seen = [other.next() for _ in range(10)]
    texts = "".join(e.data["text"] for e in events if e.name == "token")
    assert texts == "".join(f"mine{number}" for number in range(10))
    assert all(e.data["job"] == job for e in events)
    assert all(e.data["job"] == posted for e in seen)


def ended(held: Held) -> wire.JobEnd:
    return wire.JobEnd(
        job=held.claim.job,
        gen=held.gen,
        next=len(held.ids),
        status=JobStatus.SUCCEEDED,
        finish_reason=FinishReason.STOP,
        prompt_tokens=1,
        cached_tokens=0,
    )


@pytest.mark.parametrize("role", list(Role))
def test_a_role_opens_no_other_tenants_jobs_below_v1_jobs(app, services, victim, role):
    key = services.accounts.create_key(tenant="attacker", name=f"r-{role}", role=role)
    client = client_of(app, key)
    for job in victim.jobs.values():
        for method, path in (
            ("GET", f"/v1/jobs/{job}"),
            ("GET", f"/v1/jobs/{job}/events"),
            ("POST", f"/v1/jobs/{job}/cancel"),
        ):
            sent = Sent(method, path)
            answer = sent.by(client)
            assert answer[0] == 404
            check(sent, answer, victim)
    sent = Sent("GET", "/v1/jobs")
    check(sent, sent.by(client), victim)


def test_an_operators_session_is_no_tenants_key(app, victim):
    client = app.test_client()
    session = make_operator(app, "fuzz-viewer", Role.VIEWER)
    client.set_cookie(SESSION_COOKIE, session.token)
    for path in ("/v1/jobs", *(f"/v1/jobs/{job}" for job in victim.jobs.values())):
        sent = Sent("GET", path)
        answer = sent.by(client)
        assert answer[0] == 401
        check(sent, answer, victim)


def test_revoked_and_mangled_keys_of_the_victim_open_nothing(app, services, table, victim):
    again = services.accounts.create_key(tenant=TENANT, name="revoked")
    services.accounts.revoke_key(again.id)
    secret = victim.secret
    for key in (again.secret, secret[:-1], secret + "0", secret.upper(), secret.replace("_", "-")):
        client = app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
        for op in table:
            if op.is_open or op.is_page:
                continue
            sent = Sent(op.method, path_of(op, victim.jobs["succeeded"]))
            answer = sent.by(client)
            assert answer[0] == 401, sent
            check(sent, answer, victim)
            assert key not in answer[1]


def test_what_is_open_to_all_tells_nothing_of_a_tenant(app, table, victim):
    client = app.test_client()
    for op in table:
        if op.is_open and op.method == "GET":
            sent = Sent("GET", path_of(op, "x"))
            check(sent, sent.by(client), victim)


def test_the_victims_own_things_were_not_touched(app, victim, services):
    for state, job in victim.jobs.items():
        row = services.ledger.job(job)
        assert row is not None
        assert row["status"] == state, "another tenant changed it"
        assert row["cancel_requested_at"] is None or state == "canceled"
