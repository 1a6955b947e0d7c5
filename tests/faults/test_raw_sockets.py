"""The generator of hostile bytes: a seed repeats it, and what it counts is what was answered."""

from __future__ import annotations

import random

from headrace.tests.faults.raw_sockets import Answers, Generator, Target, statuses_of

TARGET = Target("127.0.0.1", 1, "hr_key", "tiny", ["/v1/jobs", "/v1/jobs/{job_id}"], ["job_1"])


def exchanges(seed: int, count: int = 300) -> list[bytes]:
    generator = Generator(random.Random(seed), TARGET)
    return [generator.exchange() for _ in range(count)]


def test_the_same_seed_makes_the_same_bytes():
    assert exchanges(1) == exchanges(1)
    assert exchanges(1) != exchanges(2)


def test_every_kind_of_malformed_input_is_made():
    made = b"".join(exchanges(1, 2000))
    for part in (b"Transfer-Encoding: chunked, gzip", b"Content-Length: -1", b"HTTP/1.0", b"1e999",
                 b"\\ud800", b"\\u0000", b"http://x/v1/jobs", b"Content-Encoding: gzip", b"%00",
                 b"[" * 200, b"9" * 5000, b"SCRIPT_NAME", b" folded"):  # fmt: skip
        assert part in made, part


def test_answers_are_counted_over_a_pipeline():
    one = b"HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\nHTTP/1.1 500 in a body"[:-1]
    got = (
        one + b"HTTP/1.1 100 Continue\r\n\r\n" + one + b"HTTP/1.1 404 x\r\nA: b\r\n\r\nHTTP/1.1 500"
    )
    assert statuses_of(got) == [200, 100, 200, 404]
    assert statuses_of(b"") == []


def test_a_5xx_is_kept_with_what_caused_it_and_a_503_is_not():
    answers = Answers()
    answers.take(b"sent", b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n")
    answers.take(b"sent", b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n")
    answers.take(b"sent", b"")
    assert answers.wrong == [(500, b"sent")]
    assert (answers.statuses, answers.num_silent) == ({500: 1, 503: 1}, 1)
