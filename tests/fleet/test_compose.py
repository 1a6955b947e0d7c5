"""compose.yaml: its form, who may do and reach what, its settings and secrets."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from headrace.contract import settings
from headrace.contract.settings import PREFIX, Settings
from headrace.fleet.wheel import wheel_file
from headrace.tests.fleet.compose_file import (
    COMPOSE,
    DEPLOY,
    LONG_RUNNING,
    ONE_SHOT,
    PROFILES,
    PROGRAMS,
    ROOT,
    SERVICES,
    TEXT,
    fill_in,
    read_compose,
    read_env,
)


def seconds(text: str) -> float:
    assert re.fullmatch(r"\d+s", text), text
    return float(text.removesuffix("s"))


def names(listed: Any) -> set[str]:
    """Return the names in a list or mapping of networks, secrets or configs."""
    return {item if isinstance(item, str) else item["source"] for item in listed or ()}


# -- form ------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["cpu", "gpu,proxy,observability"])
def test_the_file_is_valid_by_the_compose_specifications_schema(profile):
    path = wheel_file("check-jsonschema", "vendor/compose-spec.json", "run `make test`")
    schema = json.loads(path.read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    file = read_compose(read_env() | {"COMPOSE_PROFILES": profile})
    assert [f"{list(e.path)}: {e.message}" for e in validator.iter_errors(file)] == []
    for name in ("worker", "worker-gpu"):  # the schema does see a misspelt key
        broken = json.loads(json.dumps(file))
        broken["services"][name]["read_onyl"] = True
        assert not validator.is_valid(broken)


def test_each_profile_starts_its_services_and_cpu_is_the_default():
    found = {profile: set() for profile in PROFILES}
    for name, service in SERVICES.items():
        for profile in service.get("profiles", [""]):
            found[profile].add(name)
    assert found == PROFILES
    assert read_env()["COMPOSE_PROFILES"] == "cpu"


def test_the_variable_file_names_every_variable_with_the_files_default():
    used = dict(re.findall(r"(?<!\$)\$\{(\w+):-([^}]*)\}", TEXT))
    assert set(re.findall(r"(?<!\$)\$\{(\w+)", TEXT)) == set(used)
    assert used | {"COMPOSE_PROFILES": "cpu"} == read_env()
    assert not [name for name in used if name.startswith(PREFIX)]  # a program would refuse it
    assert fill_in("${A:-x} ${B:-y} $${C}", {"B": ""}) == "x y ${C}"


def test_what_a_service_waits_for_can_happen_in_every_profile():
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            together = set(SERVICES[other].get("profiles", service.get("profiles", [])))
            assert together == set(service.get("profiles", [])) or not together, name
            if wanted["condition"] == "service_healthy":
                assert other in LONG_RUNNING, f"{name} waits for {other}"
            else:
                assert wanted["condition"] == "service_completed_successfully"
                assert other in ONE_SHOT
    for name in set(PROGRAMS) - ONE_SHOT:
        assert set(SERVICES[name]["depends_on"]) == {"migrate", "redis", "postgres"}
    assert set(SERVICES["migrate"]["depends_on"]) == {"postgres"}


def test_images_carry_versions_and_ours_are_built_here():
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.match(r"v?\d+", tag), name
        if "build" in service:  # without it compose tries to pull an image that only we have
            assert image.startswith("headrace-")
            build = service["build"]
            assert (ROOT / build["context"] / build["dockerfile"]).is_file()
            assert re.search(rf"^FROM \S+ AS {build['target']}$", dockerfile, re.MULTILINE), name
            assert image == f"headrace-{build['target']}"
        else:
            assert not image.startswith("headrace")


# -- who may do what -------------------------------------------------------------------------


def test_invariant_1_nobody_is_root_and_nothing_but_named_places_is_writable():
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service, name
        assert not service.get("privileged"), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if "user" in service:
            assert re.match(r"[1-9]\d*:", service["user"]), name
        else:  # the image says so: see test_images
            assert service["image"].startswith("headrace-"), name
        for mount in service.get("volumes", []):
            source, target, *options = mount.split(":")
            is_ours = source in COMPOSE["volumes"]
            assert is_ours or options == ["ro"], f"{name}: {source} of the host can be written"
            assert target.startswith("/")
        for mount in service.get("tmpfs", []):
            assert re.fullmatch(r"/[\w/]+:mode=1777,size=\d+[mg]", mount), f"{name}: {mount}"


def test_invariant_2_each_network_joins_only_those_who_must_meet():
    members: dict[str, set[str]] = {name: set() for name in COMPOSE["networks"]}
    for name, service in SERVICES.items():
        for network in service["networks"]:
            members[network].add(name)
    programs = set(PROGRAMS)
    assert members == {
        "front": {"gateway", "proxy"},
        "data": {"redis", "postgres", *programs},
        "metrics": {*programs - {"migrate"}, "prometheus", "grafana"},
        "board": {"grafana"},
    }
    inside = {name for name, network in COMPOSE["networks"].items() if network.get("internal")}
    assert inside == {"data", "metrics"}


def test_invariant_3_no_store_publishes_a_port_and_only_the_proxy_faces_others():
    published = {name: s["ports"] for name, s in SERVICES.items() if "ports" in s}
    assert published == {
        "gateway": ["127.0.0.1:8080:8080"],
        "proxy": ["0.0.0.0:80:8080", "0.0.0.0:443:8443"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    assert SERVICES["gateway"]["environment"]["HEADRACE_BIND"] == "0.0.0.0:8080"


def test_invariant_4_every_service_is_watched_and_limited():
    for name, service in SERVICES.items():
        assert re.fullmatch(r"\d+[mg]", service["mem_limit"]), name
        assert service["pids_limit"] > 0, name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        if name in ONE_SHOT:
            assert service["restart"].startswith("on-failure:")
            continue
        assert service["restart"] == "unless-stopped", name
        health = service["healthcheck"]
        assert health["test"][0] in ("CMD", "CMD-SHELL"), name
        assert seconds(health["timeout"]) <= seconds(health["interval"]), name
        assert health["retries"] >= 3
        assert seconds(health["start_period"]) >= 30, name


def test_invariant_5_a_stop_waits_longer_than_the_program_takes():
    for name in ("worker", "worker-gpu"):
        drain_s = float(SERVICES[name]["environment"]["HEADRACE_DRAIN_S"])
        assert seconds(SERVICES[name]["stop_grace_period"]) >= drain_s + 10
    text = (ROOT / "gateway" / "server.py").read_text()
    graceful = re.search(r"^graceful_timeout = (\d+)$", text, re.MULTILINE)
    assert graceful is not None
    assert seconds(SERVICES["gateway"]["stop_grace_period"]) >= float(graceful[1]) + 10
    for name in LONG_RUNNING:
        assert seconds(SERVICES[name]["stop_grace_period"]) >= 20, name


def test_the_gpu_worker_is_the_cpu_worker_with_a_gpu_and_its_cache():
    cpu, gpu = SERVICES["worker"], SERVICES["worker-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["environment"]["HEADRACE_DEVICE"] == "cuda"
    assert gpu["environment"]["HEADRACE_MODEL"] == cpu["environment"]["HEADRACE_MODEL"]
    moved = read_compose(read_env() | {"GPU_MODEL": "/models/m", "MODELS_DIR": "/srv/models"})
    worker, gateway = (moved["services"][name] for name in ("worker-gpu", "gateway"))
    assert worker["environment"]["HEADRACE_MODEL"] == "/models/m"
    assert "/srv/models:/models:ro" in worker["volumes"]
    assert "/srv/models:/models:ro" in gateway["volumes"]  # one path, or prompts go uncounted
    for key in ("command", "healthcheck", "depends_on", "stop_grace_period", "secrets"):
        assert cpu[key] == gpu[key], key


# -- settings, secrets, files ----------------------------------------------------------------


def test_every_variable_is_a_setting_of_its_program():
    foreign = {"NVIDIA_DRIVER_CAPABILITIES"}  # the container runtime's
    for name, cls in PROGRAMS.items():
        for variable in set(SERVICES[name]["environment"]) - foreign:
            field_name = variable.removeprefix(PREFIX).removesuffix("_FILE").lower()
            owners = Settings.registry if cls is settings.FleetSettings else [cls]
            assert any(field_name in owner.model_fields for owner in owners), variable


def test_secrets_configs_and_volumes_are_declared_and_used():
    for kind in ("secrets", "configs"):
        used = {name for service in SERVICES.values() for name in names(service.get(kind))}
        assert used == set(COMPOSE[kind]), kind
    for name, config in COMPOSE["configs"].items():
        assert (ROOT / config["file"]).is_file(), name
    mounted = {v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", [])}
    assert {name for name in mounted if "/" not in name} == set(COMPOSE["volumes"])


def test_no_secret_stands_in_the_file():
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|KEY|SECRET|REDIS_URL|DATABASE_URL", variable):
                assert variable.endswith("_FILE"), f"{name}: {variable}"
                assert value == f"/run/secrets/{Path(value).name}"
        for mentioned in re.findall(r"/run/secrets/([\w.]+)", json.dumps(service)):
            assert mentioned in service["secrets"], f"{name}: {mentioned}"


def test_who_may_change_the_schema_is_migrate_alone():
    owners = {n for n, s in SERVICES.items() if "database_owner_url" in s.get("secrets", ())}
    assert owners == {"migrate"}
    superusers = {n for n, s in SERVICES.items() if "postgres_password" in s.get("secrets", ())}
    assert superusers == {"postgres"}


def test_make_secrets_makes_what_compose_mounts_once(tmp_path):
    script = tmp_path / "deploy" / "make-secrets.sh"
    script.parent.mkdir()
    script.write_bytes((DEPLOY / "make-secrets.sh").read_bytes())

    def make() -> dict[str, str]:
        subprocess.run(["sh", script], check=True, capture_output=True, timeout=30, cwd="/")
        return {p.name: p.read_text() for p in (script.parent / "secrets").iterdir()}

    made = make()
    files = {name: tmp_path / secret["file"] for name, secret in COMPOSE["secrets"].items()}
    assert set(made) == set(files) == {path.name for path in files.values()}
    assert make() == made
    assert stat.S_IMODE(script.parent.joinpath("secrets").stat().st_mode) == 0o700
    passwords = [text for name, text in made.items() if name.endswith("_password")]
    assert all(re.fullmatch("[0-9a-f]{48}", password) for password in passwords)
    assert len(set(passwords)) == len(passwords) == 5
    environ = {
        "HEADRACE_REDIS_URL_FILE": str(files["redis_url"]),
        "HEADRACE_DATABASE_URL_FILE": str(files["database_url"]),
    }
    read = settings.TasksSettings.from_env(environ)
    assert made["redis_password"] in read.redis_url.get_secret_value()
    assert made["database_password"] in read.database_url.get_secret_value()
    assert made["database_owner_password"] in made["database_owner_url"]
    files["redis_password"].unlink()
    changed = make()
    assert changed["redis_password"] != made["redis_password"]
    assert changed["redis_password"] in changed["redis_url"]
    assert changed["database_url"] == made["database_url"]
    assert (DEPLOY / ".gitignore").read_text() == "secrets/\n"


# -- observability ---------------------------------------------------------------------------


def test_grafana_asks_for_a_password_and_finds_its_board_and_datasource():
    grafana = SERVICES["grafana"]
    environment = grafana["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert environment["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana_password"
    targets = {config["source"]: Path(config["target"]) for config in grafana["configs"]}
    folder = Path("/etc/grafana/provisioning")
    assert targets["grafana-datasource"].parent == folder / "datasources"
    assert targets["grafana-boards"].parent == folder / "dashboards"

    datasource = provisioned("datasources")
    assert set(datasource) == {"apiVersion", "datasources"}
    (prometheus,) = datasource["datasources"]
    known = {"name", "uid", "type", "access", "url", "isDefault", "editable", "jsonData"}
    assert set(prometheus) == known
    assert (prometheus["type"], prometheus["access"]) == ("prometheus", "proxy")
    assert prometheus["url"] == "http://prometheus:9090"

    boards = provisioned("dashboards")
    assert set(boards) == {"apiVersion", "providers"}
    (provider,) = boards["providers"]
    known = {"name", "folder", "type", "disableDeletion", "allowUiUpdates", "options"}
    assert set(provider) == known
    board = targets["grafana-board"]
    assert provider["options"] == {"path": str(board.parent)}
    assert environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == str(board)
    text = (DEPLOY / "grafana" / "headrace.json").read_text()
    named = {uid for uid in re.findall(r'"uid": "([^"]+)"', text) if uid.startswith("prom")}
    assert named <= {prometheus["uid"]}
    assert isinstance(json.loads(text), dict)


def provisioned(kind: str) -> dict[str, Any]:
    file = yaml.safe_load((DEPLOY / "grafana/provisioning" / kind / "headrace.yml").read_text())
    assert file["apiVersion"] == 1
    return file
