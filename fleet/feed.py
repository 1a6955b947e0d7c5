"""The state of the fleet as the operator's feed tells it: a whole one first, then merge patches.

Called by: fleet/client.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from headrace.fleet.sse import Event

State = dict[str, Any]


def states_of(events: Iterable[Event]) -> Iterator[State]:
    """Yield the state after each event."""
    state: State = {}
    is_whole = False
    for event in events:
        if event.name == "state":
            state, is_whole = event.data, True
        elif event.name == "delta" and is_whole:
            state = merged(state, event.data)
        else:
            continue  # of a newer API, or a delta to nothing
        yield state


def merged(old: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result
