"""`headrace top`: workers, queues, rates and alarms in the terminal, live.

It listens to the same feed as the dashboard (/v1/admin/feed), so the key must have a role. Without
a terminal, with --once and with --json it shows the state once and ends.

Invariants:
1. A lost connection is made again and said on the screen meanwhile; what is shown stays.
2. Names from the fleet are printed as text, never as markup, without control characters.

Called by: fleet/cli.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from headrace.fleet.invocation import invocation
from headrace.fleet.show import as_json_option, out, plain, print_json

Json = Annotated[bool, as_json_option]
State = Mapping[str, Any]

#: Rows of a table: what fits beside the other on a screen of fifty lines.
MAX_ROWS = 18
#: Columns of what is written into a file or pipe: wide enough that no name is cut.
WIDTH = 200
#: States of workers to look at first, in this order; others follow by name.
_TROUBLED = ("dead", "broken", "suspect", "quarantined", "draining", "drained", "starting")
_STYLES = {
    "ready": "green", "up": "green", "active": "green",
    "starting": "cyan", "draining": "yellow", "drained": "yellow", "suspect": "yellow",
    "paused": "yellow", "warn": "yellow",
    "dead": "red", "broken": "red", "quarantined": "red", "away": "red", "page": "red",
}  # fmt: skip
_NOTHING = "-"


def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Show the state once and end.")] = False,
    json: Json = False,
) -> None:
    """Watch workers, queues, rates and alarms; Ctrl-C ends it."""
    with invocation(context).client() as client:
        states = client.feed()
        if json:
            print_json(next(states))
        elif once or not out.is_terminal:
            width = None if out.is_terminal else WIDTH
            Console(highlight=False, width=width).print(screen(next(states)))
        else:
            _watch(states, Console(highlight=False))


def _watch(states: Iterator[State], console: Console) -> None:
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for state in states:
                live.update(screen(state), refresh=True)
    except KeyboardInterrupt:
        return


def screen(state: State) -> RenderableType:
    """Return the whole screen for a state of the feed."""
    overview = state.get("overview", {})
    return Group(
        _headline(state, overview),
        *(_alarm(alarm) for alarm in overview.get("alarms", [])),
        Text(),
        _workers(state.get("workers", {})),
        Text(),
        _queues(state.get("queues", {})),
    )


def _headline(state: State, overview: State) -> RenderableType:
    grid = Table.grid(padding=(0, 3))
    grid.add_row(
        _pair("jobs in", _rate(overview.get("jobs_in_per_s")), "/s"),
        _pair("out", _rate(overview.get("jobs_out_per_s")), "/s"),
        _pair("failed", _rate(overview.get("failed_per_s")), "/s"),
        _pair("tokens", _rate(overview.get("tokens_per_s")), "/s"),
        _pair("queued", _count(overview.get("num_queued"))),
        _pair("running", _count(overview.get("num_running"))),
        _pair("oldest", _seconds(overview.get("oldest_s"))),
        _pair("streams", _count(overview.get("live_streams"))),
    )
    quantiles = [
        _pair(name, f"{_ms(kind.get('p50'))} / {_ms(kind.get('p99'))}")
        for name, kind in (
            (name, overview.get(key) or {})
            for name, key in (("ttft", "ttft_ms"), ("itl", "itl_ms"), ("e2e", "e2e_ms"))
        )
    ]
    stores = [
        Text.assemble(f"{name} ", _state(overview.get(name))) for name in ("redis", "postgres")
    ]
    second = Table.grid(padding=(0, 3))
    second.add_row(*quantiles, *stores, _connection(state))
    return Group(grid, second)


def _connection(state: State) -> Text:
    if state.get("lost"):
        return Text("connection lost: trying again", style="bold red")
    return Text(plain(str(state.get("now", ""))), style="dim")


def _alarm(alarm: State) -> Text:
    severity = str(alarm.get("severity", ""))
    text = f"{severity} {alarm.get('code')}: {alarm.get('text')} (since {alarm.get('since')})"
    return Text(plain(text), style=_STYLES.get(severity, ""))


def _workers(workers: State) -> Table:
    table = _table("worker", "state", "model", "gpu", "kv", "run", "wait", "batch", "tokens/s",
                   "step", "last step")  # fmt: skip
    ranked = sorted(workers.items(), key=lambda item: (_rank(item[1].get("state")), item[0]))
    for name, worker in ranked[:MAX_ROWS]:
        gpu = worker.get("gpu") or {}
        table.add_row(
            _name(name),
            _state(worker.get("state")),
            _name(worker.get("model")),
            _share(gpu.get("utilization")),
            _share(worker.get("kv_used")),
            _count(worker.get("num_running")),
            _count(worker.get("num_waiting")),
            _rate(worker.get("batch")),
            _rate(worker.get("tokens_per_s")),
            _ms(worker.get("step_ms")),
            _seconds(worker.get("step_age_s")),
        )
    return _with_rest(table, len(ranked), "workers")


def _queues(queues: State) -> Table:
    table = _table("queue", "class", "tenant", "state", "queued", "oldest", "in flight", "lag",
                   "takeovers", "claimed by")  # fmt: skip
    fullest = sorted(queues.values(), key=lambda queue: -queue.get("num_queued", 0))
    for queue in fullest[:MAX_ROWS]:
        table.add_row(
            *(_name(queue.get(name)) for name in ("model", "job_class", "tenant")),
            _state(queue.get("state")),
            _count(queue.get("num_queued")),
            _seconds(queue.get("oldest_s")),
            _count(queue.get("num_held")),
            _count(queue.get("lag")),
            _count(queue.get("num_takeovers")),
            _name(queue.get("holders")),
        )
    return _with_rest(table, len(fullest), "queues")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def _with_rest(table: Table, num: int, what: str) -> Table:
    if num == 0:
        table.caption = Text(f"no {what}", style="dim")
    elif num > MAX_ROWS:
        table.caption = Text(f"{num - MAX_ROWS} more {what}", style="dim")
    return table


def _rank(state: object) -> int:
    return _TROUBLED.index(str(state)) if state in _TROUBLED else len(_TROUBLED)


def _pair(name: str, value: str, unit: str = "") -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, "bold"), unit)


def _name(name: object) -> Text:
    return Text(plain(str(name or _NOTHING)))


def _state(state: object) -> Text:
    return Text(plain(str(state or _NOTHING)), style=_STYLES.get(str(state), ""))


def _rate(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _count(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.0%}"


def _ms(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"


def _seconds(value: float | None) -> str:
    if value is None:
        return _NOTHING
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
