"""Who acts on the fleet: an operator who logged in, or a key that was given a role.

Called by: everything in gateway/dashboard; made by its guard.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.contract.roles import Role


@dataclass(frozen=True, slots=True)
class Actor:
    """As the audit log names them."""

    name: str  # an operator's name, or a key's id
    kind: str  # operator | key
    role: Role
    address: str  # where the request came from
