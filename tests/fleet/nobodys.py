"""A fleet whose one model nobody serves, for commands of `headrace admin`: jobs stay queued."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.contract.accounts import Accounts
from headrace.contract.database import connect
from headrace.contract.roles import Role
from headrace.contract.wire import ModelCard
from headrace.fleet.cli import run
from headrace.tests.fleet.fleet_parts import Fleet

MODEL = "nobodys"
Cli = Callable[..., tuple[int, str, str]]


@contextlib.contextmanager
def nobodys_fleet(folder: Path) -> Iterator[Fleet]:
    """Start servers and a gateway; `key` is an operator's and `other_key` a viewer's."""
    made = Fleet(folder, folder / MODEL)
    made.start_servers()
    try:
        engine = connect(made.postgres.url)
        accounts = Accounts(engine)
        card = {"folder": "/nowhere", "max_seq_tokens": 1024, "vocab_size": 1000}
        accounts.register_model(
            ModelCard(name=MODEL, dtype="float32", has_chat_template=False, **card)
        )
        made.key = accounts.create_key(tenant="ops", name="k", role=Role.OPERATOR).secret
        made.other_key = accounts.create_key(tenant="ops", name="v", role=Role.VIEWER).secret
        engine.dispose()
        made.start_gateway()
        yield made
    finally:
        made.stop()


def admin_cli(fleet: Fleet, capfd: pytest.CaptureFixture[str], group: str) -> Cli:
    """Return what runs `headrace admin GROUP ...` and returns exit code, output and remarks."""

    def cli(*arguments: str, key: str = "") -> tuple[int, str, str]:
        environ = {
            "HEADRACE_API_URL": fleet.api,
            "HEADRACE_API_KEY": key or fleet.key,
            "HEADRACE_DATA_DIR": str(fleet.folder),
        }
        code = run(["admin", group, *arguments], environ)
        said = capfd.readouterr()
        return code, said.out, said.err

    return cli
