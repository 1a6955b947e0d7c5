"""`headrace admin jobs`: search the jobs of all tenants, look into one, and act on one or many.

It goes through the API, like the dashboard, so it needs a key with a role (`headrace keys create
--role`): viewer to look, operator to act. `bulk` only counts unless it is told the count.

Called by `cli`, which registers it.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from headrace.fleet.client import Client
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import invocation
from headrace.fleet.job_body import parse_metadata, without_none
from headrace.fleet.show import as_json_option, note, plain, print_json, print_table

app = typer.Typer(help="The jobs of all tenants.", no_args_is_help=True)

Json = Annotated[bool, as_json_option]
JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="ID")]
Priority = Annotated[str, typer.Argument(help="high, normal or low.", metavar="PRIORITY")]

# What jobs are searched by: the same for `search` and `bulk`.
Tenant = Annotated[str | None, typer.Option(help="Its name or id.")]
Status = Annotated[str | None, typer.Option(help="One state, or several with commas.")]
Model = Annotated[str | None, typer.Option(help="Only of this model.")]
JobClass = Annotated[str | None, typer.Option("--class", help="interactive or batch.")]
Worker = Annotated[str | None, typer.Option(help="Worker of the newest attempt.")]
Error = Annotated[str | None, typer.Option(help="Part of the error's code or text.")]
Meta = Annotated[str | None, typer.Option(help="KEY:VALUE of the metadata.")]
After = Annotated[str | None, typer.Option(help="Created from, ISO 8601; without zone UTC.")]
Before = Annotated[str | None, typer.Option(help="Created before.")]

COLUMNS = ("id", "status", "tenant", "model", "class", "priority", "worker", "created_at", "error")
#: Seconds a bulk action may take: 100,000 jobs in transactions of 500.
BULK_TIMEOUT_S = 600.0


@app.command()
def search(
    context: typer.Context,
    id: Annotated[str | None, typer.Option(help="An id, or its beginning.")] = None,
    tenant: Tenant = None,
    status: Status = None,
    model: Model = None,
    job_class: JobClass = None,
    worker: Worker = None,
    error: Error = None,
    meta: Meta = None,
    created_after: After = None,
    created_before: Before = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to print.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: Json = False,
) -> None:
    """List the jobs that match, newest first."""
    wanted = _criteria(tenant, status, model, job_class, worker, error, meta)
    wanted |= without_none(
        {"id": id, "created_after": created_after, "created_before": created_before}
    )
    found: list[dict[str, Any]] = []
    with invocation(context).client() as client:
        while True:
            query = wanted | {"limit": min(limit - len(found), 100)}
            page = client.admin("GET", "jobs", params=query | without_none({"cursor": cursor}))
            found += page["jobs"]
            cursor = page["next_cursor"]
            if cursor is None or len(found) >= limit:
                break
    if json:
        print_json({"jobs": found, "next_cursor": cursor})
        return
    print_table(COLUMNS, map(_row, found))
    if cursor is not None:
        note(f"more: --cursor {cursor}")


@app.command()
def show(context: typer.Context, job_id: JobId, json: Json = False) -> None:
    """Show a job, its attempts, and where its time went."""
    with invocation(context).client() as client:
        job = client.admin("GET", _path(job_id))
    if json:
        print_json(job)
        return
    rows = [(name, job.get(name)) for name in (*COLUMNS[:-1], "attempt", "made_from")]
    rows += [("error", _error(job)), ("made anew as", " ".join(job["retried_as"]) or None)]
    print_table(("field", "value"), rows)
    print_table(
        ("part", "attempt", "worker", "from ms", "ms"),
        [
            (
                s["span"],
                s["attempt"],
                s["worker"],
                f"{s['start_ms']:.1f}",
                f"{s['duration_ms']:.1f}",
            )
            for s in job["timeline"]
        ],
    )


@app.command()
def cancel(context: typer.Context, job_id: JobId, json: Json = False) -> None:
    """Cancel a job of any tenant; a running one ends within a step."""
    with invocation(context).client() as client:
        job = client.admin("POST", _path(job_id, "cancel"))
    _tell(job, f"{job['status']}", json)


@app.command()
def retry(context: typer.Context, job_id: JobId, json: Json = False) -> None:
    """Make a new job of one that failed, was canceled or expired."""
    with invocation(context).client() as client:
        job = client.admin("POST", _path(job_id, "retry"), may_repeat=False)
    _tell(job, job["id"], json)


@app.command()
def clone(
    context: typer.Context,
    job_id: JobId,
    prompt: Annotated[str | None, typer.Option(help="Instead of its prompt or chat.")] = None,
    model: Annotated[str | None, typer.Option()] = None,
    max_tokens: Annotated[int | None, typer.Option()] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    job_class: JobClass = None,
    priority: Annotated[str | None, typer.Option(help="high, normal or low.")] = None,
    deadline_s: Annotated[float | None, typer.Option(help="Not worth it after, seconds.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; repeatable.")] = None,
    json: Json = False,
) -> None:
    """Make a new job of any, with edits."""
    sampling = without_none(
        {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    )
    edits = without_none(
        {
            "prompt": prompt,
            "model": model,
            "sampling": sampling or None,
            "class": job_class,
            "priority": priority,
            "deadline_s": deadline_s,
            "metadata": parse_metadata(metadata) if metadata else None,
        }
    )
    with invocation(context).client() as client:
        job = client.admin("POST", _path(job_id, "clone"), may_repeat=False, json=edits)
    _tell(job, job["id"], json)


@app.command()
def priority(context: typer.Context, job_id: JobId, to: Priority, json: Json = False) -> None:
    """Give a queued job another priority."""
    with invocation(context).client() as client:
        job = client.admin("POST", _path(job_id, "priority"), json={"priority": to})
    _tell(job, f"priority {job['priority']}", json)


@app.command()
def bulk(
    context: typer.Context,
    action: Annotated[str, typer.Argument(help="cancel, retry or priority.", metavar="ACTION")],
    tenant: Tenant = None,
    status: Status = None,
    model: Model = None,
    job_class: JobClass = None,
    worker: Worker = None,
    error: Error = None,
    meta: Meta = None,
    created_after: After = None,
    created_before: Before = None,
    to: Annotated[str | None, typer.Option(help="With priority: high, normal or low.")] = None,
    expect: Annotated[
        int | None, typer.Option(min=0, help="Do it to so many; without it only count.")
    ] = None,
    json: Json = False,
) -> None:
    """Count the jobs that match, or with --expect act on all of them."""
    wanted = _criteria(tenant, status, model, job_class, worker, error, meta)
    wanted |= without_none({"created_after": created_after, "created_before": created_before})
    body = {"action": action, "filter": wanted, "dry_run": expect is None}
    body |= without_none({"expect": expect, "priority": to})
    with invocation(context).client() as client:
        done = _run_bulk(client, body)
    if json:
        print_json(done)
    elif expect is None:
        note(f"{done['num_matched']} jobs match: repeat with --expect {done['num_matched']}")
    else:
        note(f"{done['num_done']} of {done['num_matched']} done, {done['num_refused']} refused")
    if done["stopped"]:
        raise FleetError(f"it stopped on the way ({done['stopped']}): run it again")


def _run_bulk(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    return client.admin(
        "POST", "jobs/bulk", may_repeat=body["dry_run"], json=body, timeout=BULK_TIMEOUT_S
    )


def _criteria(
    tenant: str | None,
    status: str | None,
    model: str | None,
    job_class: str | None,
    worker: str | None,
    error: str | None,
    meta: str | None,
) -> dict[str, Any]:
    return without_none(
        {
            "tenant": tenant,
            "status": status,
            "model": model,
            "job_class": job_class,
            "worker": worker,
            "error": error,
            "meta": meta,
        }
    )


def _path(job_id: str, action: str = "") -> str:
    if not job_id.replace("_", "").isalnum() or not job_id.isascii():
        raise FleetError(f"{job_id[:60]!r} is no job id: ids look like job_0192...")
    return f"jobs/{job_id}/{action}".rstrip("/")


def _error(job: Mapping[str, Any]) -> str | None:
    error = job.get("error")
    return None if error is None else f"{error['code']}: {error['detail']}"


def _row(job: Mapping[str, Any]) -> list[object]:
    return [_error(job) if name == "error" else job.get(name) for name in COLUMNS]


def _tell(job: Mapping[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        note(plain(text))
