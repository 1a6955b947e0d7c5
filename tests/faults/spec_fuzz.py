"""schemathesis on our OpenAPI document: requests that fit it and requests that break it, by a seed.

A process of its own, because making such requests costs more than answering them. Reads the API's
address and a key from the environment (never from arguments, which `ps` shows), and writes counts
as JSON. Sequences of requests (`stateful`) pass on what answers hold: the job that was accepted is
shown, canceled, cloned. Left out of those are orders to workers, keys and queues, whose real names
are in answers: they would be obeyed, and the fleet under test would stand still.

Called by: scenarios_input, as `python -m headrace.tests.faults.spec_fuzz OUT NUM_REQUESTS SEED`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from hypothesis.stateful import run_state_machine_as_test
from schemathesis import GenerationMode

#: Share of the requests that are sent in sequences.
STATEFUL_SHARE = 0.2
NUM_STEPS = 6
#: Obeyed, they would stop the fleet; and streams that have no end.
NOT_IN_SEQUENCES = r"^/v1/admin/(workers/|queues/|keys/)|/events$|/feed$"
TIMEOUT_S = 60
#: Paths whose random names could still mean everything: a pause without a name pauses all.
NEVER = r"^/v1/admin/queues/"
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


class Seen:
    """What was answered: counts by status, and what should not have been."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.num_unsent = 0  # refused by the client's own library: no HTTP can carry them
        self.wrong: list[str] = []

    def take(self, label: str, status: int, kind: str) -> None:
        self.statuses[status] += 1
        if status >= 500 and status != 503:
            self.wrong.append(f"{label}: {status}")
        elif status >= 400 and kind != "application/problem+json":
            self.wrong.append(f"{label}: {status} is {kind!r}, no problem")


def fuzz_each(schema: Any, session: requests.Session, url: str, num: int, number: int) -> Seen:
    """Send so many requests, spread over all operations, each with fitting and broken values."""
    seen = Seen()
    operations = [result.ok() for result in schema.exclude(path_regex=NEVER).get_all_operations()]
    count = max(1, num // (len(operations) * len(MODES)))
    for operation in operations:
        for mode in MODES:
            _fuzz_one(operation, mode, session, url, seed(number), count, seen)
    return seen


def _fuzz_one(
    operation: Any,
    mode: GenerationMode,
    session: requests.Session,
    url: str,
    seeded: Any,
    count: int,
    seen: Seen,
) -> None:
    @seeded
    @_loose(count)
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        sent = case.as_transport_kwargs(base_url=url, headers=dict(session.headers))
        try:
            # Not read to the end: some of it has none.
            with session.request(**sent, stream=True, timeout=TIMEOUT_S) as response:
                kind = response.headers.get("Content-Type", "")
                seen.take(operation.label, response.status_code, kind)
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            seen.num_unsent += 1

    try:
        send()
    except (schemathesis.errors.SchemathesisError, Unsatisfiable):
        return  # an operation without parameters has no broken form


def fuzz_sequences(schema: Any, key: str, url: str, num: int, number: int) -> Seen:
    """Send requests that take up what earlier answers held."""
    seen = Seen()
    machine = schema.exclude(path_regex=NOT_IN_SEQUENCES).as_state_machine()

    class Sequences(machine):
        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {
                "base_url": url,
                "headers": {"Authorization": f"Bearer {key}"},
                "timeout": TIMEOUT_S,
            }

        def validate_response(self, response: Any, case: Any, **_: Any) -> None:
            kind = response.headers.get("content-type", [""])[0]
            seen.take(case.operation.label, response.status_code, kind)

    count = max(1, num // NUM_STEPS)
    loose = settings(_loose(count), stateful_step_count=NUM_STEPS)
    run_state_machine_as_test(seed(number)(Sequences), settings=loose)
    return seen


def _loose(count: int) -> settings:
    return settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def main() -> None:
    out, num, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    url, key = os.environ["FUZZ_URL"], os.environ["FUZZ_KEY"]
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {key}"
    schema = schemathesis.openapi.from_dict(session.get(f"{url}/openapi.json", timeout=60).json())
    in_sequences = int(num * STATEFUL_SHARE)
    parts = [
        fuzz_each(schema, session, url, num - in_sequences, number),
        fuzz_sequences(schema, key, url, in_sequences, number),
    ]
    statuses = sum((part.statuses for part in parts), Counter())
    found = {
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "num_in_sequences": sum(parts[1].statuses.values()),
        "num_unsent": parts[0].num_unsent,
        "wrong": [text for part in parts for text in part.wrong][:50],
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
