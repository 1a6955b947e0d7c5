"""What an operator, or a key made for one, may do to the fleet.

    viewer     sees everything: workers, queues, jobs of all tenants
    operator   also acts: cancels, retries, drains, pauses, tries the playground
    admin      also decides who may: keys, operators, the audit log

Called by: contract.accounts, contract.operators, gateway/dashboard, the CLI.
"""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, other: Role) -> bool:
        """True when who has this role may do what `other` may."""
        order = list(Role)
        return order.index(self) >= order.index(other)
