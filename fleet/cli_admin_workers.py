"""`headrace admin workers`: see the workers, and drain, resume, restart or quarantine one.

It goes through the API, like the dashboard, so it needs a key with a role (`headrace keys create
--role`): viewer to list, operator to act. What an action does is said in gateway/dashboard/workers.

Called by `cli`, which registers it.
"""

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import invocation
from headrace.fleet.show import as_json_option, note, print_json, print_table

app = typer.Typer(help="The workers, and what is wanted of them.", invoke_without_command=True)

Json = Annotated[bool, as_json_option]
Name = Annotated[str, typer.Argument(help="Name of the worker.", metavar="WORKER")]

COLUMNS = ("worker", "state", "model", "gpu", "kv", "running", "waiting", "tokens/s", "step",
           "order", "why")  # fmt: skip


@app.callback()
def workers(context: typer.Context, json: Json = False) -> None:
    """The workers, and what is wanted of them; without a command: list them."""
    if context.invoked_subcommand is None:
        list_workers(context, json)


@app.command("list")
def list_workers(context: typer.Context, json: Json = False) -> None:
    """List the workers seen within the hour."""
    with invocation(context).client() as client:
        found = client.admin("GET", "workers")
    if json:
        print_json(found)
    else:
        print_table(COLUMNS, [_row(worker) for worker in found["workers"]])


@app.command()
def drain(context: typer.Context, worker: Name, json: Json = False) -> None:
    """Let a worker claim nothing more; what runs finishes, or moves to others after a while."""
    _order(context, worker, "drain", json)


@app.command()
def resume(context: typer.Context, worker: Name, json: Json = False) -> None:
    """Let a worker claim again; a dead one when it is back."""
    _order(context, worker, "resume", json)


@app.command()
def restart(context: typer.Context, worker: Name, json: Json = False) -> None:
    """Drain a worker, then replace its engine process."""
    _order(context, worker, "restart", json)


@app.command()
def quarantine(context: typer.Context, worker: Name, json: Json = False) -> None:
    """Take all jobs from a worker at once, and give it none until it is resumed."""
    _order(context, worker, "quarantine", json)


def _order(context: typer.Context, worker: str, action: str, as_json: bool) -> None:
    if not worker.strip() or "\0" in worker:
        raise FleetError(f"{worker[:40]!r} is no worker's name: see `headrace admin workers list`")
    path = f"workers/{quote(worker, safe='')}/{action}"
    with invocation(context).client() as client:
        # A restart that is asked for twice is done twice.
        found = client.admin("POST", path, may_repeat=action != "restart")
    if as_json:
        print_json(found)
    else:
        wanted = (found["order"] or {}).get("wanted")
        note(f"{worker} was {found['state']}; wanted: {wanted}. It obeys within a second")


def _row(worker: Mapping[str, Any]) -> list[object]:
    gpu, order, step_ms = worker["gpu"], worker["order"], worker["step_ms"]
    return [
        worker["worker"],
        worker["state"],
        worker["model"],
        f"{gpu['utilization']:.0%} {gpu['temperature_c']:.0f}C" if gpu else None,
        f"{worker['kv_used']:.0%}",
        worker["num_running"],
        worker["num_waiting"],
        f"{worker['tokens_per_s']:.1f}",
        None if step_ms is None else f"{step_ms:.1f} ms",
        f"{order['wanted']} by {order['by']}" if order else None,
        worker["why"] or None,
    ]
