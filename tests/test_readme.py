"""README cannot drift: what it names exists, in the order the style wants, on two screens."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SECTIONS = [
    "Run it, test it",
    "With Docker",
    "Life of a job",
    "Map",
    "Settings",
    "Guarantees and limits",
    "Measured",
    "Running tests",
    "Changes",
]


def test_the_sections_stand_in_the_order_of_the_style():
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == SECTIONS
    assert len(README.splitlines()) < 250


def test_each_step_of_a_jobs_life_names_a_function_that_exists():
    life = README.split("## Life of a job")[1].split("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", life, re.MULTILINE) == [str(n) for n in range(1, 11)]
    named = re.findall(r"`([\w/]+\.py): (\w+)`", life)
    assert len(named) >= 10
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"README names {path}: {name}"


def test_each_folder_of_the_map_exists_and_no_package_is_missing():
    rows = README.split("## Map")[1].split("\n## ")[0]
    folders = set(re.findall(r"^\| `([\w/]+)/`", rows, re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in folders)
    ours = {"contract", "gateway", "worker", "worker/engine", "kernels", "fleet", "migrations"}
    assert ours <= folders
