"""deploy/locks: everything the images install, by version and hash, within pyproject's ranges."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from headrace.tests.fleet.compose_file import DEPLOY, ROOT, project, requirements_module
from headrace.tests.fleet.test_images import DOCKERFILE, stages

MODULE = requirements_module()
LOCKS = {path.stem: path.read_text() for path in (DEPLOY / "locks").glob("*.lock")}
#: The groups that each lock must satisfy by itself, or with the lock it is installed on top of.
WANTED = {"gateway": ["gateway"], "worker": ["worker"], "gpu": ["worker", "gpu"]} | {
    "model": ["model"]
}


def pins(name: str) -> dict[str, str]:
    """Return package -> version of a lock."""
    found = re.findall(r"^([a-z0-9-]+)(?:\[[a-z,]+\])?==(\S+)", LOCKS[name], re.MULTILINE)
    assert len(found) == len(dict(found)), "a package stands twice"
    return dict(found)


def wanted(name: str) -> list[Requirement]:
    """Return what pyproject.toml asks of a lock on the images' platform."""
    lines = [line for group in WANTED[name] for line in MODULE.requirements(project(), group)]
    platform = default_environment() | {"sys_platform": "linux"}
    asked = [Requirement(line) for line in lines]
    return [r for r in asked if r.marker is None or r.marker.evaluate(dict(platform))]


def test_there_is_a_lock_for_each_thing_that_is_installed():
    assert set(LOCKS) == {"gateway", "worker", "gpu", "model", "weights", "build"}


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_every_line_of_a_lock_is_a_pin_with_hashes(name: str):
    lines = [line for line in LOCKS[name].splitlines() if not line.startswith("#")]
    blocks = re.split(r"\n(?! )", "\n".join(lines).strip())
    assert blocks
    pin = r"[a-z0-9-]+(\[[a-z,]+\])?==[\w.]+"
    for block in blocks:
        assert re.fullmatch(pin + r"( \\\n    --hash=sha256:[0-9a-f]{64})+", block), block[:200]


@pytest.mark.parametrize("name", sorted(LOCKS))
def test_invariant_3_a_lock_names_no_index_and_one_version_of_each_package(name: str):
    assert not re.search(r"://|--(extra-)?index|--find-links|@ ", LOCKS[name])
    for other in LOCKS:
        shared = pins(name).keys() & pins(other).keys()
        assert {p: pins(name)[p] for p in shared} == {p: pins(other)[p] for p in shared}


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_lock_satisfies_pyproject(name: str):
    found = pins(name)
    for asked in wanted(name):
        package = canonicalize_name(asked.name)
        if name == "worker" and package == "torch":
            assert package not in found, "TORCH_INDEX serves it"
            continue
        assert package in found, f"{package} is not locked: python deploy/requirements.py lock"
        assert asked.specifier.contains(found[package]), (package, found[package])


def test_a_dependency_out_of_its_locked_range_is_seen():
    # The test above could have failed: a range that the lock does not meet is not contained.
    assert not Requirement("flask>=99").specifier.contains(pins("gateway")["flask"])
    assert {canonicalize_name(r.name) for r in wanted("gateway")} >= {"flask", "celery", "redis"}


def test_extras_of_a_requirement_are_locked_too():
    # An extra's packages are what would be missing in a container: each of ours is named here.
    extras = {"redis": "hiredis", "gunicorn": "gevent", "psycopg": "psycopg-binary"}
    asked = {canonicalize_name(r.name): r.extras for r in wanted("gateway")}
    assert {name for name, more in asked.items() if more} == set(extras)
    assert set(extras.values()) <= pins("gateway").keys()


def test_the_worker_locks_differ_by_torch_and_what_it_needs_of_cuda():
    more = pins("gpu").keys() - pins("worker").keys()
    assert {"torch", "triton", "nvidia-cublas"} <= more
    assert all(re.match(r"torch$|triton$|(cuda|nvidia)-", package) for package in more)
    assert pins("worker").keys() < pins("gpu").keys()
    assert {"numpy", "safetensors", "nvidia-ml-py", "sympy", "filelock"} <= pins("worker").keys()


def test_weights_and_build_are_pinned_as_elsewhere():
    assert "==".join(*pins("weights").items()) == MODULE.WEIGHTS
    assert f",--no-deps {MODULE.WEIGHTS})" in (ROOT / "Makefile").read_text()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    (asked,) = map(Requirement, build)
    assert asked.specifier.contains(pins("build")[asked.name])


def test_the_images_install_nothing_that_is_not_in_a_lock():
    lines = DOCKERFILE.replace("\\\n", " ")
    commands = re.findall(r"pip install [^&;\n]+", lines)
    assert len(commands) == lines.count("pip install") == 9
    for command in commands:
        is_ours = command.rstrip().endswith("/opt/code .")
        if is_ours:
            assert "--no-deps --no-build-isolation" in command
        elif "TORCH_INDEX" in command:  # torch alone, in the version of gpu.lock
            assert "--no-deps" in command
            assert "\"$(grep -o '^torch==[0-9.]*' gpu.lock)\"" in command
        else:
            assert "--require-hashes" in command, command
            assert re.search(r"-r \w+\.lock\s*$", command), command
    assert "COPY deploy/locks ./" in stages()["dependencies"][1]


def test_the_locks_are_made_for_the_images_python():
    assert re.search(r"^ARG PYTHON=([0-9.]+)-", DOCKERFILE, re.MULTILINE)[1] == MODULE.PYTHON
