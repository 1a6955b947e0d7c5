"""The first operator of a fleet: `headrace up` makes one, so that somebody can log in.

Its password is a secret of the data folder: it is written there, 0600, before it is used, so a
start that fails later does not lose it.

Called by `supervise`.
"""

from dataclasses import dataclass
from pathlib import Path

from headrace.contract.roles import Role
from headrace.fleet.folder import secret
from headrace.fleet.invocation import operators_at

NAME = "admin"
FILE = "operator-password"


@dataclass(frozen=True, slots=True)
class FirstOperator:
    name: str  # empty: others made the operators
    password: str  # as it was made; whoever changed it knows
    is_new: bool


def ensure_operator(database_url: str, folder: Path) -> FirstOperator:
    """Make an admin if there is no operator at all; else return the one that a start made."""
    with operators_at(database_url) as operators:
        names = {row["name"] for row in operators.list()}
        if not names:
            password = secret(folder / FILE)
            operators.create(name=NAME, password=password, role=Role.ADMIN)
            return FirstOperator(NAME, password, is_new=True)
    if NAME in names and (folder / FILE).exists():
        return FirstOperator(NAME, secret(folder / FILE), is_new=False)
    return FirstOperator("", "", is_new=False)
