"""The layout law: folders, names, sizes, and who may import or touch what.

Everything is read from the source by `ast`, so imports inside functions count too. What a rule
allows is a list in this file, each entry with its reason: a new exception is a visible diff.
"""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["bench", "contract", "fleet", "gateway", "kernels", "migrations", "tests", "worker"]
OURS = ["contract", "fleet", "gateway", "kernels", "worker"]

MAX_LINES = 500
EXPLAINED_LINES = 350
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Return every dotted name the file imports, wherever in it; `from a import b` gives a.b."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: import by full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            is_import = ast.unparse(node.func) in ("__import__", "importlib.import_module")
            if is_import and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return frozenset(found)


def breaches(paths: list[Path], *banned: str) -> list[str]:
    """Return `file: import` for each import that is one of `banned` or lies under it."""
    return [
        f"{name_of(path)}: {name}"
        for path in paths
        for name in sorted(imports_of(path))
        if any(name == ban or name.startswith(ban + ".") for ban in banned)
    ]


def calls_in(path: Path) -> set[str]:
    nodes = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))
    return {ast.unparse(node.func) for node in nodes}


# -- folders ---------------------------------------------------------------------------------


def test_our_folders_are_no_packages_and_no_folder_is_named_headrace():
    assert [name_of(p) for p in files(*FOLDERS) if p.name == "__init__.py"] == []
    assert not (ROOT / "headrace").exists()
    assert not (ROOT / "__init__.py").exists()


def test_the_import_link_names_the_root():
    link = ROOT / ".imports" / "headrace"
    assert link.is_symlink()
    assert link.readlink() == Path("..")


def test_packages_in_pyproject_are_the_folders_with_code():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    with_code = {path.parent.relative_to(ROOT).as_posix() for path in files(*OURS, "migrations")}
    mapped = {name.removeprefix("headrace.").replace(".", "/"): name for name in config["packages"]}
    assert set(mapped) == with_code
    assert config["package-dir"] == {name: folder for folder, name in mapped.items()}


def test_folders_are_one_deep_but_for_engine_and_dashboard():
    deep = {
        path.parent.relative_to(ROOT).as_posix()
        for path in files(*OURS)
        if len(path.relative_to(ROOT).parts) > 2
    }
    assert deep == {"worker/engine", "gateway/dashboard"}


def test_tests_mirror_the_tree():
    # A folder of tests stands for a folder of code; golden/ holds the wire's pinned bytes, browser/
    # drives Chromium through the pages of a whole fleet, faults/ is the fault campaign.
    inside = [path.relative_to(ROOT / "tests") for path in files("tests")]
    folders = {path.parts[0] for path in inside if len(path.parts) > 1}
    assert folders <= {*FOLDERS, "browser", "faults", "golden"}


# -- imports ---------------------------------------------------------------------------------

STORES_AND_TEXT = (
    *("accounts", "database", "ledger", "prompts", "records"),
    *("redis_client", "specs", "streams", "tokens", "wire"),
)
IMPORT_RULES = {
    "kernels import nothing of ours": (
        ["kernels"],
        [f"headrace.{name}" for name in OURS if name != "kernels"],
    ),
    "contract imports none of the programs and nothing heavy": (
        ["contract"],
        [
            *(f"headrace.{name}" for name in OURS if name != "contract"),
            *("torch", "flask", "triton", "gevent", "transformers", "celery"),
        ],
    ),
    "gateway does not import the others": (
        ["gateway"],
        ["headrace.worker", "headrace.fleet", "headrace.kernels", "torch", "triton"],
    ),
    "worker does not import the others": (
        ["worker"],
        ["headrace.gateway", "headrace.fleet", "flask", "celery"],
    ),
    "fleet starts the others as processes": (
        ["fleet"],
        ["headrace.gateway", "headrace.worker", "headrace.kernels"],
    ),
    "the engine touches no store, no text and no wire": (
        ["worker/engine"],
        [
            *("redis", "sqlalchemy", "psycopg", "httpx", "urllib", "requests", "tokenizers"),
            *(f"headrace.contract.{name}" for name in STORES_AND_TEXT),
        ],
    ),
    "programs and tests import our packages by their whole names": (FOLDERS, OURS),
    "nothing is imported from pickle": (FOLDERS, ["pickle", "cloudpickle", "dill", "shelve"]),
}


@pytest.mark.parametrize("rule", IMPORT_RULES)
def test_import_rules(rule):
    folders, banned = IMPORT_RULES[rule]
    assert breaches(files(*folders), *banned) == []


def test_triton_is_imported_under_kernels_only():
    # bench and tests may ask it for timings and for its compiler.
    elsewhere = [name for name in OURS if name != "kernels"]
    assert breaches(files(*elsewhere, "migrations"), "triton") == []


def test_invariant_9_the_engine_opens_no_socket():
    # It inherits one socket, by file descriptor, and that is all it ever calls of the module.
    for path in files("worker/engine"):
        made = {name for name in calls_in(path) if name.startswith("socket.")}
        assert made <= {"socket.socket"}, name_of(path)
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "socket.socket":
                assert [k.arg for k in node.keywords] == ["fileno"], name_of(path)
                assert node.args == [], name_of(path)


# -- one place for each ----------------------------------------------------------------------


def strings_of(path: Path) -> list[tuple[int, str]]:
    constants = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant))
    return [(node.lineno, node.value) for node in constants if isinstance(node.value, str)]


def test_redis_keys_are_named_in_one_file():
    found = [
        f"{name_of(path)}:{line}"
        for path in files(*OURS, "migrations", "bench")
        if path != ROOT / "contract" / "keys.py"
        for line, text in strings_of(path)
        if re.search(r"\bhr:", text)
    ]
    assert found == []


#: Who may import the Redis client, and why.
REDIS_FILES = {
    "contract/redis_client.py",  # makes connections, knows the client's errors
    "contract/streams.py",
    "contract/tokens.py",
    "contract/scripts.py",
    "contract/live.py",
}


def test_only_streams_and_tokens_issue_redis_commands():
    paths = [path for path in files(*OURS) if name_of(path) not in REDIS_FILES]
    assert breaches(paths, "redis", "valkey") == []
    # A client may be made, passed on and closed; nothing else is called on it. (The fleet's client
    # is one of the HTTP API.)
    used = re.compile(r"(^|[._])(client|redis)\.(?!close$)\w+$")
    found = [
        f"{name_of(path)}: {call}"
        for path in paths
        if not name_of(path).startswith("fleet/")
        for call in sorted(calls_in(path))
        if used.search(call) and call != "redis_client.connect"
    ]
    assert found == []


#: Who may read or write the environment, and why.
ENVIRONMENT_FILES = {
    "fleet/cli.py",  # entry point: reads it once and passes it on
    "gateway/app.py",  # entry point: create_app_from_env
    "gateway/server.py",  # entry point: gunicorn's configuration
    "gateway/tasks.py",  # entry point: Celery
    "worker/__main__.py",  # entry point
}


def test_the_environment_is_read_at_entry_points_only():
    readers = set()
    for path in files(*OURS, "migrations"):
        nodes = (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.Attribute))
        if any(re.match(r"os\.(environb?|getenv|putenv|unsetenv)$", ast.unparse(n)) for n in nodes):
            readers.add(name_of(path))
        bare = {"os.environ", "os.getenv", "os.environb"} & imports_of(path)
        assert not bare, f"{name_of(path)} imports {bare}"
    assert readers <= ENVIRONMENT_FILES


# -- names, sizes, texts ---------------------------------------------------------------------


def test_no_file_is_named_after_nothing():
    bad = [name_of(p) for p in files(*FOLDERS) if set(p.stem.split("_")) & FORBIDDEN_NAMES]
    assert bad == []


@pytest.mark.parametrize("path", files(*OURS, "bench", "migrations"), ids=name_of)
def test_each_module_says_what_it_is_and_why_it_is_long(path):
    docstring = ast.get_docstring(tree_of(path)) or ""
    assert docstring, "a module begins with its contract (style 4)"
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    if num_lines > EXPLAINED_LINES:
        assert "Size:" in docstring, f"{num_lines} lines: say why after `Size:` in the docstring"


def test_no_file_is_longer_than_a_reader_can_hold():
    long = {name_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files(*FOLDERS)}
    assert {name: num for name, num in long.items() if num > MAX_LINES} == {}


def test_open_ends_name_their_issue():
    # Each word is put together from two, so that this file does not find itself.
    words = "|".join(a + b for a, b in (("TO", "DO"), ("FIX", "ME"), ("X", "XX")))
    open_end = re.compile(rf"\b({words})\b(?! *\(#\d+\))")
    found = [
        f"{name_of(path)}:{number}"
        for path in files(*FOLDERS)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if open_end.search(line)
    ]
    assert found == []


def functions_of(path: Path) -> list[tuple[int, str]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{name_of(path)}:{node.name}")
        for node in ast.walk(tree_of(path))
        if isinstance(node, kinds)
    ]


def test_the_largest_files_and_functions_are_shown(capsys):
    code = files(*OURS, "migrations", "bench")
    by_lines = [(len(p.read_text(encoding="utf-8").splitlines()), name_of(p)) for p in code]
    functions = [item for path in code for item in functions_of(path)]
    assert by_lines
    assert functions
    with capsys.disabled():
        for title, items in (("files", by_lines), ("functions", functions)):
            largest = sorted(items, reverse=True)[:10]
            print(f"\nlargest {title}: " + ", ".join(f"{name} {size}" for size, name in largest))
