"""A full queue refuses at once, says when to come back, and forgets no accepted job."""

import threading
from collections.abc import Iterator

import pytest
from flask import Flask
from flask.testing import FlaskClient

from headrace.contract import keys
from headrace.contract.accounts import NewKey
from headrace.contract.errors import QueueFull, QueueUnavailable
from headrace.contract.settings import GatewaySettings
from headrace.contract.waiting import Load, Waiting
from headrace.gateway import admission, queue_depths
from headrace.gateway.app import create_app, services_of
from headrace.gateway.dashboard.playground import Playground
from headrace.gateway.metrics import Metrics
from headrace.gateway.queue_depths import QueueDepths
from headrace.gateway.schemas import JobRequest
from headrace.gateway.services import Services
from headrace.tests.gateway.conftest import client_of
from headrace.tests.gateway.courier import MODEL, Courier
from headrace.tests.gateway.test_bad_input import check_problem

#: Of a job as `post` sends it: the prompt's estimate and max_tokens.
JOB_TOKENS = 2 + 10


@pytest.fixture
def limited(settings: GatewaySettings, app: Flask, courier: Courier) -> Iterator[Flask]:
    """An app that lets ten jobs wait, on the stores and the model of `app`."""
    made = create_app(
        GatewaySettings.model_validate(
            dict(settings) | {"max_queued_jobs": 10, "max_queued_tokens": 0}
        )
    )
    services_of(made).cards.all()  # as after the first request
    yield made
    services_of(made).close()


@pytest.fixture
def narrow(limited: Flask, key: NewKey) -> FlaskClient:
    return client_of(limited, key)


def post(client: FlaskClient, headers: dict[str, str] | None = None, **fields: object):
    body = {"model": MODEL, "prompt": "once", "sampling": {"max_tokens": 10}} | fields
    return client.post("/v1/jobs", json=body, headers=headers)


def limit(app: Flask, **limits: int) -> None:
    for name, value in limits.items():
        setattr(services_of(app).admission, name, value)


def fill(client: FlaskClient, count: int, **fields: object) -> None:
    assert [post(client, **fields).status_code for _ in range(count)] == [202] * count


def refused(response, code: str = "queue_full") -> dict:
    problem = check_problem(response, 429, code)
    assert problem["retryable"] is True
    assert 1 <= int(response.headers["Retry-After"]) <= admission.MAX_RETRY_S
    return problem


def test_a_full_queue_refuses_until_workers_take_from_it(narrow, limited, courier):
    fill(narrow, 10)
    problem = refused(post(narrow))
    assert "10 jobs wait" in problem["detail"]
    courier.take()
    services_of(limited).admission._depths.read()
    assert post(narrow).status_code == 202


def test_invariant_1_a_refusal_touches_neither_postgres_nor_a_tokenizer(
    narrow, limited, monkeypatch
):
    fill(narrow, 10)

    def touched(*_: object, **__: object):
        raise AssertionError("a refusal must cost nothing")

    services = services_of(limited)
    monkeypatch.setattr(type(services.prompts), "prompt_tokens", touched)
    monkeypatch.setattr(type(services.ledger), "accept_job", touched)
    monkeypatch.setattr(type(services.engine), "connect", touched)
    refused(post(narrow))
    refused(post(narrow, prompt="x" * 5000))


def test_batch_is_refused_first_and_interactive_still_gets_in(narrow):
    fill(narrow, 8, **{"class": "batch"})
    assert "may fill 8" in refused(post(narrow, **{"class": "batch"}))["detail"]
    fill(narrow, 2)
    refused(post(narrow))


def test_tokens_are_limited_by_what_they_may_cost(narrow, limited):
    limit(limited, _max_jobs=0, _max_tokens=3 * JOB_TOKENS)
    fill(narrow, 3)
    detail = refused(post(narrow))["detail"]
    assert f"may cost {JOB_TOKENS} tokens" in detail
    assert "max_queued_tokens" in detail


def test_one_job_larger_than_the_limit_may_wait_alone(narrow, limited):
    limit(limited, _max_jobs=0, _max_tokens=5)
    fill(narrow, 1)
    refused(post(narrow))


def test_a_tenant_has_a_cap_of_its_own(narrow, limited, services):
    limit(limited, _max_tenant_jobs=2)
    fill(narrow, 2)
    refused(post(narrow), "tenant_queue_full")
    other = services.accounts.create_key(tenant="patient", name="test")
    fill(client_of(limited, other), 2)


def test_no_limit_is_no_limit(narrow, limited):
    limit(limited, _max_jobs=0)
    fill(narrow, 15)


def test_a_repeat_of_an_accepted_request_gets_its_answer_all_the_same(narrow):
    first = post(narrow, {"Idempotency-Key": "known"})
    fill(narrow, 9)
    refused(post(narrow, {"Idempotency-Key": "new"}))
    again = post(narrow, {"Idempotency-Key": "known"})
    assert again.status_code == 202
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.get_json()["id"] == first.get_json()["id"]
    other = post(narrow, {"Idempotency-Key": "known"}, prompt="twice")
    check_problem(other, 422, "idempotency_mismatch")


def test_what_another_gateway_let_in_is_seen(narrow, client):
    fill(client, 10)  # `app` has wide limits, and the same Redis
    refused(post(narrow))


def test_a_burst_between_two_reads_is_seen(narrow, monkeypatch):
    monkeypatch.setattr(queue_depths, "READ_EVERY_S", 3600.0)
    fill(narrow, 10)
    refused(post(narrow))


def test_many_at_once_overfill_by_no_more_than_what_is_on_its_way(limited, key):
    barrier = threading.Barrier(8)
    statuses: list[int] = []

    def send() -> None:
        client = client_of(limited, key)
        barrier.wait(20)
        statuses.extend(post(client).status_code for _ in range(4))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {202, 429}
    assert 10 <= statuses.count(202) <= 10 + len(threads)


def test_a_request_that_fails_leaves_no_place_taken(narrow, limited):
    for _ in range(12):
        biased = post(narrow, sampling={"logit_bias": {"5000": 1}})
        check_problem(biased, 422, "token_out_of_vocabulary")
    fill(narrow, 10)


def test_refusals_are_counted_by_reason(narrow, limited):
    fill(narrow, 10)
    unseen = (
        f'headrace_jobs_refused_total{{job_class="interactive",model="{MODEL}",reason="unseen"}}'
    )
    assert f"{unseen} 0.0" in narrow.get("/metrics").get_data(as_text=True)
    refused(post(narrow))
    series = f'headrace_jobs_refused_total{{job_class="interactive",model="{MODEL}",reason="jobs"}}'
    assert f"{series} 1.0" in narrow.get("/metrics").get_data(as_text=True)


def test_names_that_are_no_model_are_not_remembered(narrow, limited):
    for n in range(5):
        check_problem(post(narrow, model=f"no-such-{n}"), 422, "unknown_model")
    assert services_of(limited).admission._depths._queues.keys() <= {MODEL}


def test_the_playground_goes_the_same_way(limited, services: Services):
    limit(limited, _max_jobs=1)
    playground = Playground(services_of(limited))
    body = {"model": MODEL, "prompt": "x"}
    playground.run(body)
    with pytest.raises(QueueFull):
        playground.run(body)


# -- depths, with a Redis that says what the test wants ---------------------------------------


class Told:
    """What Redis answers, or that it is away."""

    def __init__(self) -> None:
        self.answer: Waiting | None = Waiting()
        self.num_reads = 0

    def waiting(self, models: list[str]) -> dict[str, Waiting]:
        self.num_reads += 1
        if self.answer is None:
            raise QueueUnavailable("away")
        return dict.fromkeys(models, self.answer)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(queue_depths.time, "monotonic", lambda: now[0])
    return now


def waits(num_jobs: int, num_accepted: int) -> Waiting:
    return Waiting({("interactive", "t"): Load(num_jobs, num_jobs)}, num_accepted)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def depths(told, clock) -> QueueDepths:
    return QueueDepths(told, lambda: [MODEL])  # type: ignore[arg-type]


def test_invariant_1_a_place_counts_until_a_read_that_began_after_it_was_settled(depths, clock):
    assert depths.of(MODEL, "t") == (Load(), Load())
    place = depths.take(MODEL, "t", Load(1, 5))
    clock[0] += 1
    assert depths.of(MODEL, "t") == (Load(1, 5), Load(1, 5)), "it is on its way"
    depths.settle(place, is_accepted=True)
    assert depths.of(MODEL, "t")[0] == Load(1, 5)
    clock[0] += 1
    assert depths.of(MODEL, "t")[0] == Load(), "Redis shows it from here on"


def test_a_place_that_was_not_used_is_given_back(depths):
    depths.of(MODEL, "t")
    depths.settle(depths.take(MODEL, "t", Load(1, 5)), is_accepted=False)
    assert depths.of(MODEL, "t")[0] == Load()
    assert depths.num_unseen == 0


def test_invariant_2_one_request_a_second_asks_a_redis_that_is_away(depths, told, clock):
    told.answer = waits(4, 4)
    depths.of(MODEL, "t")
    told.answer = None
    clock[0] += 1
    for _ in range(5):
        assert depths.of(MODEL, "t")[0] == Load(4, 4), "the last known depth stands"
        clock[0] += 0.1
    assert told.num_reads == 2
    depths.settle(depths.take(MODEL, "t", Load(1, 1)), is_accepted=True)
    assert depths.is_away
    clock[0] += queue_depths.RETRY_S
    assert depths.of(MODEL, "t")[0] == Load(5, 5), "and what was accepted since adds to it"
    assert told.num_reads == 3


def test_the_rate_is_of_what_left_the_queue_and_begins_anew_with_redis(depths, told, clock):
    told.answer = waits(100, 100)
    depths.read()
    assert depths.jobs_per_s(MODEL) is None
    clock[0] += 2
    told.answer = waits(90, 110)
    depths.read()
    assert depths.jobs_per_s(MODEL) == 10
    clock[0] += 1
    told.answer = waits(3, 3)  # Redis was emptied and the relay put three back
    depths.read()
    assert depths.jobs_per_s(MODEL) is None


@pytest.mark.parametrize(
    ("drained", "retry_s"), [(0, admission.MAX_RETRY_S), (20, 1), (4, 5), (1, 20)]
)
def test_invariant_2_retry_after_follows_the_drain(told, clock, settings, drained, retry_s):
    limits = GatewaySettings.model_validate(dict(settings) | {"max_queued_jobs": 100})
    depths = QueueDepths(told, lambda: [MODEL])  # type: ignore[arg-type]
    entrance = admission.Admission(depths, limits, Metrics())
    told.answer = waits(200 + drained, 300)
    depths.read()
    clock[0] += 1
    told.answer = waits(200, 300)
    depths.read()
    with (
        pytest.raises(QueueFull) as error,
        entrance.place(JobRequest(model=MODEL, prompt="x"), "t"),
    ):
        pass
    assert error.value.retry_after_s == retry_s


def test_invariant_3_a_bounded_number_is_accepted_unseen(told, clock, settings, monkeypatch):
    monkeypatch.setattr(admission, "MAX_UNSEEN", 3)
    told.answer = None
    unlimited = {"max_queued_jobs": 0, "max_queued_tokens": 0}
    limits = GatewaySettings.model_validate(dict(settings) | unlimited)
    entrance = admission.Admission(
        QueueDepths(told, lambda: [MODEL]),  # type: ignore[arg-type]
        limits,
        Metrics(),
    )
    asked = JobRequest(model=MODEL, prompt="x")
    for _ in range(3):
        with entrance.place(asked, "t") as place:
            place.is_accepted = True
    with pytest.raises(QueueUnavailable, match="3 jobs"), entrance.place(asked, "t"):
        pass
    told.answer = Waiting()
    clock[0] += queue_depths.RETRY_S
    with entrance.place(asked, "t"):
        pass


def test_the_hash_is_where_the_glossary_says(narrow, services):
    fill(narrow, 1)
    assert services.redis.hlen(keys.waiting(MODEL)) == 2
