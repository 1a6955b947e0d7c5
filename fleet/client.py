"""A small client of the HTTP API.

Invariants:
1. `events` yields each token once, over any number of dropped connections: it comes back with the
   last id it saw (`queued` and `started` have none and may come again). It ends with the job's
   terminal event, or raises.
2. Only what is safe to repeat is repeated: reads, cancel, and a POST with an idempotency key
   (`submit` makes one if it is given none); of the operator's actions those that say so.
3. A refusal of the API is an ApiProblem with the API's own code and text.

Called by the CLI's commands and the demo.
"""

import json
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from headrace.contract.errors import HeadraceError
from headrace.fleet.failure import FleetError
from headrace.fleet.feed import states_of
from headrace.fleet.sse import Event, parse_events

#: The gateway writes a comment line every 10 s; a stream silent for longer has lost its peer.
STREAM_TIMEOUT_S = 35.0
REQUEST_TIMEOUT_S = 20.0

#: A connection is tried again for so long without any progress.
PATIENCE_S = 30.0
RETRY_S = 0.25

#: A connection that held for so long was a good one.
STEADY_S = 5.0

#: The gateway is there but cannot answer now.
RETRY_STATUS = frozenset({429, 502, 503, 504})


class ApiProblem(HeadraceError):
    """An answer of the API that is no success: its code and text."""

    code = "api_problem"

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.problem = code


class Client:
    """One connection pool to one API, for one key."""

    def __init__(self, api_url: str, api_key: str, *, patience_s: float = PATIENCE_S) -> None:
        self.api_url = api_url.rstrip("/")
        self._patience_s = patience_s
        try:
            host = urlsplit(self.api_url).hostname
            self._http = httpx.Client(
                base_url=self.api_url,
                headers={"Authorization": f"Bearer {api_key}"},
                timeout=REQUEST_TIMEOUT_S,
                trust_env=host not in {"127.0.0.1", "::1", "localhost"},  # no proxy to ourselves
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise FleetError(f"the API address {api_url!r} is no URL: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def submit(self, body: dict[str, Any], idempotency_key: str | None = None) -> dict[str, Any]:
        try:
            content = json.dumps(body, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise FleetError(f"the job cannot be written as JSON: {error}") from error
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": idempotency_key or uuid.uuid4().hex,
        }
        return self._call("POST", "/v1/jobs", content=content, headers=headers)

    def job(self, job_id: str) -> dict[str, Any]:
        return self._call("GET", _job_path(job_id))

    def jobs(self, **filters: str | int | None) -> dict[str, Any]:
        """Return one page: `data` and `next_cursor`."""
        given = {name: value for name, value in filters.items() if value is not None}
        return self._call("GET", "/v1/jobs", params=given)

    def cancel(self, job_id: str) -> dict[str, Any]:
        return self._call("POST", f"{_job_path(job_id)}/cancel")

    def models(self) -> list[dict[str, Any]]:
        return self._call("GET", "/v1/models")["data"]

    def get(self, path: str, **query: str | int | None) -> dict[str, Any]:
        """Read what stands at a path of the API; a query's None is left out."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._call("GET", path, params=given)

    def admin(
        self,
        method: str,
        path: str,  # below /v1/admin, its parts quoted
        *,
        may_repeat: bool = True,  # asking twice does what asking once does
        **options: Any,  # httpx's: params, json
    ) -> dict[str, Any]:
        """Ask something of the operator's API; the key must have a role."""
        return self._call(method, f"/v1/admin/{path}", may_repeat=may_repeat, **options)

    def feed(self) -> Iterator[dict[str, Any]]:
        """Yield the state of the fleet about once a second, without end; needs a key with a role.

        While the connection is lost the last state is given again, with `lost` set, until the
        patience is at its end.
        """
        state: dict[str, Any] = {}
        heard_at = time.monotonic()
        while True:
            try:
                for state in states_of(self._listen("/v1/admin/feed", {})):
                    heard_at = time.monotonic()
                    yield state
                lost = "the gateway ended the feed"
            except (httpx.TransportError, _NotNowError) as error:
                lost = f"{type(error).__name__}: {error}"
            if time.monotonic() - heard_at > self._patience_s:
                raise FleetError(
                    f"{self.api_url} sent no figures for {self._patience_s:.0f} s ({lost}): see"
                    " whether its gateway runs"
                )
            if state:
                yield {**state, "lost": True}
            time.sleep(RETRY_S)

    def is_ready(self) -> bool:
        """Say whether the gateway answers and has what it needs; asks once."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def events(self, job_id: str, last_id: str | None = None) -> Iterator[Event]:
        """Yield the job's events from `last_id` on, to its end."""
        lost_since = time.monotonic()
        while True:
            begun = time.monotonic()
            try:
                for event in self._stream(job_id, last_id):
                    last_id = event.id if event.id is not None else last_id
                    if event.name == "reset":
                        last_id = None
                    lost_since = time.monotonic()
                    yield event
                    if event.is_terminal:
                        return
                lost = "the gateway ended the stream before the job ended"
            except (httpx.TransportError, _NotNowError) as error:
                lost = f"{type(error).__name__}: {error}"
            now = time.monotonic()
            if now - begun > STEADY_S:  # silence on a connection that held is a job that waits
                lost_since = now
            if now - lost_since > self._patience_s:
                raise FleetError(
                    f"the events of {job_id} stopped, and {self.api_url} gave no more for"
                    f" {self._patience_s:.0f} s ({lost}): the job goes on; `headrace watch` later"
                )
            time.sleep(RETRY_S)

    def _stream(self, job_id: str, last_id: str | None) -> Iterator[Event]:
        headers = {} if last_id is None else {"Last-Event-ID": last_id}
        return self._listen(f"{_job_path(job_id)}/events", headers)

    def _listen(self, path: str, headers: dict[str, str]) -> Iterator[Event]:
        headers = {"Accept": "text/event-stream", **headers}
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, read=STREAM_TIMEOUT_S)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                answer.read()
                if answer.status_code in RETRY_STATUS:
                    raise _NotNowError(str(answer.status_code))
                raise _problem(answer)
            yield from parse_events(answer.iter_bytes())

    def _call(
        self, method: str, path: str, *, may_repeat: bool = True, **options: Any
    ) -> dict[str, Any]:
        deadline = time.monotonic() + (self._patience_s if may_repeat else 0.0)
        while True:
            try:
                answer = self._http.request(method, path, **options)
            except httpx.ConnectError as error:
                raise FleetError(
                    f"{self.api_url} cannot be reached ({error}): is the fleet up? Start it with"
                    " `headrace up`, or name another address with --api-url"
                ) from error
            except httpx.TransportError as error:
                if time.monotonic() > deadline:
                    raise FleetError(f"{self.api_url} broke off ({error}): try again") from error
                time.sleep(RETRY_S)
                continue
            if answer.is_success:
                return _json(answer)
            if answer.status_code not in RETRY_STATUS or time.monotonic() > deadline:
                raise _problem(answer)
            time.sleep(_retry_after_s(answer))


class _NotNowError(Exception):
    """The gateway is there but cannot answer now."""


def _job_path(job_id: str) -> str:
    if not job_id.replace("_", "").replace("-", "").isalnum() or not job_id.isascii():
        raise FleetError(f"{job_id!r} is no job id: ids look like job_0192...")
    return f"/v1/jobs/{job_id}"


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        value = answer.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ApiProblem(
            answer.status_code,
            "not_headrace",
            f"{answer.url} answered {answer.status_code} with {answer.text[:80]!r}, which is not"
            " headrace's: check the address",
        )
    return value


def _problem(answer: httpx.Response) -> ApiProblem:
    value = _json(answer)
    code = str(value.get("code", "unknown"))
    detail = str(value.get("detail") or value.get("title") or answer.reason_phrase)
    return ApiProblem(answer.status_code, code, detail)


def _retry_after_s(answer: httpx.Response) -> float:
    given = answer.headers.get("Retry-After", "")
    return min(float(given), 5.0) if given.isdigit() else RETRY_S
