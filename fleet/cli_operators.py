"""`headrace operators`: who may log in at the dashboard, written directly to the database.

A password is asked for on a terminal, twice, or read from standard input (one line); it never
stands on a command line, where others could read it.
"""

import sys
from typing import Annotated

import typer

from headrace.contract.roles import Role
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import invocation, operators_at
from headrace.fleet.show import as_json_option, note, print_json, print_table

app = typer.Typer(help="Operators of the dashboard (needs the database).", no_args_is_help=True)

Json = Annotated[bool, as_json_option]
Name = Annotated[str, typer.Argument(help="Name of the operator.", metavar="NAME")]

COLUMNS = ("name", "role", "created_at", "last_login_at", "locked_until", "disabled_at")


@app.command()
def create(
    context: typer.Context,
    name: Name,
    role: Annotated[Role, typer.Option(help="What it may do.")] = Role.VIEWER,
    if_none: Annotated[
        bool, typer.Option("--if-none", help="Only the first: do nothing where there is one.")
    ] = False,
    json: Json = False,
) -> None:
    """Make an operator; the password comes from the terminal or from standard input."""
    with operators_at(invocation(context).database_url()) as operators:
        if if_none and operators.list():
            _say({"name": name, "created": False}, "there is an operator: none is made", json)
            return
        operators.create(name=name, password=_password(), role=role)
    _say({"name": name, "role": role, "created": True}, f"{name} may log in as {role}", json)


@app.command("list")
def list_operators(context: typer.Context, json: Json = False) -> None:
    """List all operators by name."""
    with operators_at(invocation(context).database_url()) as operators:
        rows = [dict(row) for row in operators.list()]
    if json:
        print_json({"object": "list", "data": rows})
    else:
        print_table(COLUMNS, ([row.get(name) for name in COLUMNS] for row in rows))


@app.command()
def password(context: typer.Context, name: Name, json: Json = False) -> None:
    """Give a new password; ends the operator's sessions and its lock."""
    with operators_at(invocation(context).database_url()) as operators:
        operators.operator(name)  # unknown: said before anything is typed
        operators.set_password(name, _password())
    _say({"name": name, "changed": True}, "the password is changed", json)


@app.command()
def role(
    context: typer.Context,
    name: Name,
    role: Annotated[Role, typer.Argument(help="What it may do from now on.")],
    json: Json = False,
) -> None:
    """Give another role; ends the operator's sessions."""
    with operators_at(invocation(context).database_url()) as operators:
        operators.set_role(name, role)
    _say({"name": name, "role": role}, f"{name} is {role}", json)


@app.command()
def disable(context: typer.Context, name: Name, json: Json = False) -> None:
    """Log an operator out and let it log in no more."""
    with operators_at(invocation(context).database_url()) as operators:
        operators.disable(name)
    _say({"name": name, "disabled": True}, "disabled", json)


@app.command()
def enable(context: typer.Context, name: Name, json: Json = False) -> None:
    """Let a disabled or locked operator log in again."""
    with operators_at(invocation(context).database_url()) as operators:
        operators.enable(name)
    _say({"name": name, "disabled": False}, "enabled", json)


def _password() -> str:
    if sys.stdin.isatty():
        first = typer.prompt("Password", hide_input=True, err=True)
        if typer.prompt("Again", hide_input=True, err=True) != first:
            raise FleetError("the two passwords differ: nothing was changed, try again")
        return first
    line = sys.stdin.readline()
    if not line.rstrip("\r\n"):
        raise FleetError("a password was expected on standard input; it is empty: send one line")
    return line.rstrip("\r\n")


def _say(document: dict[str, object], text: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        note(text)
