"""`headrace audit`: what was done to the fleet, by whom, from the API (needs a key of role admin).

Called by `cli`, which registers it.
"""

from typing import Annotated, Any

import typer

from headrace.fleet.invocation import invocation
from headrace.fleet.show import as_json_option, note, print_json, print_table

COLUMNS = ("at", "actor", "role", "action", "target", "outcome", "address")
#: Rows that the API gives at once.
PAGE = 500


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(audit)


def audit(
    context: typer.Context,
    actor: Annotated[str | None, typer.Option(help="Only of this operator or key id.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, such as worker.drain.")] = None,
    outcome: Annotated[str | None, typer.Option(help="Only so ended: done, or a code.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most rows to print.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: Annotated[bool, as_json_option] = False,
) -> None:
    """List what operators and keys did to the fleet, newest first."""
    found: list[dict[str, Any]] = []
    with invocation(context).client() as client:
        while True:
            page = client.get(
                "/v1/admin/audit",
                actor=actor,
                action=action,
                outcome=outcome,
                limit=min(limit - len(found), PAGE),
                cursor=cursor,
            )
            found += page["audit"]
            cursor = page["next_cursor"]
            if cursor is None or len(found) >= limit:
                break
    if json:
        print_json({"audit": found, "next_cursor": cursor})
        return
    print_table(COLUMNS, ([row.get(name) for name in COLUMNS] for row in found))
    if cursor is not None:
        note(f"more: --cursor {cursor}")
