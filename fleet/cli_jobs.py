"""`headrace submit`, `watch`, `jobs`, `cancel` and `models`: the API on the command line.

Called by `cli`, which registers them.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.fleet.batch import FAILED, submit_all
from headrace.fleet.client import Client
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import invocation
from headrace.fleet.job_body import parse_messages, parse_metadata, read_bodies, without_none
from headrace.fleet.show import (
    as_json_option,
    ending,
    note,
    print_event,
    print_json,
    print_table,
    print_text,
)

Json = Annotated[bool, as_json_option]
JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="ID")]

COLUMNS = ("id", "status", "model", "class", "priority", "created_at", "finish_reason")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (submit, watch, jobs, cancel, models):
        app.command()(command)


def submit(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What to ask.")] = None,
    messages: Annotated[
        str | None, typer.Option(help="A chat: JSON list of {role, content}, or @FILE.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Send PROMPT as a chat's message, or as it is.")
    ] = True,
    file: Annotated[Path | None, typer.Option(help="JSONL: the body of one job a line.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print tokens (of a file: results) as they come.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Default: the only one that is ready.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to make.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this; repeatable.")] = None,
    presence_penalty: Annotated[float | None, typer.Option()] = None,
    frequency_penalty: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    logprobs: Annotated[int | None, typer.Option(help="Likeliest tokens to name.")] = None,
    job_class: Annotated[str | None, typer.Option("--class", help="interactive or batch.")] = None,
    priority: Annotated[str | None, typer.Option(help="high, normal or low.")] = None,
    deadline_s: Annotated[float | None, typer.Option(help="Not worth it after, seconds.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="The same key and body make one job, however often sent.")
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; repeatable.")] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="With --file: jobs under way at once.")
    ] = 16,
    json: Json = False,
) -> None:
    """Submit one job, or every line of a file."""
    if (prompt is not None) + (messages is not None) + (file is not None) != 1:
        raise typer.BadParameter("give exactly one of PROMPT, --messages and --file")
    sampling = without_none(
        {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "seed": seed,
            "stop": stop,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "repetition_penalty": repetition_penalty,
            "logprobs": logprobs,
        }
    )
    body = without_none(
        {
            "model": model,
            "sampling": sampling,
            "class": job_class,
            "priority": priority,
            "deadline_s": deadline_s,
            "metadata": parse_metadata(metadata or []),
        }
    )
    with invocation(context).client() as client:
        if file is not None:
            bodies = read_bodies(file, body)
            _submit_file(client, bodies, idempotency_key, follow, concurrency, json)
            return
        body = {"model": model or _only_model(client), **body, **_input(prompt, messages, chat)}
        job = client.submit(body, idempotency_key)
        if follow:
            _follow(client, job["id"], json)
        elif json:
            print_json(job)
        else:
            print_text(f"{job['id']}\n")


def _submit_file(
    client: Client,
    bodies: list[dict[str, Any]],
    key: str | None,
    follow: bool,
    concurrency: int,
    as_json: bool,
) -> None:
    if any("model" not in body for body in bodies):
        name = _only_model(client)
        bodies = [{"model": name, **body} for body in bodies]
    num_bad = submit_all(
        client, bodies, key=key, follow=follow, concurrency=concurrency, as_json=as_json
    )
    if num_bad:
        raise FleetError(f"{num_bad} of {len(bodies)} jobs were refused or failed")


def _input(prompt: str | None, messages: str | None, chat: bool) -> dict[str, Any]:
    if messages is not None:
        return {"messages": parse_messages(messages)}
    if chat:
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _only_model(client: Client) -> str:
    ready = [entry["id"] for entry in client.models() if entry["ready"]]
    if len(ready) != 1:
        found = ", ".join(ready) or "none"
        raise FleetError(f"--model is not given, and the models that are ready are: {found}")
    return ready[0]


def _follow(client: Client, job_id: str, as_json: bool) -> None:
    status = ""
    for event in client.events(job_id):
        status = event.name
        if as_json:
            print_json({"event": event.name, "id": event.id, **event.data})
        else:
            print_event(event)
    if status in FAILED:
        raise typer.Exit(1)


def watch(context: typer.Context, job_id: JobId, json: Json = False) -> None:
    """Print a job's tokens from its first on, as they come; ends with the job."""
    with invocation(context).client() as client:
        _follow(client, job_id, json)


def jobs(
    context: typer.Context,
    status: Annotated[str | None, typer.Option(help="Only in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    job_class: Annotated[str | None, typer.Option("--class", help="Only of this class.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to print.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: Json = False,
) -> None:
    """List jobs, newest first."""
    found: list[dict[str, Any]] = []
    with invocation(context).client() as client:
        while True:
            page = client.jobs(
                status=status,
                model=model,
                limit=min(limit - len(found), 100),
                cursor=cursor,
                **{"class": job_class},
            )
            found += page["data"]
            cursor = page["next_cursor"]
            if cursor is None or len(found) >= limit:
                break
    if json:
        print_json({"object": "list", "data": found, "next_cursor": cursor})
        return
    print_table(COLUMNS, ([job.get(name) for name in COLUMNS] for job in found))
    if cursor is not None:
        note(f"more: --cursor {cursor}")


def cancel(context: typer.Context, job_id: JobId, json: Json = False) -> None:
    """Cancel a job; a running one ends within a step."""
    with invocation(context).client() as client:
        job = client.cancel(job_id)
    if json:
        print_json(job)
    else:
        note(ending(job["status"], job))


def models(context: typer.Context, json: Json = False) -> None:
    """List the models, and whether a worker is ready for them."""
    with invocation(context).client() as client:
        found = client.models()
    if json:
        print_json({"object": "list", "data": found})
    else:
        print_table(
            ("model", "longest sequence", "ready"),
            ([each["id"], each["max_seq_tokens"], each["ready"]] for each in found),
        )
