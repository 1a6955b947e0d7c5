"""compose.yaml's commands, run: every service healthy by its own check, and a job through them all.

No container engine is needed: see local_services. Grafana's and the GPU worker's programs are not
run here: the one comes in no package, the other needs a GPU.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
import redis
from psycopg import sql

from headrace.fleet.child import stop_child
from headrace.fleet.server import Server
from headrace.tests.fleet.compose_file import DEPLOY, ROOT, SERVICES
from headrace.tests.fleet.local_services import PATIENCE_S, LocalServices, program
from headrace.tests.fleet.local_stores import redis_client, run_roles_sql, start_redis

NOT_RUN = {"grafana", "worker-gpu"}
#: Who has metrics, and at which port of its container.
SCRAPED = [("gateway", 8080), ("worker", 9464), ("tasks", 9464)]
PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make secrets with the script, in a folder of its own."""
    script = tmp_path_factory.mktemp("deploy") / "make-secrets.sh"
    script.write_bytes((DEPLOY / "make-secrets.sh").read_bytes())
    subprocess.run(["sh", script], check=True, capture_output=True, timeout=30)
    return script.parent / "secrets"


@pytest.fixture(scope="module")
def database(postgres: Server, secrets: Path) -> Iterator[str]:
    """A database as the image makes it at its first start: empty, then deploy/postgres/roles.sql.

    The secrets' addresses are changed to lead there.
    """
    superuser = postgres.url.replace("+psycopg", "").rpartition("/")[0]
    with psycopg.connect(f"{superuser}/postgres", autocommit=True) as db:
        db.execute("CREATE DATABASE compose")
        try:
            run_roles_sql(f"{superuser}/compose", secrets)
            for name in ("database_url", "database_owner_url"):
                address = (secrets / name).read_text()
                here = address.replace(
                    "postgres:5432/headrace", f"127.0.0.1:{postgres.port}/compose"
                )
                assert here != address
                (secrets / name).write_text(here)
            yield f"{superuser}/compose"
        finally:
            db.execute("DROP DATABASE compose WITH (FORCE)")
            for role in ("headrace_app", "headrace_owner"):
                db.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory,
    secrets: Path,
    database: str,
    postgres: Server,
    smollm2_folder: Path,
) -> Iterator[LocalServices]:
    """All services that can run here, started in compose's order, each healthy."""
    local = LocalServices(tmp_path_factory.mktemp("fleet"), secrets, smollm2_folder)
    local.ports["postgres", 5432] = postgres.port
    try:
        start_redis(local)
        migrate = local.start("migrate")
        assert migrate.wait(PATIENCE_S) == 0, local.log("migrate").read_text()
        for name in ("gateway", "tasks", "worker"):
            local.start(name)
        local.wait(lambda: local.is_healthy("gateway"), "gateway is healthy")
        local.start_proxy()
        local.start_prometheus()
        yield local
    finally:
        local.stop()


@pytest.fixture(scope="module")
def key(fleet: LocalServices) -> str:
    """Make a key with the command of README."""
    said = run_in_gateway(fleet, "keys create")
    found = re.search(r"hr_[0-9a-f]{12}_[0-9a-f]{48}", said)
    assert found is not None, said
    return found[0]


def run_in_gateway(fleet: LocalServices, beginning: str, typed: str = "") -> str:
    """Run README's `docker compose exec gateway headrace ...` that begins so; return its output."""
    readme = (ROOT / "README.md").read_text()
    match = re.search(rf"docker compose exec gateway headrace ({beginning} [^#\n]*)", readme)
    assert match is not None, beginning
    done = subprocess.run(
        [sys.executable, "-m", "headrace.fleet", *match[1].split(), "--json"],
        env=fleet.environment("gateway"),
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=fleet.folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def proxied(fleet: LocalServices, key: str) -> Iterator[httpx.Client]:
    """A client of the fleet that comes through the proxy."""
    headers = {"Authorization": f"Bearer {key}"}
    url = f"http://127.0.0.1:{fleet.port('proxy', 8080)}"
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as http:
        yield http


# -- each service ----------------------------------------------------------------------------


def test_every_service_becomes_healthy_by_its_own_check(fleet):
    local = set(fleet.processes) - {"migrate", "redis"}  # redis: see start_redis
    for name in sorted(local):
        fleet.wait(lambda name=name: fleet.is_healthy(name), f"{name} is healthy")
    assert {*fleet.processes, "postgres"} == set(SERVICES) - NOT_RUN
    check = SERVICES["postgres"]["healthcheck"]["test"]
    port = f"--port={fleet.port('postgres', 5432)}"
    ready = subprocess.run([program(check[1]), *check[2:], port], capture_output=True, timeout=30)
    assert ready.returncode == 0


def test_a_check_fails_when_its_service_is_not_there(fleet, tmp_path):
    nobody = LocalServices(tmp_path, fleet.secrets, fleet.model)
    assert [name for name in fleet.processes if name not in ("migrate", "redis")]
    for name in ("gateway", "tasks", "worker", "proxy", "prometheus"):
        assert not nobody.is_healthy(name), name


def test_a_program_can_write_to_its_tmpfs_and_nowhere_else(fleet):
    script = (
        "import pathlib, sys, tempfile\n"
        "tempfile.TemporaryFile().close()\n"
        "for place in sys.argv[1:]:\n"
        "    try: pathlib.Path(place, 'of-the-probe').touch(); print('wrote', place)\n"
        "    except PermissionError: print('refused')\n"
        "try: import torch\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    argv = [sys.executable, "-c", script, str(fleet.folder), "/tmp"]
    probe = LocalServices(fleet.folder / "probe", fleet.secrets, fleet.model, fleet.ports)
    probe.folder.mkdir()
    assert probe.start_as("gateway", argv, {}).wait(PATIENCE_S) == 0
    said = probe.log("gateway").read_text().splitlines()
    assert said == ["refused", "refused", "torch is not in the image"]


def test_the_programs_database_user_changes_rows_and_no_schema(fleet):
    app, owner = (
        (fleet.secrets / name).read_text().strip().replace("+psycopg", "")
        for name in ("database_url", "database_owner_url")
    )
    with psycopg.connect(app, autocommit=True) as db:
        for statement in (
            "CREATE TABLE mine (a int)",
            "DROP TABLE jobs",
            "ALTER TABLE jobs ADD COLUMN mine int",
            "TRUNCATE jobs",
            "CREATE ROLE mine",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute(statement.encode())
        assert db.execute("SELECT count(*) >= 0 FROM jobs").fetchone() == (True,)
    with psycopg.connect(owner, autocommit=True) as db:
        found = db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
        assert found == (False,)


def test_the_programs_redis_user_reaches_our_keys_and_no_administration(fleet):
    with redis_client(fleet) as client:
        client.set("hr:test", "1", ex=5)
        for command in (["SET", "other", "1"], ["CONFIG", "GET", "*"], ["FLUSHALL"], ["KEYS", "*"]):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
    with (
        redis.Redis(port=fleet.port("redis", 6379)) as nobody,
        pytest.raises(redis.exceptions.AuthenticationError),
    ):
        nobody.ping()


# -- all together ----------------------------------------------------------------------------


def test_a_job_passes_through_proxy_gateway_worker_and_back(fleet, proxied):
    models = "/v1/models"
    fleet.wait(
        lambda: any(m["ready"] for m in proxied.get(models).json()["data"]), "a worker is ready"
    )
    model = SERVICES["worker"]["environment"]["HEADRACE_MODEL_NAME"]
    sampling = {"temperature": 0, "max_tokens": 24}
    body = {"model": model, "messages": PROMPT, "sampling": sampling}
    submitted = proxied.post("/v1/jobs", json=body)
    assert submitted.status_code == 202, submitted.text
    path = submitted.headers["Location"]
    with proxied.stream("GET", f"{path}/events") as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in events.headers
        names = [line for line in events.iter_lines() if line.startswith("event: ")]
    assert names[-1] == "event: succeeded"
    assert "event: token" in names
    job = proxied.get(path).json()
    assert job["status"] == "succeeded"
    assert "Paris" in job["output"]["text"]


def test_the_gateway_counts_prompts_without_torch(proxied):
    model = SERVICES["worker"]["environment"]["HEADRACE_MODEL_NAME"]
    body = {"model": model, "messages": [{"role": "user", "content": "word " * 20_000}]}
    refused = proxied.post("/v1/jobs", json=body)
    assert refused.status_code == 422, refused.text
    assert refused.json()["code"] == "prompt_too_long"


def test_an_operator_logs_in_through_the_proxy(fleet, proxied):
    run_in_gateway(fleet, "operators create", typed="a long enough password\n")
    form = {"name": "me", "password": "a long enough password"}
    origin = {"Origin": str(proxied.base_url).rstrip("/")}
    refused = proxied.post("/dashboard/login", data=form, headers={"Origin": "http://elsewhere"})
    assert refused.status_code == 403
    seen = proxied.post("/dashboard/login", data=form, headers=origin)
    assert seen.status_code == 303, seen.text
    assert "HttpOnly" in seen.headers["set-cookie"]
    assert "Secure" not in seen.headers["set-cookie"]  # the browser would not send it by http
    direct = f"http://127.0.0.1:{fleet.port('gateway', 8080)}"
    by_https = {"Origin": f"https://127.0.0.1:{fleet.port('gateway', 8080)}"}
    by_https["X-Forwarded-Proto"] = "https"  # what the proxy says of a request by https
    seen = httpx.post(f"{direct}/dashboard/login", data=form, headers=by_https)
    assert "Secure" in seen.headers["set-cookie"]


def test_prometheus_scrapes_every_program(fleet):
    url = f"http://127.0.0.1:{fleet.port('prometheus', 9090)}/api/v1"
    mine = {f"127.0.0.1:{fleet.port(name, inner)}" for name, inner in SCRAPED}

    found: dict[str, str] = {}

    def up() -> bool:
        active = httpx.get(f"{url}/targets").json()["data"]["activeTargets"]
        found.update({t["labels"]["instance"]: t["lastError"] or t["health"] for t in active})
        return all(found.get(instance) == "up" for instance in mine)

    fleet.wait(lambda: fleet.is_healthy("prometheus"), "prometheus is healthy")
    try:
        fleet.wait(up, "every program is scraped")
    except AssertionError as error:
        raise AssertionError(f"{error}: {found}") from None
    groups = httpx.get(f"{url}/rules").json()["data"]["groups"]
    assert sum(len(group["rules"]) for group in groups) > 0


def test_promtool_accepts_what_compose_mounts(fleet):
    folder = fleet.folder / "prometheus" / "configs"
    for what, name in (("config", "prometheus.yml"), ("rules", "alerts.yml")):
        done = subprocess.run(
            [program("promtool"), "check", what, str(folder / name)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_inside_stays_inside_the_proxy(fleet, proxied):
    direct = f"http://127.0.0.1:{fleet.port('gateway', 8080)}/metrics"
    assert b"headrace_http_requests_total" in httpx.get(direct).content
    for path in ("/metrics", "/metrics/", "/%6detrics", "//metrics", "/METRICS", "/./metrics"):
        answer = proxied.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["code"] == "not_found"
        assert b"headrace_http" not in answer.content


def test_a_problem_of_the_proxy_looks_as_the_gateways(fleet, proxied):
    limit = int(SERVICES["gateway"]["environment"]["HEADRACE_MAX_BODY_BYTES"])
    assert SERVICES["proxy"]["environment"]["PROXY_MAX_BODY_BYTES"] == str(limit)
    headers = {"Content-Type": "application/json"}

    def chunks() -> Iterator[bytes]:
        for _ in range(limit // 65_536 + 2):
            yield b" " * 65_536

    for content in (b" " * (limit + 1), chunks()):
        answer = proxied.post("/v1/jobs", content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "body_too_large"
    absent = proxied.get("/nowhere").json()
    assert absent == proxied.get("/metrics").json()


def test_a_stop_ends_each_program_by_itself(fleet):
    for name in ("prometheus", "proxy", "worker", "gateway", "tasks", "redis"):
        stop_child(fleet.processes[name], signal.SIGTERM, PATIENCE_S)
        assert fleet.processes[name].returncode in (0, -signal.SIGTERM), name
    for name in fleet.processes:
        said = fleet.log(name).read_text()
        assert not re.search("NoPermission|InsufficientPrivilege|Permission denied", said), said
