"""`headrace keys`: API keys, made and revoked directly in the database.

Whoever can reach the database may make keys. So may an admin through /v1/admin/keys, but the first
key and the first operator come from here.
"""

from typing import Annotated

import typer

from headrace.contract.roles import Role
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import accounts_at, invocation
from headrace.fleet.show import as_json_option, note, out, print_json, print_table

app = typer.Typer(help="API keys (needs the database).", no_args_is_help=True)

Json = Annotated[bool, as_json_option]

COLUMNS = ("id", "prefix", "name", "tenant", "role", "created_at", "last_used_at", "revoked_at")


@app.command()
def create(
    context: typer.Context,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "cli",
    tenant: Annotated[str, typer.Option(help="Whose jobs it sees; made if new.")] = "default",
    role: Annotated[
        Role | None, typer.Option(help="What it may do under /v1/admin; none: nothing.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a key and print it; it is shown this once."""
    for what, given in (("name", name), ("tenant", tenant)):
        if not given.strip() or "\0" in given or len(given) > 200:
            raise FleetError(f"--{what} is {given[:40]!r}: give 1 to 200 characters, no NUL")
    with accounts_at(invocation(context).database_url()) as accounts:
        key = accounts.create_key(tenant=tenant, name=name, role=role)
    if json:
        print_json({"id": key.id, "tenant_id": key.tenant_id, "role": role, "key": key.secret})
    else:
        out.print(key.secret)
        note(f"{key.id} for tenant {tenant}: keep it, it is not shown again")


@app.command("list")
def list_keys(context: typer.Context, json: Json = False) -> None:
    """List all keys, newest first; the keys themselves are kept nowhere."""
    with accounts_at(invocation(context).database_url()) as accounts:
        rows = [dict(row) for row in accounts.list_keys()]
    if json:
        print_json({"object": "list", "data": rows})
    else:
        print_table(COLUMNS, ([row.get(name) for name in COLUMNS] for row in rows))


@app.command()
def revoke(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="Id or prefix of the key.")],
    json: Json = False,
) -> None:
    """Revoke a key; gateways refuse it within seconds."""
    with accounts_at(invocation(context).database_url()) as accounts:
        revoked = accounts.revoke_key(key)
    if not revoked:
        raise FleetError(f"no live key has the id or prefix {key[:40]!r}: see `headrace keys list`")
    if json:
        print_json({"key": key, "revoked": True})
    else:
        note("revoked")
