"""`headrace admin queues`: see the queues; pause, resume or purge them.

It goes through the API, like the dashboard, so it needs a key with a role: viewer to list, operator
to act. What an action does is said in gateway/dashboard/queues.

Called by `cli`, which registers it.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from headrace.fleet.invocation import invocation
from headrace.fleet.show import as_json_option, note, print_json, print_table

app = typer.Typer(help="The queues: model, class, tenant.", invoke_without_command=True)

Json = Annotated[bool, as_json_option]
Model = Annotated[str | None, typer.Option(help="Only of this model; default: all.")]
JobClass = Annotated[str | None, typer.Option("--class", help="interactive or batch; all.")]
Tenant = Annotated[str | None, typer.Option(help="Its name or id; default: all.")]

COLUMNS = ("model", "class", "tenant", "state", "queued", "oldest_s", "held", "claimed by", "lag",
           "takeovers")  # fmt: skip


@app.callback()
def queues(context: typer.Context, json: Json = False) -> None:
    """The queues: model, class, tenant; without a command: list them."""
    if context.invoked_subcommand is None:
        list_queues(context, json)


@app.command("list")
def list_queues(context: typer.Context, json: Json = False) -> None:
    """List the queues that hold anything, and what is paused."""
    with invocation(context).client() as client:
        found = client.admin("GET", "queues")
    _show(found, json)


@app.command()
def pause(
    context: typer.Context,
    model: Model = None,
    job_class: JobClass = None,
    tenant: Tenant = None,
    json: Json = False,
) -> None:
    """Give no new job of these queues to a worker; what runs goes on."""
    body = {"model": model, "job_class": job_class, "tenant": tenant}
    with invocation(context).client() as client:
        found = client.admin("POST", "queues/pause", json=body)
    _show(found, json)


@app.command()
def resume(
    context: typer.Context,
    model: Model = None,
    job_class: JobClass = None,
    tenant: Tenant = None,
    json: Json = False,
) -> None:
    """Lift the pauses within these queues."""
    body = {"model": model, "job_class": job_class, "tenant": tenant}
    with invocation(context).client() as client:
        # Asked again after an answer that was lost it would find nothing to lift.
        found = client.admin("POST", "queues/resume", may_repeat=False, json=body)
    _show(found, json)


@app.command()
def purge(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Whose queue is emptied.", metavar="MODEL")],
    job_class: JobClass = None,
    tenant: Tenant = None,
    confirm: Annotated[
        str | None, typer.Option(help="The model's name again; asked for if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Cancel every job of these queues that never ran."""
    if confirm is None:
        confirm = typer.prompt(f"Type {model} to cancel what waits for it", err=True)
    body = {"model": model, "job_class": job_class, "tenant": tenant, "confirm": confirm}
    num_canceled, has_more = 0, True
    with invocation(context).client() as client:
        while has_more:  # a call ends so many at most
            done = client.admin("POST", "queues/purge", json=body)
            num_canceled, has_more = num_canceled + done["num_canceled"], done["has_more"]
    if json:
        print_json({"num_canceled": num_canceled})
    else:
        note(f"{num_canceled} jobs canceled")


def _show(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    print_table(COLUMNS, [_row(queue) for queue in found["queues"]])
    for one in found["pauses"]:
        parts = [one[name] or "all" for name in ("model", "job_class", "tenant")]
        note(f"paused: {' / '.join(parts)} by {one['paused_by']} since {one['paused_at']}")


def _row(queue: Mapping[str, Any]) -> list[object]:
    return [
        queue["model"],
        queue["job_class"],
        queue["tenant"],
        f"paused by {queue['paused_by']}" if queue["is_paused"] else "active",
        queue["num_queued"],
        queue["oldest_s"],
        queue["num_held"],
        ", ".join(f"{one['worker']} ({one['num_jobs']})" for one in queue["claimed_by"]) or None,
        queue["lag"],
        queue["num_takeovers"],
    ]
