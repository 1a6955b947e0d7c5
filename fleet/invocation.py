"""One run of the CLI: its settings, and the way to the API or the database they name.

An address is taken from the option, else from the setting (HEADRACE_API_URL, ...), else from the
`fleet.json` of the data folder, which `headrace up` writes.

Made once by `cli.main`; passed to the commands as typer's context object.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from pydantic import SecretStr

from headrace.contract.accounts import Accounts
from headrace.contract.database import connect
from headrace.contract.operators import Operators
from headrace.contract.settings import FleetSettings
from headrace.fleet.access import read_access
from headrace.fleet.client import Client
from headrace.fleet.failure import FleetError


@dataclass(frozen=True, slots=True)
class Invocation:
    environ: Mapping[str, str]
    settings: FleetSettings

    @property
    def data_folder(self) -> Path:
        return Path(self.settings.data_dir).absolute()

    def client(self) -> Client:
        url = self.settings.api_url
        key = self.settings.api_key.get_secret_value()
        if not (url and key):
            kept = read_access(self.data_folder)
            if kept is None:
                raise FleetError(
                    f"no API is named, and no fleet was started in {self.data_folder}: start one"
                    " with `headrace up`, or set HEADRACE_API_URL and HEADRACE_API_KEY"
                )
            if not key and url and url != kept.api_url:
                raise FleetError(
                    f"the key in {self.data_folder} is for {kept.api_url}, not for {url}:"
                    " set HEADRACE_API_KEY"
                )
            url, key = url or kept.api_url, key or kept.api_key
        return Client(url, key)

    def database_url(self) -> str:
        given = self.settings.database_url.get_secret_value()
        if given:
            return given
        kept = read_access(self.data_folder)
        if kept is None:
            raise FleetError(
                f"no database is named, and no fleet was started in {self.data_folder}: start one"
                " with `headrace up`, or set HEADRACE_DATABASE_URL"
            )
        return kept.database_url

    def change(self, **values: str | SecretStr | None) -> "Invocation":
        """Return a copy with those of the settings that options gave."""
        given = {name: value for name, value in values.items() if value is not None}
        settings = FleetSettings.model_validate({**self.settings.model_dump(), **given})
        return Invocation(self.environ, settings)


def invocation(context: typer.Context) -> Invocation:
    """Return the invocation that `cli` put into typer's context."""
    found = context.find_object(Invocation)
    assert found is not None, "cli.options runs before every command"
    return found


@contextmanager
def operators_at(url: str) -> Iterator[Operators]:
    """Open the operators in the database at `url`."""
    engine = connect(url, pool_size=1)
    try:
        yield Operators(engine)
    finally:
        engine.dispose()


@contextmanager
def accounts_at(url: str) -> Iterator[Accounts]:
    """Open the accounts in the database at `url`."""
    engine = connect(url, pool_size=1)
    try:
        yield Accounts(engine)
    finally:
        engine.dispose()
