"""The route table of the operator's view: what each area brings, one after the other.

To add an area: a module with `operations(services)` for /v1/admin and `page_operations(services)`
for /dashboard, and its lines here.

Called by: gateway/routes.
"""

from __future__ import annotations

from headrace.gateway.dashboard import (
    audit,
    dead_letter_pages,
    dead_letters,
    frame,
    job_pages,
    jobs,
    keys,
    live_routes,
    login,
    operators,
    playground,
    workers,
)
from headrace.gateway.openapi import Operation
from headrace.gateway.services import Services


def operations(services: Services) -> list[Operation]:
    """Return all operations that need a role, and the way to one."""
    return [
        *login.operations(services),
        *login.page_operations(services),
        *live_routes.operations(services),
        *frame.asset_operations(),
        *keys.operations(services),
        *keys.page_operations(services),
        *operators.operations(services),
        *operators.page_operations(services),
        *audit.operations(services),
        *audit.page_operations(services),
        *playground.operations(services),
        *playground.page_operations(services),
        *workers.operations(services),
        *workers.page_operations(services),
        *jobs.operations(services),
        *job_pages.page_operations(services),
        *dead_letters.operations(services),
        *dead_letter_pages.page_operations(services),
    ]
