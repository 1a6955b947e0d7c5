"""API keys: list, create, revoke.

A new key's secret is in the answer to its creation and nowhere else, also not in the audit log.

Called by: gateway/dashboard/admin_routes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from flask import Response, g
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from headrace.contract.accounts import Accounts
from headrace.contract.errors import NotFound
from headrace.contract.roles import Role
from headrace.gateway.dashboard.frame import render
from headrace.gateway.dashboard.reading import json_body
from headrace.gateway.jobs import json_response
from headrace.gateway.openapi import Operation
from headrace.gateway.services import Services

RoleName = Literal["viewer", "operator", "admin"]


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("must hold visible characters on one line")
    return text


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]


class KeyRequest(BaseModel):
    """A key to make."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Name = Field(description="What the key is for.")
    tenant: Name = Field(description="Whose jobs it sees; made if new.")
    role: RoleName | None = Field(default=None, description="What it may do under /v1/admin.")


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    prefix: str = Field(description="The part of the key that is no secret.")
    name: str
    tenant_id: str
    tenant: str
    role: RoleName | None
    created_at: datetime
    last_used_at: datetime | None = Field(description="To the minute.")
    revoked_at: datetime | None


class NewKeyAnswer(Key):
    key: str = Field(description="The whole key: it is not shown again.")


class KeyList(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Key]


class KeyArea:
    """What can be done with keys."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def list(self) -> dict[str, Any]:
        return {"keys": [dict(row) for row in self._accounts.list_keys()]}

    def create(self, wanted: KeyRequest) -> dict[str, Any]:
        role = None if wanted.role is None else Role(wanted.role)
        made = self._accounts.create_key(tenant=wanted.tenant, name=wanted.name, role=role)
        return {**self._key(made.id), "key": made.secret}

    def revoke(self, key_id: str) -> dict[str, Any]:
        """Revoke a key by its id; one that is revoked stays so."""
        key = self._key(key_id)
        self._accounts.revoke_key(key["id"])
        return self._key(key_id)

    def _key(self, key_id: str) -> dict[str, Any]:
        row = self._accounts.key(key_id) if key_id.isascii() and key_id.isprintable() else None
        if row is None:
            raise NotFound(f"there is no key of the id {key_id[:8]!r}...: see the list of keys")
        return dict(row)


class KeyRoutes:
    """The views of keys."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._area = KeyArea(services.accounts)

    def list(self) -> Response:
        return json_response(self._area.list())

    def create(self) -> Response:
        wanted = json_body(KeyRequest, self._settings)
        g.audit_details = wanted.model_dump()
        made = self._area.create(wanted)
        g.audit_target = made["id"]
        return json_response(made, status=201)

    def revoke(self, key_id: str) -> Response:
        return json_response(self._area.revoke(key_id))

    def page(self) -> Response:
        keys = self._area.list()["keys"]
        tenants = sorted({key["tenant"] for key in keys})
        return render("keys.html", keys=keys, tenants=tenants, roles=list(Role))


def operations(services: Services) -> list[Operation]:
    routes = KeyRoutes(services)
    return [
        Operation(
            "GET", "/v1/admin/keys", "admin_list_keys", routes.list,
            "List all keys, newest first, without their secrets.", {200: KeyList},
            role=Role.ADMIN,
        ),
        Operation(
            "POST", "/v1/admin/keys", "admin_create_key", routes.create,
            "Make a key; its secret is in this answer only.", {201: NewKeyAnswer},
            body=KeyRequest, problems=(400, 413, 415), role=Role.ADMIN, action="key.create",
        ),
        Operation(
            "POST", "/v1/admin/keys/<key_id>/revoke", "admin_revoke_key", routes.revoke,
            "Revoke a key; gateways refuse it within seconds.", {200: Key},
            problems=(404,), role=Role.ADMIN, action="key.revoke",
        ),
    ]  # fmt: skip


def page_operations(services: Services) -> list[Operation]:
    return [
        Operation(
            "GET", "/dashboard/keys", "keys_page", KeyRoutes(services).page, "API keys.",
            {200: "text/html"}, role=Role.ADMIN, is_page=True,
        ),
    ]  # fmt: skip
