"""compose.yaml: its form, its settings and secrets, and its commands as local processes.

No container engine is needed. What a container would add is replaced here and nowhere else: the
hosts `redis` and `postgres` by the embedded servers, published and inner ports by free ones, and
the model's folder by the embedded model's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml

from headrace.contract import settings
from headrace.contract.settings import PREFIX, Settings
from headrace.fleet.child import start_child, stop_child

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROGRAMS = {
    "migrate": settings.FleetSettings,
    "gateway": settings.GatewaySettings,
    "worker": settings.WorkerSettings,
    "tasks": settings.TasksSettings,
}
PATIENCE_S = 120.0

#: The keys of the Compose specification that this file uses; a misspelt one is none of them.
SERVICE_KEYS = {
    *("build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image", "init"),
    *("ports", "restart", "secrets", "security_opt", "shm_size", "stop_grace_period", "volumes"),
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}


# -- form ------------------------------------------------------------------------------------


def test_the_services_are_the_fleet_and_every_key_is_known():
    assert set(SERVICES) == {"redis", "postgres", *PROGRAMS}
    top = {key for key in COMPOSE if not key.startswith("x-")}
    assert top == {"name", "services", "volumes", "secrets"}
    for name, service in SERVICES.items():
        assert set(service) <= SERVICE_KEYS, name
        health = service.get("healthcheck", {})
        assert set(health) <= HEALTH_KEYS, name
        for key in ("interval", "timeout", "start_period"):
            assert re.fullmatch(r"\d+s", health.get(key, "1s")), name


def test_only_the_gateway_publishes_a_port():
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["gateway"]
    assert SERVICES["gateway"]["ports"] == ["${HEADRACE_PORT:-8080}:8080"]
    assert SERVICES["gateway"]["environment"]["HEADRACE_BIND"] == "0.0.0.0:8080"


def test_what_a_service_waits_for_can_happen():
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            if wanted["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for {other}"
            else:
                assert wanted["condition"] == "service_completed_successfully"
                assert SERVICES[other]["restart"].startswith("on-failure"), other
    assert {SERVICES[name]["image"] for name in PROGRAMS} == {"headrace:0.1.0"}
    for name in PROGRAMS:  # without it compose tries to pull an image that only we have
        build = SERVICES[name]["build"]
        assert (ROOT / build["context"] / build["dockerfile"]).is_file()
    for name in ("gateway", "worker", "tasks"):
        assert set(SERVICES[name]["depends_on"]) == {"migrate", "redis", "postgres"}
        assert SERVICES[name]["restart"] == "unless-stopped"


def test_secrets_and_volumes_are_declared_and_used():
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])
    mounted = {v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", [])}
    assert mounted == set(COMPOSE["volumes"])


def test_no_secret_stands_in_the_file():
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|KEY|_URL", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value == f"/run/secrets/{Path(value).name}"
                assert Path(value).name in service["secrets"], f"{name}: {variable}"
        for mentioned in re.findall(r"/run/secrets/([\w.]+)", json.dumps(service)):
            assert mentioned in service["secrets"], f"{name}: {mentioned}"


def test_every_variable_is_a_setting_of_its_program():
    for name, cls in PROGRAMS.items():
        for variable in SERVICES[name]["environment"]:
            field_name = variable.removeprefix(PREFIX).removesuffix("_FILE").lower()
            owners = Settings.registry if cls is settings.FleetSettings else [cls]
            assert any(field_name in owner.model_fields for owner in owners), variable
    published = re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text())
    known = {PREFIX + f.upper() for cls in Settings.registry for f in cls.model_fields}
    assert set(published) <= known


def test_a_stop_waits_longer_than_the_drain():
    drain_s = float(SERVICES["worker"]["environment"]["HEADRACE_DRAIN_S"])
    assert float(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) >= drain_s + 10


# -- secrets and image -----------------------------------------------------------------------


def test_make_secrets_makes_what_compose_mounts_once(tmp_path):
    script = tmp_path / "deploy" / "make-secrets.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "deploy" / "make-secrets.sh").read_bytes())

    def make() -> dict[str, str]:
        subprocess.run(["sh", script], check=True, capture_output=True, timeout=30, cwd="/")
        return {p.name: p.read_text() for p in (script.parent / "secrets").iterdir()}

    made = make()
    files = {name: tmp_path / secret["file"] for name, secret in COMPOSE["secrets"].items()}
    assert set(made) == set(files) == {path.name for path in files.values()}
    assert make() == made
    assert script.parent.joinpath("secrets").stat().st_mode & 0o777 == 0o700
    assert all(len(made[name]) >= 32 for name in ("redis_password", "postgres_password"))
    assert made["redis_password"] != made["postgres_password"]
    environ = {
        "HEADRACE_REDIS_URL_FILE": str(files["redis_url"]),
        "HEADRACE_DATABASE_URL_FILE": str(files["database_url"]),
    }
    read = settings.TasksSettings.from_env(environ)
    assert made["redis_password"] in read.redis_url.get_secret_value()
    assert made["postgres_password"] in read.database_url.get_secret_value()
    assert f"requirepass {made['redis_password']}\n" in made["redis.conf"]
    assert "appendonly yes\n" in made["redis.conf"]
    files["redis_password"].unlink()
    assert make()["redis_password"] != made["redis_password"]
    assert (ROOT / "deploy" / ".gitignore").read_text() == "secrets/\n"


def test_the_image_holds_our_packages_and_runs_as_nobody_special():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    folders = {"contract", "fleet", "gateway", "kernels", "migrations", "worker"}
    assert set(re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE)) == folders
    sent = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert sent[1] == "*"
    assert {line[1:] for line in sent if line.startswith("!")} == {
        *folders,
        "pyproject.toml",
        "README.md",
    }
    last_stage = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER [1-9]\d+$", last_stage, re.MULTILINE)
    assert text.index("pip install -r requirements.txt") < text.index("COPY contract")
    model = SERVICES["worker"]["environment"]["HEADRACE_MODEL"]
    assert f"--out {model} " in text
    assert f"COPY --from=build {Path(model).parent} {Path(model).parent}\n" in last_stage


# -- the commands ----------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Local:
    """The file's services as processes of this machine."""

    folder: Path
    secrets: dict[str, str]
    model: Path
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def here(self, text: str) -> str:
        """Replace what only a container has: secret mounts, addresses, the model's folder."""
        if text.startswith("/run/secrets/"):
            path = self.folder / Path(text).name
            path.write_text(self.secrets[path.name])
            return str(path)
        if text.startswith("/opt/models/"):
            return str(self.model)
        return re.sub(
            r"(0\.0\.0\.0|127\.0\.0\.1):(\d+)",
            lambda m: f"127.0.0.1:{self.ports.setdefault(m[2], free_port())}",
            text,
        )

    def start(self, name: str) -> subprocess.Popen[bytes]:
        command = SERVICES[name]["command"]
        assert command[0] == "headrace"
        env = {key: self.here(value) for key, value in SERVICES[name]["environment"].items()}
        env |= {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
        env |= {"HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        self.processes[name] = start_child(
            [sys.executable, "-m", "headrace.fleet", *command[1:]],
            log=self.log(name),
            env=env,
            death_signal=signal.SIGKILL,
            cwd=self.folder,
        )
        return self.processes[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def is_healthy(self, name: str) -> bool:
        """Run the service's own healthcheck."""
        kind, program, *arguments = SERVICES[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        check = [sys.executable, *(self.here(argument) for argument in arguments)]
        return subprocess.run(check, capture_output=True, timeout=30).returncode == 0

    def wait(self, condition, what: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            for name, process in self.processes.items():
                assert process.poll() in (None, 0), f"{name} ended:\n{self.log(name).read_text()}"
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s"
        return value

    def stop(self) -> None:
        for process in self.processes.values():
            stop_child(process, signal.SIGTERM, PATIENCE_S)


@pytest.fixture
def local(tmp_path, postgres, redis_url, smollm2_folder) -> Iterator[Local]:
    server = postgres.url.replace("+psycopg", "").rpartition("/")[0]
    with psycopg.connect(f"{server}/postgres", autocommit=True) as db:
        db.execute("CREATE DATABASE compose")
        database_url = postgres.url.rpartition("/")[0] + "/compose"
        made = Local(
            tmp_path, {"redis_url": redis_url, "database_url": database_url}, smollm2_folder
        )
        try:
            yield made
        finally:
            made.stop()
            db.execute("DROP DATABASE compose WITH (FORCE)")


def create_key(local: Local) -> str:
    """Make a key with the command of README."""
    readme = (ROOT / "README.md").read_text()
    match = re.search(r"docker compose exec gateway headrace (keys create .*)", readme)
    assert match is not None
    env = {key: local.here(v) for key, v in SERVICES["gateway"]["environment"].items()}
    env |= {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "headrace.fleet", *match[1].split(), "--json"],
        env=env,
        capture_output=True,
        timeout=60,
        cwd=local.folder,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = re.search(r"hr_[0-9a-f]{12}_[0-9a-f]{48}", done.stdout.decode())
    assert found is not None, done.stdout.decode()
    return found[0]


def test_the_files_commands_pass_a_job_through(local):
    migrate = local.start("migrate")
    assert migrate.wait(PATIENCE_S) == 0, local.log("migrate").read_text()
    for name in ("gateway", "worker", "tasks"):
        local.start(name)
    for name in ("gateway", "worker"):
        local.wait(lambda name=name: local.is_healthy(name), f"{name} is healthy")
    key = create_key(local)
    api = f"http://127.0.0.1:{local.ports['8080']}"
    model = SERVICES["worker"]["environment"]["HEADRACE_MODEL_NAME"]
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=api, headers=headers, timeout=PATIENCE_S) as http:
        local.wait(
            lambda: any(m["ready"] for m in http.get("/v1/models").json()["data"]),
            "a worker is ready",
        )
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "sampling": {"temperature": 0, "max_tokens": 24},
        }
        submitted = http.post("/v1/jobs", json=body)
        assert submitted.status_code == 202, submitted.text
        path = submitted.headers["Location"]
        job = local.wait(
            lambda: (j := http.get(path).json())["finished_at"] and j, "the job has ended"
        )
    assert job["status"] == "succeeded"
    assert "Paris" in job["output"]["text"]
    for name in ("worker", "gateway", "tasks"):
        stop_child(local.processes[name], signal.SIGTERM, PATIENCE_S)
        assert local.processes[name].returncode in (0, -signal.SIGTERM), name
