"""The screen of `headrace top`, and the feed it is made from."""

import io

from rich.console import Console

from headrace.fleet.feed import merged, states_of
from headrace.fleet.sse import Event
from headrace.fleet.top import MAX_ROWS, _watch, screen

OVERVIEW = {
    "at": "2026-01-02T03:04:05Z",
    "jobs_in_per_s": 12.34,
    "jobs_out_per_s": 1234.5,
    "failed_per_s": 0.0,
    "tokens_per_s": None,
    "num_queued": 12_345,
    "num_running": 7,
    "oldest_s": 75.0,
    "ttft_ms": {"p50": 5.25, "p99": 1234.0},
    "redis": "up",
    "postgres": "away",
    "alarms": [
        {"severity": "page", "code": "no_worker", "text": "3 jobs: start one", "since": "03:04"}
    ],
}
WORKER = {
    "state": "ready",
    "model": "m",
    "kv_used": 0.25,
    "num_running": 3,
    "num_waiting": 0,
    "batch": 2.5,
    "tokens_per_s": 99.5,
    "step_ms": 4.5,
    "step_age_s": 0.5,
    "gpu": {"utilization": 0.9},
}
QUEUE = {
    "model": "m",
    "job_class": "batch",
    "tenant": "[red]mine[/red]",
    "state": "paused",
    "num_queued": 3,
    "num_held": 1,
    "oldest_s": 3725.0,
    "lag": 3,
    "num_takeovers": 2,
    "holders": "w1 (1)",
}


def text_of(state, width=220):
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(screen(state))
    return console.export_text()


def test_the_screen_shows_rates_alarms_workers_and_queues():
    text = text_of(
        {"overview": OVERVIEW, "workers": {"w1": WORKER}, "queues": {"m|batch|t": QUEUE}}
    )
    lines = text.splitlines()
    assert "jobs in 12.3/s" in lines[0]
    assert "out 1,234/s" in lines[0]
    assert "tokens -/s" in lines[0]
    assert "queued 12,345" in lines[0]
    assert "oldest 1 min 15 s" in lines[0]
    assert "ttft 5.2 ms / 1,234 ms" in lines[1]
    assert "itl - / -" in lines[1]
    assert "redis up" in lines[1]
    assert "postgres away" in lines[1]
    assert "page no_worker: 3 jobs: start one (since 03:04)" in text
    (worker,) = [line for line in lines if line.startswith("w1")]
    assert " ".join(worker.split()) == "w1 ready m 90% 25% 3 0 2.5 99.5 4.5 ms 0.5 s"
    (queue,) = [line for line in lines if line.startswith("m ")]
    assert "1 h 2 min" in queue
    assert "[red]mine[/red]" in queue, "a name is no markup"


def test_what_needs_a_look_comes_first_and_the_rest_is_counted():
    workers = {f"w{n:02}": WORKER for n in range(40)} | {"zz": {**WORKER, "state": "dead"}}
    queues = {str(n): {**QUEUE, "tenant": f"t{n}", "num_queued": n} for n in range(40)}
    lines = text_of({"workers": workers, "queues": queues}).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("worker"))
    assert lines[first + 1].startswith("zz")
    assert any(f"{41 - MAX_ROWS} more workers" in line for line in lines)
    assert any(f"{40 - MAX_ROWS} more queues" in line for line in lines)
    fullest = next(number for number, line in enumerate(lines) if line.startswith("queue"))
    assert "t39" in lines[fullest + 1]


def test_a_state_without_anything_is_a_screen_too():
    text = text_of({})
    assert "no workers" in text
    assert "no queues" in text


def test_names_cannot_drive_the_terminal():
    text = text_of({"workers": {"\x1b[2Jw": WORKER}, "queues": {"k": {**QUEUE, "model": "\x07"}}})
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_lost_connection_is_said():
    assert "connection lost" in text_of({"lost": True, "overview": OVERVIEW})


def test_a_terminal_is_drawn_anew_for_each_state_until_ctrl_c():
    def states():
        yield {"workers": {"first": WORKER}}
        yield {"workers": {"second": WORKER}}
        raise KeyboardInterrupt

    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=120, height=30, highlight=False)
    _watch(states(), console)
    text = drawn.getvalue()
    assert text.index("first") < text.index("second")
    entered, left = text.index("\x1b[?1049h"), text.index("\x1b[?1049l")
    assert entered < text.index("first") < left, "the screen from before comes back"


# -- the feed --------------------------------------------------------------------------------


def test_states_follow_from_patches_and_what_is_unknown_is_skipped():
    events = [
        Event("delta", {"early": 1}),
        Event("state", {"a": {"x": 1, "y": 2}, "b": None}),
        Event("news", {"a": 0}),
        Event("delta", {"a": {"x": None, "z": {"deep": [1]}}}),
        Event("state", {"c": 1}),
    ]
    assert list(states_of(events)) == [
        {"a": {"x": 1, "y": 2}, "b": None},
        {"a": {"y": 2, "z": {"deep": [1]}}, "b": None},
        {"c": 1},
    ]


def test_a_patch_follows_rfc_7396():
    # Of the RFC's appendix A.
    for old, patch, wanted in [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": "foo"}, {"a": {"b": None}}, {"a": {}}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ]:
        assert merged(old, patch) == wanted
