"""Pauses: what a claim is not given, what goes on all the same, and the copy that comes back."""

from __future__ import annotations

import time
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.contract import keys, wire
from headrace.contract.database import connect
from headrace.contract.errors import DatabaseUnavailable
from headrace.contract.live import Live
from headrace.contract.pauses import Pauses, by_model, is_paused

MODEL = "tiny/model: a {b}"
CLASSES, TENANTS = ("interactive", "batch"), ("tenant_a", "tenant_b")


@pytest.fixture
def live(client):
    return Live(client)


@pytest.fixture
def pauses(engine, live, accounts):
    pauses = Pauses(engine, live)
    pauses.resume(model="*", job_class="*", tenant_id="*")
    for name in (MODEL, "other"):
        card = wire.ModelCard(
            name=name,
            folder="/nowhere",
            max_seq_tokens=8,
            vocab_size=8,
            dtype="float32",
            has_chat_template=False,
        )
        accounts.register_model(card)
    return pauses


def claim(streams, worker="w1", max_jobs=100, lease_ms=60_000):
    claimed = streams.claim(
        MODEL, worker, lease_ms=lease_ms, room_tokens=1 << 20, max_jobs=max_jobs, is_idle=True
    )
    assert not claimed.is_blocked
    return [claim.job for claim in claimed.claims]


def test_a_claim_gives_nothing_of_a_paused_lane_and_all_after_it(streams, live, spec_for):
    for job_class, tenant in product(CLASSES, TENANTS):
        streams.enqueue(spec_for(f"{job_class}{tenant}", job_class=job_class, tenant=tenant), 1)
    live.set_pauses({MODEL: {"interactive:tenant_a"}})
    assert claim(streams, max_jobs=2) == ["interactivetenant_b", "batchtenant_a"]
    live.set_pauses({MODEL: {"*:tenant_b", "interactive:*"}})
    assert claim(streams) == []
    live.set_pauses({MODEL: {"interactive:*"}})
    assert claim(streams) == ["batchtenant_b"]
    live.set_pauses({MODEL: set()})
    assert claim(streams) == ["interactivetenant_a"]


def test_an_urgent_job_waits_too_and_keeps_its_urgency(streams, live, spec_for):
    soon_ms = int(time.time() * 1000) + 1000
    for number in range(40):  # more than the script looks at in one go
        streams.enqueue(spec_for(f"p{number}", tenant="paused", deadline_ms=soon_ms), 1)
    streams.enqueue(spec_for("normal", tenant="open"), 1)
    streams.enqueue(spec_for("urgent", tenant="open", priority="low", deadline_ms=soon_ms + 1), 1)
    live.set_pauses({MODEL: {"*:paused"}})
    assert claim(streams) == ["urgent", "normal"]
    live.set_pauses({MODEL: set()})
    streams.enqueue(spec_for("later", tenant="open", priority="high"), 1)
    assert claim(streams) == [*(f"p{number}" for number in range(40)), "later"]


def test_what_was_given_once_is_taken_over_and_handed_back_in_a_paused_lane(
    streams, live, spec_for, client
):
    streams.enqueue(spec_for("job_1"), 1)
    streams.enqueue(spec_for("job_2"), 1)
    assert claim(streams, max_jobs=1) == ["job_1"]
    live.set_pauses({MODEL: {"*:*"}})
    assert claim(streams, "w2", lease_ms=0) == ["job_1"]
    assert streams.hand_back(MODEL, "job_1", 1)
    assert claim(streams, "w3") == ["job_1"]
    assert live.counts([MODEL])[MODEL]["takeovers"] == 1, "handed back in good order is none"
    assert live.takeovers(MODEL) == {"interactive:normal:tenant_a": 1}
    assert 0 < client.ttl(keys.takeovers(MODEL)) <= keys.TAKEOVERS_TTL_S


members = st.sets(
    st.tuples(st.sampled_from(("*", *CLASSES)), st.sampled_from(("*", *TENANTS))).map(":".join)
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(members)
def test_is_paused_says_what_the_claim_does(client, streams, live, spec_for, paused):
    client.flushall()
    queues = list(product(CLASSES, TENANTS))
    for job_class, tenant in queues:
        streams.enqueue(spec_for(f"{job_class}|{tenant}", job_class=job_class, tenant=tenant), 1)
    live.set_pauses({MODEL: paused})
    given_out = {tuple(job.split("|")) for job in claim(streams)}
    assert given_out == {queue for queue in queues if not is_paused(paused, *queue)}


# -- the authority ---------------------------------------------------------------------------


def test_invariant_1_a_pause_outlives_redis(pauses, live, client):
    pauses.pause(model=MODEL, job_class="batch", tenant_id="*", by="ada")
    assert pauses.restore() == [MODEL]
    client.flushall()
    assert pauses.restore() == [MODEL]
    assert client.smembers(keys.paused(MODEL)) == {b"batch:*"}
    assert pauses.restore() == []


def test_invariant_2_what_redis_has_too_much_goes_with_the_next_sweep(pauses, live):
    live.set_pauses({MODEL: {"*:*"}, "other": {"batch:t"}})
    assert pauses.restore() == [MODEL, "other"]


def test_invariant_3_a_pause_of_all_models_holds_for_new_ones(pauses, accounts, client):
    pauses.pause(model="*", job_class="*", tenant_id="tenant_a", by="ada")
    pauses.restore()
    assert client.smembers(keys.paused("other")) == {b"*:tenant_a"}
    (row,) = pauses.list()
    assert by_model(["new"], [row]) == {"new": {"*:tenant_a"}}


def test_a_repeated_pause_keeps_who_paused_first(pauses):
    for by in ("ada", "bob"):
        pauses.pause(model=MODEL, job_class="*", tenant_id="*", by=by)
    (row,) = pauses.list()
    assert (row["paused_by"], row["model"]) == ("ada", MODEL)


def test_resume_lifts_what_lies_within_and_nothing_wider(pauses):
    wide = {"model": MODEL, "job_class": "*", "tenant_id": "*"}
    narrow = {"model": MODEL, "job_class": "batch", "tenant_id": "tenant_a"}
    for queue in (wide, narrow):
        pauses.pause(**queue, by="ada")
    assert pauses.resume(**{**narrow, "tenant_id": "*"}) == 1
    assert pauses.resume(**narrow) == 0
    assert pauses.resume(**{**wide, "model": "other"}) == 0
    assert pauses.resume(**wide) == 1
    assert pauses.list() == []


def test_a_postgres_that_is_away_is_database_unavailable(live):
    away = Pauses(connect("postgresql+psycopg://u:p@127.0.0.1:1/none"), live)
    queue = {"model": "m", "job_class": "*", "tenant_id": "*"}
    for call in (
        away.list,
        away.restore,
        lambda: away.pause(**queue, by="x"),
        lambda: away.resume(**queue),
    ):
        with pytest.raises(DatabaseUnavailable):
            call()
