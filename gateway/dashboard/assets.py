"""The dashboard's scripts, styles and pictures, under URLs that name their content.

A URL holds the hash of the file (`/dashboard/static/<hash>/style.css`), so a browser may keep it
for a year and still sees a new release at once. While gateways of two releases run side by side, a
page of one may ask the other for its files: a hash that is not ours is answered with the file we
have, not to be kept.

Invariants:
1. Only the files that were in the folder at the first use are served, by their plain names: a
   request's path never reaches the file system.
2. Everything is served from here: pages load nothing from other hosts.

Called by: gateway/dashboard/frame (URLs), gateway/dashboard/admin_routes (the route).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from flask import Response, request

from headrace.contract.errors import NotFound

FOLDER = Path(__file__).parent / "static"
URL_PREFIX = "/dashboard/static"
#: Seconds a file under its own hash may be kept: a year, the longest that caches agree on.
MAX_AGE_S = 365 * 24 * 3600
#: Characters of the SHA-256 in a URL: 64 bits, enough to tell releases apart.
HASH_LENGTH = 16

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, as it is sent."""

    content: bytes
    version: str  # beginning of its SHA-256
    media_type: str


@cache
def assets() -> Mapping[str, Asset]:
    """Return all files by name; read once a process."""
    found: dict[str, Asset] = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in _MEDIA_TYPES:
            content = path.read_bytes()
            version = hashlib.sha256(content).hexdigest()[:HASH_LENGTH]
            found[path.name] = Asset(content, version, _MEDIA_TYPES[path.suffix])
    return MappingProxyType(found)


def asset_url(name: str) -> str:
    """Return the URL of a file; KeyError for one that is not there, which is a template's fault."""
    return f"{URL_PREFIX}/{assets()[name].version}/{name}"


def send_asset(version: str, name: str) -> Response:
    """Answer `GET /dashboard/static/<version>/<name>`."""
    asset = assets().get(name)
    if asset is None:
        raise NotFound(f"the dashboard has no file {name[:60]!r}: reload the page")
    response = Response(asset.content, content_type=asset.media_type)
    response.set_etag(asset.version)
    if version == asset.version:
        response.headers["Cache-Control"] = f"public, max-age={MAX_AGE_S}, immutable"
    else:
        response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    response.make_conditional(request)
    return response
