"""compose.yaml as `docker compose` reads it: anchors merged, `.env` filled in.

Called by: the compose tests beside it.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from headrace.contract import settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"

#: Our own services, with the settings each reads.
PROGRAMS = {
    "migrate": settings.FleetSettings,
    "gateway": settings.GatewaySettings,
    "worker": settings.WorkerSettings,
    "worker-gpu": settings.WorkerSettings,
    "tasks": settings.TasksSettings,
}
#: The services of each profile; those of none run always.
PROFILES = {
    "": {"redis", "postgres", "migrate", "gateway", "tasks"},
    "cpu": {"worker"},
    "gpu": {"worker-gpu"},
    "observability": {"prometheus", "grafana"},
    "proxy": {"proxy"},
}
ONE_SHOT = {"migrate"}

_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::-([^}]*))?\}")


def read_env(path: Path = ROOT / ".env") -> dict[str, str]:
    """Return the assignments of compose's variable file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def fill_in(text: str, variables: dict[str, str]) -> str:
    """Interpolate as compose does: `${X:-default}` where X is unset or empty, `$$` for `$`."""

    def value(match: re.Match[str]) -> str:
        name, default = match.groups()
        return "$" if name is None else variables.get(name) or default or ""

    return _VARIABLE.sub(value, text)


def read_compose(variables: dict[str, str]) -> dict[str, Any]:
    """Return compose.yaml with these variables."""

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(item) for item in node]
        return fill_in(node, variables) if isinstance(node, str) else node

    return walk(yaml.safe_load(TEXT))


def image_groups(service: str) -> set[str]:
    """Return the groups of deploy/requirements.py that the service's image holds."""
    target = COMPOSE["services"][service]["build"]["target"]
    return {
        "gateway": {"gateway"},
        "worker-cpu": {"gateway", "worker"},
        "worker-gpu": {"gateway", "worker", "gpu"},
    }[target]


def requirements_module() -> Any:
    """Import deploy/requirements.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("requirements", DEPLOY / "requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE = read_compose(read_env())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LONG_RUNNING = set(SERVICES) - ONE_SHOT
