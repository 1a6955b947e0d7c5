"""The command line `headrace`: options, errors and exit codes; the work is done elsewhere.

Exit codes: 0 done, 1 refused or failed (the reason on stderr as `code: detail`), 2 wrong usage.
Every command takes --json: one document, or JSON lines, on standard output, and nothing else there.

This is the entry point of the CLI's process, so the environment is read here, once.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer
from pydantic import SecretStr

from headrace.contract.errors import HeadraceError
from headrace.contract.settings import FleetSettings
from headrace.fleet import (
    cli_admin_jobs,
    cli_admin_queues,
    cli_admin_workers,
    cli_audit,
    cli_dead_letters,
    cli_jobs,
    cli_keys,
    cli_operators,
    programs,
)
from headrace.fleet.client import ApiProblem
from headrace.fleet.invocation import Invocation, invocation
from headrace.fleet.show import as_json_option, note, print_json
from headrace.fleet.top import top

app = typer.Typer(
    name="headrace",
    help="A self-hosted fleet for asynchronous LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_keys.app, name="keys")
app.add_typer(cli_operators.app, name="operators")
cli_audit.register(app)
cli_jobs.register(app)
app.command()(top)
admin = typer.Typer(help="What operators do; needs a key with a role.", no_args_is_help=True)
admin.add_typer(cli_admin_jobs.app, name="jobs")
admin.add_typer(cli_admin_workers.app, name="workers")
admin.add_typer(cli_admin_queues.app, name="queues")
admin.add_typer(cli_dead_letters.app, name="dead-letters")
app.add_typer(admin, name="admin")

Json = Annotated[bool, as_json_option]


@app.callback()
def options(
    context: typer.Context,
    api_url: Annotated[str | None, typer.Option(help="Address of the API.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Key; HEADRACE_API_KEY keeps it out of the process list.")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Data folder of the fleet.")] = None,
) -> None:
    """Take the options that all commands share."""
    secret = None if api_key is None else SecretStr(api_key)
    context.obj = invocation(context).change(api_url=api_url, api_key=secret, data_dir=data_dir)


@app.command()
def up(context: typer.Context, json: Json = False) -> None:
    """Start a whole fleet in the data folder and keep it up until Ctrl-C."""
    from headrace.fleet import up as running  # the servers' code: not needed by the other commands

    running.up(invocation(context), json)


@app.command()
def demo(context: typer.Context, json: Json = False) -> None:
    """Start a fleet, ask the model one question, show the answer, and stop everything."""
    from headrace.fleet import up as running

    running.demo(invocation(context), json)


@app.command()
def gateway(context: typer.Context, json: Json = False) -> None:
    """Run the HTTP API (gunicorn)."""
    _become(context, programs.gateway_argv(), json)


@app.command()
def worker(context: typer.Context, json: Json = False) -> None:
    """Run one worker: courier and engine. Without HEADRACE_MODEL it serves the embedded model."""
    found = invocation(context)
    changes: dict[str, str] = {}
    if not found.environ.get("HEADRACE_MODEL"):
        from headrace.fleet.smollm2 import ensure_model  # imports torch

        folder = found.data_folder / "models" / programs.EMBEDDED_MODEL
        changes["HEADRACE_MODEL"] = str(ensure_model(folder))
    _become(context, programs.worker_argv(), json, changes)


@app.command()
def tasks(context: typer.Context, json: Json = False) -> None:
    """Run the periodic tasks: relay, sweeper, deadlines, retention (Celery)."""
    schedule = Path(tempfile.mkdtemp(prefix="headrace-")) / "celery-beat"
    _become(context, programs.tasks_argv(schedule), json)


@app.command()
def migrate(context: typer.Context, json: Json = False) -> None:
    """Bring the database to the newest schema."""
    from headrace.fleet.migrate import migrate as run

    revision = run(invocation(context).database_url())
    if json:
        print_json({"revision": revision})
    else:
        note(f"the database is at revision {revision}")


def _become(
    context: typer.Context,
    argv: list[str],
    as_json: bool,
    changes: Mapping[str, str] = MappingProxyType({}),  # to the environment
) -> None:
    """Replace this process, so that signals and the exit code are the program's own."""
    if as_json:
        print_json({"argv": argv})
    os.execve(argv[0], argv, {**invocation(context).environ, **changes})


def run(argv: Sequence[str], environ: dict[str, str]) -> int:
    """Run one command; return the exit code."""
    try:
        settings = FleetSettings.from_env(environ)
        app(list(argv), obj=Invocation(environ, settings), prog_name="headrace")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except ApiProblem as problem:
        note(f"{problem.problem}: {problem.detail}")
        return 1
    except HeadraceError as error:
        note(f"{error.code}: {error.detail}")
        return 1
    except BrokenPipeError:  # `headrace jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def main() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(run(sys.argv[1:], dict(os.environ)))
