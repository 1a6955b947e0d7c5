"""`headrace admin dead-letters`: what jobs died of, and replays of one, some or all of them.

It goes through the API, like the dashboard, so it needs a key with a role: viewer to look, operator
to replay. `replay` of one id makes its new job at once; of several, or of a filter, it only counts
unless it is told the count, and the tasks process then works them off at the rate.

Called by `cli`, which registers it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from headrace.fleet.client import Client
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import invocation
from headrace.fleet.job_body import without_none
from headrace.fleet.show import as_json_option, note, plain, print_json, print_table

app = typer.Typer(help="Jobs that killed their engine, and their replays.", no_args_is_help=True)

Json = Annotated[bool, as_json_option]
ReplayId = Annotated[str, typer.Argument(help="Id of the replay.", metavar="REPLAY")]

# What letters are searched by: the same for `groups`, `list` and `replay`.
Signature = Annotated[str | None, typer.Option(help="What they died of, all of it.")]
Model = Annotated[str | None, typer.Option(help="Only of this model.")]
Tenant = Annotated[str | None, typer.Option(help="Its name or id.")]
Replayed = Annotated[bool | None, typer.Option(help="Only those that were, or were not.")]
After = Annotated[str | None, typer.Option(help="Died from, ISO 8601; without zone UTC.")]
Before = Annotated[str | None, typer.Option(help="Died before.")]

GROUP_COLUMNS = ("signature", "letters", "to replay", "first", "last", "models", "tenants")
COLUMNS = ("job_id", "signature", "tenant", "model", "num_runs", "created_at", "replayed_as")
FIELDS = (*COLUMNS, "replayed_at", "replayed_status", "detail")
REPLAY_COLUMNS = ("id", "state", "done", "refused", "matched", "per min", "by", "created_at")


@app.command()
def groups(
    context: typer.Context,
    signature: Signature = None,
    model: Model = None,
    tenant: Tenant = None,
    replayed: Replayed = None,
    created_after: After = None,
    created_before: Before = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most signatures.")] = 100,
    json: Json = False,
) -> None:
    """Count the letters by signature, the newest death first."""
    wanted = _criteria(signature, model, tenant, created_after, created_before, replayed)
    with invocation(context).client() as client:
        found = client.admin("GET", "dead-letters/groups", params=wanted | {"limit": limit})
    if json:
        print_json(found)
        return
    print_table(GROUP_COLUMNS, map(_group_row, found["groups"]))
    if (num_more := found["num_groups"] - len(found["groups"])) > 0:
        note(f"{num_more} more signatures are older: narrow the search, or raise --limit")


@app.command("list")
def list_letters(
    context: typer.Context,
    signature: Signature = None,
    model: Model = None,
    tenant: Tenant = None,
    replayed: Replayed = None,
    created_after: After = None,
    created_before: Before = None,
    limit: Annotated[int, typer.Option(min=1, help="Most letters to print.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: Json = False,
) -> None:
    """List the letters that match, newest job first."""
    wanted = _criteria(signature, model, tenant, created_after, created_before, replayed)
    found: list[dict[str, Any]] = []
    with invocation(context).client() as client:
        while True:
            query = wanted | {"limit": min(limit - len(found), 100)}
            query |= without_none({"cursor": cursor})
            page = client.admin("GET", "dead-letters", params=query)
            found += page["dead_letters"]
            cursor = page["next_cursor"]
            if cursor is None or len(found) >= limit:
                break
    if json:
        print_json({"dead_letters": found, "next_cursor": cursor})
        return
    print_table(COLUMNS, [[letter[name] for name in COLUMNS] for letter in found])
    if cursor is not None:
        note(f"more: --cursor {cursor}")


@app.command()
def show(
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")],
    json: Json = False,
) -> None:
    """Show a job's letter."""
    with invocation(context).client() as client:
        letter = client.admin("GET", _path("dead-letters", "job", job_id))
    if json:
        print_json(letter)
    else:
        print_table(("field", "value"), [(name, letter[name]) for name in FIELDS])


@app.command()
def replay(
    context: typer.Context,
    job_ids: Annotated[
        list[str] | None, typer.Argument(help="Letters by their jobs' ids.", metavar="[JOB]...")
    ] = None,
    again: Annotated[bool, typer.Option(help="One job: also if it was replayed.")] = False,
    signature: Signature = None,
    model: Model = None,
    tenant: Tenant = None,
    created_after: After = None,
    created_before: Before = None,
    everything: Annotated[bool, typer.Option("--all", help="Instead of a filter.")] = False,
    rate: Annotated[int | None, typer.Option(help="Jobs a minute, 1 to 6000.")] = None,
    expect: Annotated[
        int | None, typer.Option(min=0, help="Replay so many; without it only count.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a new job of one letter now, or of many at a rate."""
    wanted = _criteria(signature, model, tenant, created_after, created_before)
    if job_ids and len(job_ids) == 1 and not wanted and rate is None:
        with invocation(context).client() as client:
            _replay_one(client, job_ids[0], again, json)
        return
    if again:
        raise FleetError("--again was given with many letters: it is for one job, without --rate")
    wanted |= without_none({"job_ids": job_ids or None})
    body = {"filter": wanted, "all": everything, "dry_run": expect is None}
    body |= without_none({"rate_per_min": rate, "expect": expect})
    with invocation(context).client() as client:
        # Asked again after an answer that was lost it would say that a replay is under way.
        done = client.admin("POST", "replays", may_repeat=expect is None, json=body)
    if json:
        print_json(done)
    elif done["replay"] is None:
        note(f"{done['num_matched']} letters match: repeat with --expect {done['num_matched']}"
             + ("" if rate else " --rate N"))  # fmt: skip
    else:
        note(f"{done['replay']['id']}: {done['num_matched']} letters, {rate} jobs a minute")


@app.command()
def replays(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=100, help="Most replays.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: Json = False,
) -> None:
    """List the replays, newest first."""
    with invocation(context).client() as client:
        query = {"limit": limit} | without_none({"cursor": cursor})
        found = client.admin("GET", "replays", params=query)
    if json:
        print_json(found)
        return
    print_table(REPLAY_COLUMNS, map(_replay_row, found["replays"]))
    if found["next_cursor"] is not None:
        note(f"more: --cursor {found['next_cursor']}")


@app.command()
def stop(context: typer.Context, replay_id: ReplayId, json: Json = False) -> None:
    """End a replay where it is; the jobs it has made stay."""
    with invocation(context).client() as client:
        # Asked again after an answer that was lost it would say that the replay has ended.
        path = _path("replays", "replay", replay_id, "stop")
        stopped = client.admin("POST", path, may_repeat=False)
    if json:
        print_json(stopped)
    else:
        note(f"stopped after {stopped['num_done']} of {stopped['num_matched']}")


def _replay_one(client: Client, job_id: str, again: bool, as_json: bool) -> None:
    path = _path("dead-letters", "job", job_id, "replay")
    made = client.admin("POST", path, may_repeat=False, json={"again": again})
    if as_json:
        print_json(made)
    else:
        note(plain(made["id"]))


def _criteria(
    signature: str | None,
    model: str | None,
    tenant: str | None,
    created_after: str | None,
    created_before: str | None,
    replayed: bool | None = None,
) -> dict[str, Any]:
    return without_none(
        {
            "signature": signature,
            "model": model,
            "tenant": tenant,
            "created_after": created_after,
            "created_before": created_before,
            "replayed": None if replayed is None else str(replayed).lower(),
        }
    )


def _path(area: str, kind: str, name: str, action: str = "") -> str:
    if not name.replace("_", "").isalnum() or not name.isascii():
        raise FleetError(f"{name[:60]!r} is no id of a {kind}: copy it from a list")
    return f"{area}/{name}/{action}".rstrip("/")


def _group_row(group: Mapping[str, Any]) -> Sequence[object]:
    names = ("signature", "num_letters", "num_unreplayed", "first_at", "last_at")
    lists = (", ".join(group["models"]), ", ".join(group["tenants"]))
    return [*(group[name] for name in names), *lists]


def _replay_row(one: Mapping[str, Any]) -> Sequence[object]:
    names = ("id", "state", "num_done", "num_refused", "num_matched", "rate_per_min", "by")
    return [*(one[name] for name in names), one["created_at"]]
