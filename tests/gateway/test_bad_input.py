"""What bad input gets: its own 4xx with a stable code, never a 500, and nothing quoted back."""

import json
import re

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from headrace.contract.errors import all_errors
from headrace.contract.roles import Role
from headrace.gateway import answers
from headrace.gateway.problems import MIMETYPE
from headrace.gateway.routes import route_table
from headrace.tests.gateway.conftest import card, client_of
from headrace.tests.gateway.courier import MODEL

GOOD = {"model": MODEL, "prompt": "x"}
SECRET = "a-secret-of-the-user"


def check_problem(response, status: int, code: str) -> dict:
    """Check the form that every error has, and return it."""
    assert response.mimetype == MIMETYPE
    problem = response.get_json()
    answers.Problem.model_validate(problem)
    assert (response.status_code, problem["code"]) == (status, code), problem["detail"]
    assert problem["status"] == status
    assert problem["type"] == f"urn:headrace:problem:{code}"
    assert code in {error.code for error in all_errors()}
    assert SECRET not in response.get_data(as_text=True)
    return problem


def post_bytes(client: FlaskClient, body: bytes, **headers: str):
    return client.post(
        "/v1/jobs", data=body, headers={"Content-Type": "application/json", **headers}
    )


def sampling(**fields: object) -> dict:
    return {**GOOD, "sampling": fields}


@pytest.mark.parametrize(
    ("body", "status", "code", "part"),
    [
        ({"prompt": "x"}, 400, "missing_field", "model is required"),
        ({"model": MODEL}, 400, "prompt_choice", "found none"),
        (GOOD | {"prompt_token_ids": [1]}, 400, "prompt_choice", "prompt and prompt_token_ids"),
        (
            GOOD | {"messages": [{"role": "user", "content": "x"}]},
            400,
            "prompt_choice",
            "prompt and messages",
        ),
        (GOOD | {"model": "gpt-9"}, 422, "unknown_model", "there is tiny"),
        (GOOD | {"model": ""}, 400, "out_of_range", "model"),
        (GOOD | {"model": 7}, 400, "wrong_type", "found 7"),
        (GOOD | {"model": "m" * 201}, 400, "out_of_range", "model"),
        (GOOD | {"promt": SECRET}, 400, "unknown_field", "promt is not a field"),
        (GOOD | {"job_class": "batch"}, 400, "unknown_field", "job_class"),
        (GOOD | {"class": "urgent"}, 400, "out_of_range", "'urgent'"),
        (GOOD | {"priority": 1}, 400, "out_of_range", "priority"),
        (GOOD | {"deadline_s": 0}, 400, "out_of_range", "deadline_s"),
        (GOOD | {"deadline_s": -1.5}, 400, "out_of_range", "found -1.5"),
        (GOOD | {"deadline_s": 1e300}, 400, "out_of_range", "deadline_s"),
        (GOOD | {"deadline_s": "60"}, 400, "wrong_type", "found '60'"),
        (GOOD | {"metadata": {"k": 1}}, 400, "wrong_type", "metadata.k"),
        (GOOD | {"metadata": {"k" * 65: "v"}}, 400, "out_of_range", "metadata"),
        (GOOD | {"metadata": {"k": SECRET * 100}}, 400, "out_of_range", "text of 2000"),
        (GOOD | {"metadata": {str(n): "" for n in range(17)}}, 400, "out_of_range", "metadata"),
        (GOOD | {"metadata": [SECRET]}, 400, "wrong_type", "list of 1"),
        ({"model": MODEL, "prompt": [SECRET]}, 400, "wrong_type", "prompt"),
        ({"model": MODEL, "prompt_token_ids": [1.0]}, 400, "wrong_type", "prompt_token_ids[0]"),
        ({"model": MODEL, "prompt_token_ids": [True]}, 400, "wrong_type", "found true"),
        ({"model": MODEL, "prompt_token_ids": []}, 400, "out_of_range", "prompt_token_ids"),
        ({"model": MODEL, "prompt_token_ids": [1000]}, 422, "token_out_of_vocabulary", "999"),
        ({"model": MODEL, "prompt_token_ids": [5, -1]}, 422, "token_out_of_vocabulary", "-1"),
        ({"model": MODEL, "messages": []}, 400, "out_of_range", "messages"),
        ({"model": MODEL, "messages": [SECRET]}, 400, "wrong_type", "messages[0]"),
        (
            {"model": MODEL, "messages": [{"role": "boss", "content": SECRET}]},
            400,
            "out_of_range",
            "messages[0].role",
        ),
        (
            {"model": MODEL, "messages": [{"role": "user"}]},
            400,
            "missing_field",
            "messages[0].content",
        ),
        (
            {"model": MODEL, "prompt_token_ids": [1] * 800},
            422,
            "prompt_too_long",
            "800 tokens and max_tokens is 256; tiny holds 1,024",
        ),
        (sampling(max_tokens=0), 400, "out_of_range", "sampling.max_tokens"),
        (sampling(max_tokens=1 << 21), 400, "out_of_range", "found 2097152"),
        (sampling(max_tokens=10**80), 400, "out_of_range", "bits"),
        (sampling(max_tokens="5"), 400, "wrong_type", "found '5'"),
        (sampling(max_tokens=5.5), 400, "wrong_type", "found 5.5"),
        (sampling(max_tokens=True), 400, "wrong_type", "found true"),
        (sampling(temperature=-0.1), 400, "out_of_range", "found -0.1"),
        (sampling(temperature=2.1), 400, "out_of_range", "sampling.temperature"),
        (sampling(temperature="hot"), 400, "wrong_type", "'hot'"),
        (sampling(temperature=10**400), 400, "wrong_type", "bits"),
        (sampling(top_p=0), 400, "out_of_range", "sampling.top_p"),
        (sampling(top_p=1.01), 400, "out_of_range", "sampling.top_p"),
        (sampling(top_k=-1), 400, "out_of_range", "sampling.top_k"),
        (sampling(min_p=2), 400, "out_of_range", "sampling.min_p"),
        (sampling(seed=-1), 400, "out_of_range", "sampling.seed"),
        (sampling(seed=1 << 63), 400, "out_of_range", "sampling.seed"),
        (sampling(stop=""), 400, "out_of_range", "sampling.stop[0]"),
        (sampling(stop=[SECRET * 20]), 400, "out_of_range", "text of 400 characters"),
        (sampling(stop=["x"] * 17), 400, "out_of_range", "sampling.stop"),
        (sampling(stop=7), 400, "wrong_type", "sampling.stop"),
        (sampling(presence_penalty=-2.1), 400, "out_of_range", "presence_penalty"),
        (sampling(frequency_penalty=3), 400, "out_of_range", "frequency_penalty"),
        (sampling(repetition_penalty=0), 400, "out_of_range", "repetition_penalty"),
        (sampling(logit_bias={"x": 1}), 400, "wrong_type", "'x'"),
        (sampling(logit_bias={"01": 1}), 400, "wrong_type", "'01'"),
        (sampling(logit_bias={"1": 101}), 400, "out_of_range", "logit_bias"),
        (sampling(logit_bias={"1": None}), 400, "wrong_type", "logit_bias"),
        (sampling(logit_bias={"1000": 1}), 422, "token_out_of_vocabulary", "1000"),
        (
            sampling(logit_bias={str(n): 0 for n in range(301)}),
            400,
            "out_of_range",
            "sampling.logit_bias",
        ),
        (sampling(logprobs=21), 400, "out_of_range", "sampling.logprobs"),
        (sampling(logprobs=True), 400, "wrong_type", "sampling.logprobs"),
        (sampling(n=2), 400, "unknown_field", "sampling.n is not a field"),
        (GOOD | {"sampling": []}, 400, "wrong_type", "sampling"),
        (GOOD | {"sampling": None}, 400, "wrong_type", "sampling"),
        ([GOOD], 400, "wrong_type", "list of 1"),
        ("text", 400, "wrong_type", "text of 4"),
        (None, 400, "wrong_type", "null"),
        ({"model": MODEL, "prompt": "a\x00b"}, 400, "invalid_text", "prompt holds a NUL"),
        ({"model": MODEL, "prompt": "\ud800"}, 400, "invalid_text", "lone surrogate"),
        (GOOD | {"metadata": {"\x00": "v"}}, 400, "invalid_text", "a key of metadata"),
        (sampling(stop=["a\x00"]), 400, "invalid_text", "sampling.stop[0]"),
        (
            {"model": MODEL, "messages": [{"role": "user", "content": "\udfff"}]},
            400,
            "invalid_text",
            "messages[0].content",
        ),
    ],
)
def test_a_bad_field_is_named(client, body, status, code, part):
    problem = check_problem(post_bytes(client, json.dumps(body).encode()), status, code)
    assert part in problem["detail"]
    assert problem["retryable"] is False


@pytest.mark.parametrize(
    ("body", "status", "code", "part"),
    [
        (b"", 400, "invalid_json", "line 1"),
        (b"{", 400, "invalid_json", "line 1"),
        (b"{'model': 1}", 400, "invalid_json", "line 1"),
        (b'{"model": "tiny", "prompt": "x"} x', 400, "invalid_json", "Extra data"),
        (b'\xef\xbb\xbf{"model": "tiny"}', 400, "invalid_json", ""),
        (b'{"model": "tiny", "model": "tiny"}', 400, "invalid_json", "'model' stands twice"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "invalid_text", "byte 29"),
        (b'{"model": "tiny", "prompt": "\xed\xa0\x80"}', 400, "invalid_text", "UTF-8"),
        (b'{"model": "tiny", "prompt": "\x00"}', 400, "invalid_text", "NUL"),
        (b'{"prompt": "\x01"}', 400, "invalid_json", "control character"),
        (b'{"sampling": {"temperature": NaN}}', 400, "invalid_json", "NaN"),
        (b'{"sampling": {"temperature": -Infinity}}', 400, "invalid_json", "-Infinity"),
        (b'{"sampling": {"temperature": 1e999}}', 400, "out_of_range", "1e999"),
        (b'{"sampling": {"seed": ' + b"9" * 5000 + b"}}", 400, "out_of_range", "thousands"),
        (b"[" * 30_000 + b"]" * 30_000, 400, "invalid_json", "deeper than 32"),
        (b'{"a":' * 10_000, 400, "invalid_json", "deeper than 32"),
        (b'{"a": "' + b"[" * 50_000, 400, "invalid_json", "Unterminated"),
    ],
)
def test_a_bad_body_says_what_is_wrong_with_it(client, body, status, code, part):
    assert part in check_problem(post_bytes(client, body), status, code)["detail"]


def test_nesting_of_1e5_levels_is_refused(app, client):
    from headrace.gateway.body import parse_json_object

    with pytest.raises(Exception, match="deeper than 32"):
        parse_json_object(b"[" * 100_000 + b"]" * 100_000, 32)


def test_brackets_in_texts_do_not_count_as_depth(client):
    body = json.dumps({"model": MODEL, "prompt": '[{"' * 200}).encode()
    assert post_bytes(client, body).status_code == 202


def test_a_body_over_the_limit_is_refused(client):
    for body in (b" " * 70_000, b'{"prompt": "' + b"x" * 70_000):
        problem = check_problem(post_bytes(client, body), 413, "body_too_large")
        assert "65,536" in problem["detail"]


@pytest.mark.parametrize(
    ("content_type", "part"),
    [("text/plain", "text/plain"), ("", "none"), ("application/x-www-form-urlencoded", "form")],
)
def test_another_content_type_is_refused(client, content_type, part):
    response = client.post(
        "/v1/jobs", data=json.dumps(GOOD), headers={"Content-Type": content_type}
    )
    assert part in check_problem(response, 415, "unsupported_media_type")["detail"]


def test_a_compressed_body_is_refused(client):
    response = post_bytes(client, b"xx", **{"Content-Encoding": "gzip"})
    check_problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize("header", ["", "k" * 256, "with blank", "ümlaut"])
def test_a_bad_idempotency_key_is_refused(client, header):
    response = post_bytes(client, json.dumps(GOOD).encode(), **{"Idempotency-Key": header})
    check_problem(response, 400, "invalid_header")


@pytest.mark.parametrize("wait", ["wait=x", "wait=-1", "wait=1.5", "wait", "a, wait=", "wait=1e3"])
def test_a_bad_wait_is_refused(client, wait):
    response = post_bytes(client, json.dumps(GOOD).encode(), Prefer=wait)
    check_problem(response, 400, "invalid_header")


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "out_of_range"),
        ("limit=101", "out_of_range"),
        ("limit=x", "wrong_type"),
        ("limit=1.5", "wrong_type"),
        ("limit=1&limit=2", "out_of_range"),
        ("status=done", "out_of_range"),
        ("status=queued,", "out_of_range"),
        ("class=fast", "out_of_range"),
        ("model=%00", "invalid_text"),
        ("%00=1", "invalid_text"),
        ("colour=red", "unknown_field"),
        ("cursor=x", "invalid_cursor"),
        ("cursor=%F0%9F%98%80", "invalid_cursor"),
        ("cursor=am9iXzEyMw", "invalid_cursor"),
    ],
)
def test_a_bad_query_is_refused(client, query, code):
    check_problem(client.get(f"/v1/jobs?{query}"), 400, code)


def test_a_bad_event_query_is_refused(client, courier):
    job = post_bytes(client, json.dumps(GOOD).encode()).get_json()["id"]
    check_problem(client.get(f"/v1/jobs/{job}/events?starting_after=x"), 400, "invalid_event_id")
    check_problem(client.get(f"/v1/jobs/{job}/events?after=1"), 400, "unknown_field")


def test_paths_and_methods_that_are_not_there(client):
    check_problem(client.get("/v2/jobs"), 404, "not_found")
    response = client.put("/v1/jobs", json={})
    check_problem(response, 405, "method_not_allowed")
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


def test_no_operation_fails_at_a_hostile_name_in_its_path(app, services):
    """With every right there is, so that the name reaches what it can reach."""
    client = client_of(app, services.accounts.create_key(tenant="a", name="x", role=Role.ADMIN))
    names = ("%00", "a%00b", "%ED%A0%80", "%FF%FE", "%F0%9F%98%80", "'--", "%25", "x" * 3000, "%0A")
    for op in route_table(services):
        if "<" not in op.path or op.path.endswith("/events"):
            continue
        for name in names:
            path = re.sub("<[^>]+>", name, op.path)
            response = client.open(path, method=op.method, json={} if op.body else None)
            assert 200 <= response.status_code < 500, (op.name, name)
            if "%00" in name and not op.is_page:
                check_problem(response, 404, "not_found")
            response.close()


def test_a_prompt_is_counted_with_the_models_tokenizer(client, services, smollm2_folder):
    services.accounts.register_model(
        card(name="small", folder=str(smollm2_folder), max_seq_tokens=64, vocab_size=49152)
    )

    def send(prompt: str, max_tokens: int):
        body = {"model": "small", "prompt": prompt, "sampling": {"max_tokens": max_tokens}}
        return post_bytes(client, json.dumps(body).encode())

    assert send("one two three", 61).status_code == 202  # 3 tokens
    problem = check_problem(send("one two three", 62), 422, "prompt_too_long")
    assert "prompt has 3 tokens and max_tokens is 62; small holds 64" in problem["detail"]
    assert "0 tokens" in check_problem(send("", 5), 400, "out_of_range")["detail"]
    messages = {"model": "small", "messages": [{"role": "user", "content": "hi " * 60}]}
    problem = check_problem(
        post_bytes(client, json.dumps(messages).encode()), 422, "prompt_too_long"
    )
    assert "small" in problem["detail"]


def test_messages_without_a_chat_template_are_refused(client, services):
    services.accounts.register_model(card(name="bare", has_chat_template=False))
    body = {"model": "bare", "messages": [{"role": "user", "content": SECRET}]}
    check_problem(post_bytes(client, json.dumps(body).encode()), 422, "chat_template_refused")


def test_an_unforeseen_error_tells_nothing(client, services, monkeypatch, caplog):
    def fail(*_: object, **__: object):
        raise RuntimeError(SECRET)

    monkeypatch.setattr(type(services.ledger), "accept_job", fail)
    problem = check_problem(post_bytes(client, json.dumps(GOOD).encode()), 500, "internal")
    assert "RuntimeError" not in problem["detail"]
    assert SECRET not in caplog.text
    assert "RuntimeError" in caplog.text
    assert "in create" in caplog.text  # the frames are there


def test_nothing_of_a_job_or_key_is_logged(client, key, caplog):
    caplog.set_level("DEBUG")
    body = {"model": MODEL, "prompt": SECRET, "metadata": {"k": SECRET}}
    assert post_bytes(client, json.dumps(body).encode()).status_code == 202
    assert "job.accepted" in caplog.text
    assert SECRET not in caplog.text
    assert key.secret not in caplog.text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["model", "prompt", "prompt_token_ids", "messages", "sampling", "class", "priority",
     "deadline_s", "metadata", "extra"]
)  # fmt: skip
SAMPLING_FIELDS = st.sampled_from(
    ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias",
     "logprobs", "repetition_penalty", "n"]
)  # fmt: skip
LOOSE = hypothesis_settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150
)


@LOOSE
@given(
    st.dictionaries(FIELDS, JSON_VALUES),
    st.dictionaries(SAMPLING_FIELDS, JSON_VALUES),
    st.booleans(),
    st.booleans(),
)
def test_random_bodies_never_fail_the_gateway(
    client, fields, sampling_fields, is_good, has_sampling
):
    body = (GOOD if is_good else {}) | fields
    if has_sampling:
        body["sampling"] = sampling_fields
    response = post_bytes(client, json.dumps(body).encode())
    assert response.status_code in {202, 400, 422}, response.get_json()


@LOOSE
@given(st.binary(max_size=200))
def test_random_bytes_never_fail_the_gateway(client, body):
    assert post_bytes(client, body).status_code == 400


@LOOSE
@given(st.text(max_size=40), st.text(max_size=40))
def test_random_queries_and_ids_never_fail_the_gateway(client, name, value):
    assert client.get("/v1/jobs", query_string={name: value}).status_code in {200, 400}
    for field in ("cursor", "status", "model", "limit"):
        assert client.get("/v1/jobs", query_string={field: value}).status_code in {200, 400}
