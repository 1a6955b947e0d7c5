"""Bytes that no client library would send, by a seed, and what a gateway answers to them.

Each connection carries one exchange: a few requests, the first bad one last, or a lot of noise. The
sending side is then ended, so that whatever waits for more is told that nothing comes.

Called by: scenarios_input, tests/faults/test_raw_sockets.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

#: Seconds a gateway may be silent on a connection whose other side has ended.
SILENCE_S = 60.0
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PRI",
            "get", "", "G\x00T", "POST" * 40)  # fmt: skip
_NUMBERS = ("0", "-1", "1e999", "-1e-999", "NaN", "Infinity", "1" * 400, "9" * 5000, "0.1" * 3,
            "1.7976931348623159e308", "-0", "0x10", "1_000", "9223372036854775808")  # fmt: skip
_TEXTS = ('"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\x00"', '"\\x41"', '"' + "a" * 3000 + '"',
          '"\xff"', '"\\u202e"', '""', '"\n"', "'x'", '"\\"', "null", "true", "[]", "{}",
          "[" * 200 + "]" * 200, '{"a":' * 150 + "1" + "}" * 150,
          "{" + ",".join(f'"k{n}":{n}' for n in range(400)) + "}")  # fmt: skip
_FIELDS = ("model", "prompt", "prompt_token_ids", "messages", "sampling", "class", "priority",
           "deadline_s", "metadata", "x", "")  # fmt: skip
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logit_bias",
             "logprobs", "min_p")  # fmt: skip


@dataclass
class Target:
    """What the generator knows of the fleet."""

    host: str
    port: int
    key: str
    model: str
    paths: list[str]  # of the route table, with {parameters}
    jobs: list[str] = field(default_factory=list)


@dataclass
class Answers:
    """What all connections got, together."""

    statuses: Counter[int] = field(default_factory=Counter)
    num_connections: int = 0
    num_silent: int = 0  # closed without an answer
    wrong: list[tuple[int, bytes]] = field(default_factory=list)  # a 5xx, and what it was sent

    def take(self, sent: bytes, got: bytes) -> None:
        self.num_connections += 1
        found = [int(status) for status in statuses_of(got)]
        self.num_silent += not found
        self.statuses.update(found)
        bad = [status for status in found if status >= 500 and status != 503]
        if bad:
            self.wrong.append((bad[0], sent[:4000]))


def statuses_of(got: bytes) -> list[int]:
    """Return the status of each answer; a body that quotes one is not taken for one."""
    found: list[int] = []
    while match := _STATUS.match(got):
        head, _, rest = got.partition(b"\r\n\r\n")
        found.append(int(match[1]))
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if int(match[1]) >= 200 and length is None:
            break  # a stream, to the connection's end
        got = rest[int(length[1]) if length else 0 :]
    return found


class Generator:
    """Makes exchanges; the same seed makes the same."""

    def __init__(self, chance: random.Random, target: Target) -> None:
        self._chance = chance
        self._target = target
        self._kinds: list[Callable[[], bytes]] = [
            self._bad_json, self._bad_json, self._bad_json, self._bad_query, self._bad_query,
            self._bad_head, self._bad_framing, self._bad_chunks, self._noise, self._pipeline,
            self._mutated, self._mutated, self._large_head,
        ]  # fmt: skip

    def exchange(self) -> bytes:
        """Return the bytes of one connection."""
        good = b"".join(self._good() for _ in range(self._chance.choice((0, 0, 1, 3))))
        return good + self._chance.choice(self._kinds)()

    # -- parts -------------------------------------------------------------------------------

    def _path(self) -> str:
        def name(_: object) -> str:
            known = self._target.jobs or ["job_0"]
            odd = ("%00", "%ff%fe", "..", "%2e%2e%2f", "a" * 900, "%", "'--", "job_" + "0" * 32)
            return self._chance.choice(known if self._chance.random() < 0.5 else odd)

        return re.sub(r"\{\w+\}", name, self._chance.choice(self._target.paths))

    def _head(self, method: str, path: str, *more: str, version: str = "HTTP/1.1") -> bytes:
        lines = [f"{method} {path} {version}", "Host: x", "Content-Type: application/json"]
        if self._chance.random() < 0.9:
            lines.append(f"Authorization: Bearer {self._target.key}")
        return "\r\n".join([*lines, *more, "", ""]).encode("latin-1", "replace")

    def _body(self) -> bytes:
        """Return a job's JSON with some of its values wrong in one way or another."""
        value = lambda: self._chance.choice(_NUMBERS + _TEXTS)  # noqa: E731
        fields = {'"model"': json.dumps(self._target.model), '"prompt"': '"x"'}
        for name in self._chance.sample(_FIELDS, self._chance.randint(0, 3)):
            fields[json.dumps(name)] = value()
        if self._chance.random() < 0.5:
            chosen = self._chance.sample(_SAMPLING, self._chance.randint(1, 3))
            inner = ",".join(f'"{name}":{value()}' for name in chosen)
            fields['"sampling"'] = "{" + inner + "}"
        text = "{" + ",".join(f"{name}:{item}" for name, item in fields.items()) + "}"
        if self._chance.random() < 0.1:
            text = text.replace("{", '{"model":"x",', 1)  # twice
        return text.encode("latin-1")

    def _good(self) -> bytes:
        if self._chance.random() < 0.5:
            return self._head("GET", self._chance.choice(("/healthz", "/v1/models", "/v1/jobs")))
        sampling = {"max_tokens": 2}
        body = json.dumps({"model": self._target.model, "prompt": "x", "sampling": sampling})
        return self._head("POST", "/v1/jobs", f"Content-Length: {len(body)}") + body.encode()

    # -- kinds -------------------------------------------------------------------------------

    def _bad_json(self) -> bytes:
        body = self._body()
        if self._chance.random() < 0.3:
            body = self._flipped(body)
        path = "/v1/jobs" if self._chance.random() < 0.7 else self._path()
        odd = self._chance.choice(
            ((), ("Content-Encoding: gzip",), ("Idempotency-Key: \x07",), ("Prefer: wait=1e9",),
             ("Prefer: wait=0",), ("Idempotency-Key: same",), ("traceparent: 00-zz-1-1",))
        )  # fmt: skip
        return self._head("POST", path, f"Content-Length: {len(body)}", *odd) + body

    def _bad_query(self) -> bytes:
        names = ("limit", "cursor", "status", "model", "class", "starting_after", "id", "tenant",
                 "error", "meta", "created_after", "worker", "%00", "next", "")  # fmt: skip
        values = ("%00", "%ed%a0%80", "-1", "9" * 40, "1e5", "a" * 1500, "%", "%27%22", "[]",
                  "queued,,", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "job_0",
                  "am9iXzEyMw", "am9iXzAxYTIwYTUwZGM2YTc1MTBhNWY5MmVhMzg1OWY2MWZh", "k:%00", "k:v",
                  "1.5", "3.7", "-0", "99999999999.9")  # fmt: skip
        asked = "&".join(
            f"{self._chance.choice(names)}={self._chance.choice(values)}"
            for _ in range(self._chance.randint(1, 3))
        )
        header = self._chance.choice((("Last-Event-ID: 1.2.3",), ("Last-Event-ID: -7",), ()))
        return self._head("GET", f"{self._path()}?{asked}", *header)

    def _bad_head(self) -> bytes:
        odd = ("X: \x00", "no colon", " folded: 1", "\xff\xfe: 1", "X : 1", "Expect: 200-ok",
               "Host: y", "Authorization: Bearer \xff", "Cookie: headrace_session=\x01; a=b",
               "Cookie: " + "a=b;" * 400, "Upgrade: h2c", "Connection: upgrade, close",
               "X-Forwarded-For: " + "1," * 200, "Range: bytes=0-", "Accept: \x7f",
               "If-None-Match: \"", "SCRIPT_NAME: /x",
               "Content-Type: application/json;a=\"")  # fmt: skip
        version = self._chance.choice(
            ("HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9", "http/1.1", "")
        )
        target = self._chance.choice(
            (self._path(), "http://x/v1/jobs", "*", "//v1/jobs", "/v1/../v1/jobs", "", "/\xff", "?",
             "#", "http://[/", "/v1/jobs#x", "x:443", "/" + "a/" * 700)
        )  # fmt: skip
        return self._head(self._chance.choice(_METHODS), target, self._chance.choice(odd),
                          version=version)  # fmt: skip

    def _bad_framing(self) -> bytes:
        body = self._body()
        n = len(body)
        odd = ((f"Content-Length: {n + 7}",), (f"Content-Length: {n - 3}",),
               ("Content-Length: -1",), ("Content-Length: 99999999999",), ("Content-Length: x",),
               ("Content-Length: +5",),
               (f"Content-Length: {n}", f"Content-Length: {n}"), (), ("Transfer-Encoding: gzip",),
               (f"Content-Length: {n}", "Transfer-Encoding: chunked"),
               ("Transfer-Encoding: chunked, gzip",), ("Transfer-Encoding: xchunked",))  # fmt: skip
        return self._head("POST", "/v1/jobs", *self._chance.choice(odd)) + body

    def _bad_chunks(self) -> bytes:
        head = self._head("POST", "/v1/jobs", "Transfer-Encoding: chunked")
        body = self._body()
        cut = self._chance.randrange(len(body))
        whole = b"".join(
            b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part
        )
        ends = (
            b"0\r\n\r\n",
            b"",
            b"0\r\nX: 1\r\n\r\n",
            b"zz\r\n",
            b"-1\r\n\r\n",
            b"0\n\n",
            b"ffffffffffffffff\r\n",
            b"0;a=b\r\n\r\n",
            b"5\r\nab",
            b"0\r\n\x00: 1\r\n\r\n",
        )
        return head + whole + self._chance.choice(ends)

    def _noise(self) -> bytes:
        return self._chance.randbytes(self._chance.choice((1, 20, 300, 20_000)))

    def _pipeline(self) -> bytes:
        return b"".join(self._good() for _ in range(self._chance.randint(2, 8))) + b"\r\n\r\nGET"

    def _large_head(self) -> bytes:
        many = [f"X-{n}: {n}" for n in range(self._chance.choice((63, 65, 500)))]
        long = ["X: " + "a" * self._chance.choice((8000, 8200, 200_000))]
        more = self._chance.choice((many, long))
        return self._head("GET", self._chance.choice(("/healthz", "/" + "a" * 5000)), *more)

    def _mutated(self) -> bytes:
        return self._flipped(self._good())

    def _flipped(self, data: bytes) -> bytes:
        """Flip, drop, double or cut some bytes."""
        chance, made = self._chance, bytearray(data)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(made) or 1)
            match chance.randrange(4):
                case 0 if made:
                    made[at] ^= 1 << chance.randrange(8)
                case 1:
                    del made[at : at + chance.randint(1, 9)]
                case 2:
                    made[at:at] = made[at : at + chance.randint(1, 40)]
                case _:
                    made[at:at] = bytes([chance.randrange(256)])
        return bytes(made[: chance.randrange(1, len(made) + 1)] if chance.random() < 0.2 else made)


async def exchange(target: Target, sent: bytes) -> bytes:
    """Send bytes on a connection of their own, end the sending side, return all that comes."""
    got = b""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        writer.write(sent)
        writer.write_eof()
        while b"text/event-stream" not in got:  # which has no end
            part = await asyncio.wait_for(reader.read(1 << 16), SILENCE_S)
            if not part:
                break
            got += part
    except ConnectionError:
        pass  # closed by the gateway with our bytes unread: what it said before counts
    finally:
        writer.close()
    return got


async def attack(
    target: Target, chance: random.Random, num_requests: int, *, at_once: int = 16
) -> Answers:
    """Send exchanges until so many requests were answered or refused; return what came back."""
    answers, generator = Answers(), Generator(chance, target)

    async def go() -> None:
        while sum(answers.statuses.values()) + answers.num_silent < num_requests:
            sent = generator.exchange()
            answers.take(sent, await exchange(target, sent))

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(go())
    return answers
