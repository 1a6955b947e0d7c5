"""Our own programs as command lines: what `headrace NAME` becomes and what `up` starts.

The environment carries all their settings; a command line holds no secret and no address.

Called by `cli` (which becomes the program) and `supervise` (which starts it as a child).
"""

import sys
from collections.abc import Mapping
from pathlib import Path

#: The folder, and so the name, of the model that is served when HEADRACE_MODEL names none.
EMBEDDED_MODEL = "smollm2-135m-instruct"


def gateway_argv() -> list[str]:
    app = "headrace.gateway.app:create_app_from_env()"
    return [sys.executable, "-m", "gunicorn", "-c", "python:headrace.gateway.server", app]


def worker_argv() -> list[str]:
    return [sys.executable, "-m", "headrace.worker"]


def tasks_argv(schedule: Path) -> list[str]:
    """`schedule` is where Celery's beat notes what ran last; it may be lost."""
    celery = [sys.executable, "-m", "celery", "-A", "headrace.gateway.tasks", "worker"]
    # One process and no pool: the tasks only wait for Postgres and Redis.
    # It talks to no other of its kind, and so subscribes to no channel of Celery's.
    alone = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    return [*celery, *alone, "-B", "--pool", "solo", "--concurrency", "1", "-s", str(schedule)]


def migrate_argv() -> list[str]:
    return [sys.executable, "-m", "headrace.fleet", "migrate"]


def model_argv(folder: Path) -> list[str]:
    return [sys.executable, "-m", "headrace.fleet.smollm2", "--out", str(folder)]


def child_environment(environ: Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with `changes`, for a child.

    A `_FILE` twin of a changed variable would win over it and is dropped; so is the CLI's own key,
    which no child needs.
    """
    twins = {f"{name}_FILE" for name in (*changes, "HEADRACE_API_KEY")}
    kept = {
        name: value
        for name, value in environ.items()
        if name not in twins and name != "HEADRACE_API_KEY"
    }
    return {**kept, **changes}
