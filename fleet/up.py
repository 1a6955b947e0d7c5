"""`headrace up` and `headrace demo`: a fleet for as long as the command runs.

The first Ctrl-C (or SIGTERM) stops in order; a second one kills what is left to stop.

Called by the CLI.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from headrace.fleet.access import Access
from headrace.fleet.client import Client
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import Invocation
from headrace.fleet.programs import EMBEDDED_MODEL
from headrace.fleet.show import note, print_event, print_job, print_json, print_table
from headrace.fleet.sse import Event
from headrace.fleet.supervise import Fleet, Stopped

QUESTION = "What is the capital of France?"


@dataclass(slots=True)
class _Stop:
    """What a signal sets, and whether it may break off what the main thread does."""

    event: threading.Event
    breaks_off: bool = False


def up(invocation: Invocation, as_json: bool) -> None:
    """Run a fleet until it is told to stop."""
    with _started_fleet(invocation) as (fleet, access, _):
        if access is not None:
            _announce(access, invocation, as_json, is_first=fleet.has_new_operator)
            fleet.watch()


def demo(invocation: Invocation, as_json: bool) -> None:
    """Run a fleet, ask its model one question, show the answer and the record, and stop it."""
    with _started_fleet(invocation) as (fleet, access, stop):
        if access is None:
            return
        stop.breaks_off = True
        with Client(access.api_url, access.api_key) as client:
            record, text = _ask(client, fleet.model_name, as_json)
        stop.breaks_off = False
    if left := fleet.leftovers():
        raise FleetError(f"the demo stopped its fleet, and {', '.join(left)} still runs: end it")
    note("stopped; nothing is left running")
    _check(record, text)


@contextmanager
def _started_fleet(invocation: Invocation) -> Iterator[tuple[Fleet, Access | None, _Stop]]:
    """Yield a ready fleet and stop it afterwards; no Access if it was stopped on the way."""
    stop = _Stop(threading.Event())
    fleet = Fleet(invocation.settings, invocation.environ, invocation.data_folder, note, stop.event)

    def handle(number: int, frame: object) -> None:
        if stop.event.is_set():
            fleet.kill_programs()
        stop.event.set()
        if stop.breaks_off:
            stop.breaks_off = False
            raise Stopped

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        access = None
        with suppress(Stopped):
            access = fleet.start()
        yield fleet, access, stop
    except Stopped as error:
        raise FleetError("the demo was stopped before its answer was complete") from error
    finally:
        note("stopping")
        fleet.stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(access: Access, invocation: Invocation, as_json: bool, *, is_first: bool) -> None:
    values = {
        "api_url": access.api_url,
        "docs_url": f"{access.api_url}/docs",
        "api_key": access.api_key,
        "dashboard_url": access.dashboard_url,
        "operator": access.operator,
        # Later it is read in fleet.json, by whoever may read the key there.
        **({"operator_password": access.operator_password} if is_first else {}),
        "data_dir": str(invocation.data_folder),
    }
    if as_json:
        print_json(values)
        return
    print_table(["headrace is up", ""], list(values.items()))
    note("Ctrl-C stops it. Try: headrace submit --follow 'What is the capital of France?'")


def _ask(client: Client, model: str, as_json: bool) -> tuple[dict[str, Any], str]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "sampling": {"temperature": 0, "max_tokens": 64},
    }
    note(f"\n{QUESTION}")
    job = client.submit(body)
    text = ""
    for event in client.events(job["id"]):
        text = _grown(text, event)
        if as_json:
            print_json({"event": event.name, "id": event.id, **event.data})
        else:
            print_event(event)
    record = client.job(job["id"])
    if as_json:
        print_json(record)
    else:
        note("\nThe stored record:")
        print_job(record)
    return record, text


def _grown(text: str, event: Event) -> str:
    if event.name == "reset":
        return ""
    return text + event.data["text"] if event.name == "token" else text


def _check(record: dict[str, Any], text: str) -> None:
    """Hold the stream to the record, and the record to success."""
    if record["status"] != "succeeded":
        raise FleetError(
            f"the demo's job {record['id']} ended as {record['status']}: see its record"
        )
    if record["output"]["text"] != text:
        raise FleetError(
            f"the demo's job {record['id']} streamed {text!r} and stored"
            f" {record['output']['text']!r}: the two must be equal"
        )
    if record["model"] == EMBEDDED_MODEL and "Paris" not in text:
        raise FleetError(f"the demo asked {QUESTION!r}, and {record['model']} answered {text!r}")
