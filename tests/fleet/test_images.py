"""deploy/Dockerfile: clean by hadolint, small by what is left out, run by nobody special."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from headrace.tests.fleet.compose_file import DEPLOY, ROOT, SERVICES, project, requirements_module

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
FOLDERS = {"contract", "fleet", "gateway", "kernels", "migrations", "worker"}


def stages() -> dict[str, tuple[str, str]]:
    """Return name -> (what it is made from, its lines) of each stage."""
    found = {}
    for block in re.split(r"^(?=FROM )", DOCKERFILE, flags=re.MULTILINE)[1:]:
        head = re.match(r"FROM (\S+) AS (\S+)\n", block)
        assert head is not None, "every stage has a name"
        found[head[2]] = (head[1], block)
    return found


def lineage(target: str) -> str:
    """Return the lines of a stage after those of all it is made from."""
    made_from, lines = stages()[target]
    return (lineage(made_from) if made_from in stages() else "") + lines


def installed(name: str) -> str:
    """Return the path of a program that came with our test packages, or of the system's."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found is not None, f"{name} is not installed: make test installs it"
    return found


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [installed("hadolint"), "--no-color", "--failure-threshold", "style", "deploy/Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    assert "hadolint ignore" not in DOCKERFILE


def test_every_target_of_ours_runs_as_nobody_special():
    targets = {s["build"]["target"] for s in SERVICES.values() if "build" in s}
    assert targets == {"gateway", "worker-cpu", "worker-gpu", "proxy"}
    for target in targets:
        users = re.findall(r"^USER (.+)$", lineage(target), re.MULTILINE)
        assert users[-1:] == ["10001"], target
        assert not re.search(r"^(ADD|VOLUME) ", lineage(target), re.MULTILINE)


def test_what_changes_often_lies_above_what_does_not():
    for target in ("gateway", "worker-cpu", "worker-gpu"):
        copied = re.findall(r"^COPY --from=(\S+) ", lineage(target), re.MULTILINE)
        wanted = ["dependencies", "torch-cpu", "torch-gpu", "model", "code"]
        assert copied == sorted(copied, key=wanted.index), target
        assert copied[0] == "dependencies"
        assert copied[-1] == "code"
    assert DOCKERFILE.index("-r gateway.lock") < DOCKERFILE.index("COPY contract")


def test_the_builder_is_sent_exactly_what_is_copied():
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE))
    files = {path for line in copied for path in line.split()}
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert sent[1] == "*"
    assert {line[1:] for line in sent if line.startswith("!")} == files
    assert files >= FOLDERS
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {p.split(".")[1] for p in packages["packages"]} == FOLDERS
    for path in files:
        assert (ROOT / path).exists(), path


def test_the_embedded_model_lies_where_the_worker_and_the_gateway_look():
    model = SERVICES["worker"]["environment"]["HEADRACE_MODEL"]
    assert f"--out {model} " in DOCKERFILE
    assert f"COPY --from=model {Path(model).parent} {Path(model).parent}\n" in lineage("worker-cpu")
    # The worker's card names the folder; the gateway finds the tokenizer under the same path.
    assert f"COPY --from=model /opt/tokenizers {Path(model).parent}\n" in lineage("gateway")
    assert f"/opt/tokenizers/{Path(model).name}\n" in stages()["model"][1]
    made = stages()["model"][1]  # save_file writes 0600, as root
    assert made.index("--out") < made.index("chmod -R a+rX /opt/models") < made.index("mkdir -p")


def test_writable_folders_of_the_images_are_volumes_or_tmpfs_of_compose():
    gpu = SERVICES["worker-gpu"]
    caches = re.findall(r"(?:TRITON_CACHE_DIR|CUDA_CACHE_PATH)=(\S+)", lineage("worker-gpu"))
    mounted = [volume.split(":")[1] for volume in gpu["volumes"] if not volume.endswith(":ro")]
    assert len(caches) == 2
    assert all(any(Path(mount) in Path(cache).parents for mount in mounted) for cache in caches)
    for mount in mounted:  # a new volume is owned as the image's folder is
        assert f"install -d -o 10001 -g 10001 {mount}" in lineage("worker-gpu")
    assert "chown -R 10001:10001 /data /config" in lineage("proxy")


# -- deploy/requirements.py ------------------------------------------------------------------


def test_invariant_1_every_dependency_has_one_group():
    module = requirements_module()
    lines = [line for group in module.GROUPS for line in module.requirements(project(), group)]
    assert sorted(lines) == sorted(project()["dependencies"])
    more = {"dependencies": [*project()["dependencies"], "newcomer>=1"]}
    with pytest.raises(ValueError, match="newcomer"):
        module.requirements(more, "gateway")
    fewer = {"dependencies": project()["dependencies"][1:]}
    with pytest.raises(ValueError, match="alembic"):
        module.requirements(fewer, "gateway")


def test_invariant_2_the_gateways_image_has_no_torch_and_the_cpu_workers_no_triton():
    groups = requirements_module().GROUPS
    assert not {"torch", "transformers", "triton", "numpy"} & {*groups["gateway"]}
    assert not {"transformers", "triton"} & {*groups["gateway"], *groups["worker"]}
    locks = {
        "dependencies": ["gateway"],
        "torch-cpu": ["worker", "gpu"],  # without TORCH_INDEX torch is a CUDA build: all of gpu's
        "torch-gpu": ["gpu"],
        "model": ["model", "weights"],
        "code": ["build"],
    }
    for target, wanted in locks.items():
        assert re.findall(r"-r (\w+)\.lock", stages()[target][1]) == wanted


def test_the_script_prints_a_group_and_refuses_an_unknown_one():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(DEPLOY / "requirements.py"), *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert run("gpu").stdout.startswith("triton")
    assert run("gpu").stdout.count("\n") == 1
    for wrong in ([], ["nobody"]):
        assert run(*wrong).returncode == 1
        assert "usage: requirements.py gateway|worker" in run(*wrong).stderr
