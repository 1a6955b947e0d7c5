"""Event streams: live, resumed, replayed, and through every kind of loss."""

import pytest

from headrace.contract import keys
from headrace.contract.tokens import TokenLog
from headrace.contract.wire import FinishReason, JobEnd, JobStatus, encode
from headrace.gateway.follower import MAX_MESSAGES
from headrace.tests.gateway.courier import MODEL, Courier, Held, chunk_of
from headrace.tests.gateway.reader import Reader, Seen, tokens_of


@pytest.fixture
def job(client, courier) -> str:
    """A queued job."""
    response = client.post("/v1/jobs", json={"model": MODEL, "prompt": "x"})
    return response.get_json()["id"]


def shard_of(services) -> str:
    return services.follower._shard


def names(events: list[Seen]) -> list[str]:
    return [event.name for event in events]


def test_a_live_stream_tells_the_whole_life(client, courier, job):
    with Reader(client, job) as reader:
        headers = reader.response.headers
        assert reader.response.status_code == 200
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Accel-Buffering"] == "no"
        assert reader.next() == Seen("queued", {"job": job}, None)
        held = courier.take()
        assert reader.next() == Seen("started", {"job": job, "attempt": 1, "worker": "w1"}, None)
        courier.say(held, 1)
        courier.say(held, 3, logprobs=True)
        courier.end(held)
        events = reader.rest()
    assert [e.data["count"] for e in events if e.name == "token"] == [1, 3]
    assert "logprobs" not in events[0].data
    assert len(events[1].data["logprobs"]) == 3
    assert tokens_of(events) == (held.ids, held.text)
    assert events[-1] == Seen(
        "succeeded",
        {
            "job": job,
            "status": "succeeded",
            "finish_reason": "stop",
            "usage": {
                "prompt_tokens": 5,
                "cached_tokens": 2,
                "completion_tokens": 4,
                "total_tokens": 9,
            },
            "error": None,
        },
        "3",
    )


def test_a_silent_stream_pings(client, courier, job):
    with Reader(client, job) as reader:
        reader.next()
        reader.wait_for_ping()


@pytest.mark.parametrize("how", ["after", "header"])
def test_a_stream_is_resumed_in_the_middle(client, courier, job, how):
    held = courier.take()
    courier.say(held, 2)
    courier.say(held, 2)
    with Reader(client, job, **{how: "0"}) as reader:
        events = reader.until("token")
        courier.say(held, 2)
        courier.end(held)
        events += reader.rest()
    ids, _ = tokens_of(events)
    assert ids == held.ids[1:]
    assert "reset" not in names(events)


def test_the_header_wins_over_the_query(client, courier, job):
    held = courier.take()
    courier.say(held, 3)
    courier.end(held)
    with Reader(client, job, after="-1", header="1") as reader:
        assert tokens_of(reader.rest())[0] == held.ids[2:]


def test_two_subscribers_see_the_same(client, courier, job):
    with Reader(client, job) as one, Reader(client, job) as two:
        assert one.next() == two.next()
        held = courier.take()
        for _ in range(5):
            courier.say(held, 2)
        courier.end(held)
        seen = one.rest()
        assert seen == two.rest()
    assert tokens_of(seen) == (held.ids, held.text)


@pytest.mark.parametrize("after", range(-1, 5))
def test_a_finished_job_replays_from_any_index(client, courier, job, after):
    held = courier.take()
    courier.say(held, 2)
    courier.say(held, 3)
    courier.end(held, JobStatus.FAILED, FinishReason.ERROR, error_code="c", error_text="t")
    with Reader(client, job, after=str(after)) as reader:
        events = reader.rest()
    assert tokens_of(events)[0] == held.ids[after + 1 :]
    assert events[-1].name == "failed"
    assert events[-1].id == "4"
    assert events[-1].data["error"] == {"code": "c", "detail": "t"}


def test_a_replay_needs_no_redis_record(client, services, courier, job):
    held = courier.take()
    courier.say(held, 300)
    courier.end(held)
    services.redis.flushall()
    with Reader(client, job) as reader:
        events = reader.rest()
    assert [e.data["count"] for e in events if e.name == "token"] == [256, 44]
    assert tokens_of(events) == (held.ids, held.text)


def test_a_lost_frame_is_filled_from_the_log(client, services, courier, job):
    with Reader(client, job) as reader:
        held = courier.take()
        courier.say(held, 1)
        events = reader.until("token")
        services.token_log.unsubscribe(shard_of(services), MODEL, job)
        courier.say(held, 4)  # published to nobody
        services.token_log.subscribe(shard_of(services), [(MODEL, job)])
        courier.say(held, 1)
        courier.end(held)
        events += reader.rest()
    assert tokens_of(events) == (held.ids, held.text)


def test_a_lost_start_is_told_from_the_row(client, services, courier, job):
    with Reader(client, job) as reader:
        reader.until("queued")
        services.token_log.unsubscribe(shard_of(services), MODEL, job)
        held = courier.take()
        courier.say(held, 2)
        events = reader.until("token")
        courier.end(held)
        reader.rest()
    assert names(events) == ["started", "token"]


def test_a_lost_end_is_found_after_a_silence(client, services, courier, job):
    with Reader(client, job) as reader:
        held = courier.take()
        reader.until("started")
        services.token_log.unsubscribe(shard_of(services), MODEL, job)
        courier.say(held, 2)
        courier.end(held)
        events = reader.rest()
    assert tokens_of(events) == (held.ids, held.text)


@pytest.mark.parametrize("is_wiped", [True, False])
def test_an_end_that_redis_never_heard_of_is_found_in_postgres(
    client, services, courier, job, monkeypatch, is_wiped
):
    with Reader(client, job) as reader:
        held = courier.take()
        courier.say(held, 2)
        reader.until("token")
        if is_wiped:
            services.redis.flushall()
        with monkeypatch.context() as patch:  # the courier dies after its commit
            patch.setattr(type(courier.token_log), "end", lambda *_: None)
            courier.end(held)
        events = reader.rest()
    assert names(events) == ["succeeded"]


def test_a_killed_connection_loses_nothing(client, services, courier, job):
    with Reader(client, job) as reader:
        held = courier.take()
        courier.say(held, 1)
        events = reader.until("token")
        assert services.redis.client_kill_filter(_type="pubsub") >= 1
        for _ in range(5):
            courier.say(held, 2)
        courier.end(held)
        events += reader.rest()
    assert tokens_of(events) == (held.ids, held.text)


def reads_of(services, monkeypatch) -> list[int]:
    """Return a list that each read of a log adds its first record to."""
    begins: list[int] = []
    read = TokenLog.read

    def noting(self, model, job, begin=0, count=0):
        begins.append(begin)
        return read(self, model, job, begin, count)

    monkeypatch.setattr(TokenLog, "read", noting)
    return begins


def test_a_gap_is_filled_without_reading_the_log_again(client, services, courier, job, monkeypatch):
    with Reader(client, job) as reader:
        held = courier.take()
        for _ in range(5):
            courier.say(held, 1)
        events = [event for _ in range(5) for event in reader.until("token")]
        begins = reads_of(services, monkeypatch)
        services.token_log.unsubscribe(shard_of(services), MODEL, job)
        courier.say(held, 2)  # published to nobody
        courier.say(held, 3)
        assert services.redis.client_kill_filter(_type="pubsub") >= 1
        while sum(e.data["count"] for e in events if e.name == "token") < len(held.ids):
            events += reader.until("token")
        courier.end(held)
        events += reader.rest()
    assert tokens_of(events) == (held.ids, held.text)
    # A silence on a busy machine may make it look too, but never from the log's beginning.
    assert 0 not in begins


def test_a_silent_gap_is_read_on_from_the_last_record(client, services, courier, job, monkeypatch):
    with Reader(client, job) as reader:
        held = courier.take()
        for _ in range(4):
            courier.say(held, 1)
        events = [event for _ in range(4) for event in reader.until("token")]
        begins = reads_of(services, monkeypatch)
        services.token_log.unsubscribe(shard_of(services), MODEL, job)
        courier.say(held, 2)
        courier.end(held)
        events += reader.rest()
    assert tokens_of(events) == (held.ids, held.text)
    assert begins == [3]


def test_a_log_that_was_put_back_in_other_pieces_is_read_whole(
    client, services, courier, job, monkeypatch
):
    with Reader(client, job) as reader:
        held = courier.take()
        for _ in range(4):
            courier.say(held, 1)
        events = [event for _ in range(4) for event in reader.until("token")]
        begins = reads_of(services, monkeypatch)
        services.token_log.unsubscribe(shard_of(services), MODEL, job)
        courier.say(held, 2)
        whole = chunk_of(job, 0, 6, attempt=held.attempt, gen=held.gen)
        key = keys.token_log(MODEL, job)
        services.redis.delete(key)
        services.redis.rpush(key, encode(whole))  # as RESTORE does after a loss of Redis
        courier.end(held)
        events += reader.rest()
    assert tokens_of(events) == (held.ids, held.text)
    assert "reset" not in names(events)
    assert begins == [3, 0]


def test_a_start_that_was_lost_is_told_before_its_tokens(client, services, courier, job):
    with Reader(client, job) as reader:
        reader.until("queued")
        services.token_log.unsubscribe(shard_of(services), MODEL, job)
        held = courier.take()
        services.token_log.subscribe(shard_of(services), [(MODEL, job)])
        courier.say(held, 2)
        events = reader.until("token")
        courier.end(held)
        events += reader.rest()
    assert names(events) == ["started", "token", "succeeded"]


def test_a_slow_subscriber_costs_no_memory_and_misses_nothing(client, services, courier, job):
    with Reader(client, job) as slow, Reader(client, job) as quick:
        held = courier.take()
        quick.until("started")
        for _ in range(MAX_MESSAGES + 50):
            courier.say(held, 1)
            quick.until("token")
        boxes = services.follower._boxes[job]
        assert max(box._messages.qsize() for box in boxes) <= MAX_MESSAGES
        courier.end(held)
        assert tokens_of(slow.rest()) == (held.ids, held.text)


def test_a_lost_log_is_announced_by_a_reset(client, services, courier, job):
    with Reader(client, job) as reader:
        held = courier.take()
        courier.say(held, 3)
        before = reader.until("token")
        assert before[-1].id == "2"
        services.redis.flushall()
        again = take_again(courier, services, job)
        assert again.gen == 1
        courier.say(again, 2)
        courier.end(again)
        events = reader.rest()
    assert "reset" in names(events)
    assert tokens_of(events) == (again.ids, again.text)
    assert events[-1].id == "1.1"
    with Reader(client, job, header="2") as reader:  # of the lost log
        resumed = reader.rest()
        assert names(resumed)[0] == "reset"
        assert tokens_of(resumed) == (again.ids, again.text)
    with Reader(client, job, header="0.1") as reader:
        assert tokens_of(reader.rest())[0] == again.ids[1:]


def test_a_takeover_goes_on_at_the_next_index(client, services, courier, job):
    with Reader(client, job) as reader:
        reader.until("queued")
        held = courier.take()
        courier.say(held, 3)
        other = Courier(services.ledger, services.streams, services.token_log, name="w2")
        again = other.take(lease_ms=0)
        assert (again.attempt, again.ids) == (2, held.ids)
        other.say(again, 2)
        other.end(again)
        events = reader.rest()
    assert tokens_of(events) == (again.ids, again.text)
    assert [e.data for e in events if e.name == "started"][-1]["worker"] == "w2"
    assert "reset" not in names(events)


def test_a_claim_beyond_a_running_log_is_reset(client, courier, job):
    held = courier.take()
    courier.say(held, 2)
    with Reader(client, job, header="7") as reader:
        events = reader.until("token")
        courier.end(held)
        events += reader.rest()
    assert "reset" in names(events)
    assert tokens_of(events) == (held.ids, held.text)


def test_a_job_canceled_in_the_queue_ends_its_streams(client, courier, job):
    with Reader(client, job) as reader:
        reader.next()
        client.post(f"/v1/jobs/{job}/cancel")
        events = reader.rest()
    assert names(events) == ["canceled"]
    assert events[0].data["usage"]["completion_tokens"] == 0
    with Reader(client, job) as reader:
        assert names(reader.rest()) == ["canceled"]


def test_what_was_handed_back_is_canceled_with_its_tokens(client, services, courier, job):
    with Reader(client, job) as reader:
        held = courier.take()
        courier.say(held, 2)
        events = reader.until("token")
        services.ledger.hand_back(job, held.attempt)
        services.streams.hand_back(MODEL, job, held.attempt)
        assert client.post(f"/v1/jobs/{job}/cancel").status_code == 202
        again = courier.take()
        courier.end(again, JobStatus.CANCELED, FinishReason.CANCELED)
        events += reader.rest()
    assert tokens_of(events) == (held.ids, held.text)
    assert "reset" not in names(events)
    assert events[-1].name == "canceled"
    shown = client.get(f"/v1/jobs/{job}").get_json()
    assert shown["output"]["text"] == held.text


def test_invariant_10_looking_away_is_not_cancelling(client, services, courier, job):
    held = courier.take()
    with Reader(client, job) as reader:
        courier.say(held, 1)
        reader.until("token")
    assert job not in services.follower._boxes
    assert services.streams.renew(MODEL, "w1", [(job, held.attempt)]) == ["held"]
    courier.say(held, 1)
    courier.end(held)
    assert client.get(f"/v1/jobs/{job}").get_json()["status"] == "succeeded"


def test_a_head_request_follows_nothing(client, services, job):
    response = client.head(f"/v1/jobs/{job}/events")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert job not in services.follower._boxes


def test_ids_that_cannot_be_are_refused(client, courier, job):
    def code(event_id: str) -> str | None:
        response = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": event_id})
        response.close()
        return response.get_json()["code"] if response.status_code == 400 else None

    assert code("nonsense") == "invalid_event_id"
    assert code("256") == "invalid_event_id"  # max_tokens: indexes end at 255
    held = courier.take()
    courier.say(held, 2)
    courier.end(held)
    assert code("2") == "invalid_event_id"
    assert code("2.0") == "invalid_event_id"
    assert code("1") is None


def test_a_stale_end_is_ignored_by_other_jobs(client, services, courier, job):
    other = client.post("/v1/jobs", json={"model": MODEL, "prompt": "y"}).get_json()["id"]
    with Reader(client, other) as reader:
        reader.next()
        end = JobEnd(
            job=job,
            gen=0,
            next=0,
            status=JobStatus.CANCELED,
            finish_reason=None,
            prompt_tokens=0,
            cached_tokens=0,
        )
        services.token_log.end(MODEL, [end])
        reader.wait_for_ping()


def take_again(courier: Courier, services, job: str) -> Held:
    """Enqueue a job that Redis lost, as the sweeper does, and take it."""
    from headrace.contract.specs import spec_of

    row = services.ledger.job(job)
    assert row is not None
    services.streams.enqueue(spec_of(row), row["cost_tokens"])
    return courier.take()
