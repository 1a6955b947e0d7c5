"""Where the CLI finds the API, the key and the database."""

import pytest

from headrace.contract.settings import FleetSettings
from headrace.fleet.access import Access, read_access, write_access
from headrace.fleet.cli import run
from headrace.fleet.client import Client
from headrace.fleet.failure import FleetError
from headrace.fleet.invocation import Invocation

KEPT = Access("http://127.0.0.1:1", "hr_kept", "postgresql+psycopg://kept", "redis://kept")


def invocation(folder, **variables: str) -> Invocation:
    environ = {"HEADRACE_DATA_DIR": str(folder), **variables}
    return Invocation(environ, FleetSettings.from_env(environ))


@pytest.fixture
def sent(monkeypatch):
    """The address and the key of each client that is made."""
    made: list[tuple[str, str]] = []
    monkeypatch.setattr(
        Client, "__init__", lambda self, url, key, **options: made.append((url, key))
    )
    return made


def test_the_fleet_of_the_data_folder_is_used(tmp_path, sent):
    write_access(tmp_path, KEPT)
    assert read_access(tmp_path) == KEPT
    invocation(tmp_path).client()
    assert sent == [(KEPT.api_url, KEPT.api_key)]
    assert invocation(tmp_path).database_url() == KEPT.database_url


def test_settings_win_over_the_folder_and_options_over_both(tmp_path, sent):
    write_access(tmp_path, KEPT)
    found = invocation(tmp_path, HEADRACE_API_KEY="hr_set", HEADRACE_DATABASE_URL="set")
    found.client()
    found.change(api_url="http://option", api_key=None).client()
    assert sent == [(KEPT.api_url, "hr_set"), ("http://option", "hr_set")]
    assert found.database_url() == "set"


def test_the_folders_key_is_sent_to_the_folders_api_only(tmp_path, sent):
    write_access(tmp_path, KEPT)
    with pytest.raises(FleetError, match="HEADRACE_API_KEY"):
        invocation(tmp_path, HEADRACE_API_URL="http://elsewhere").client()
    assert sent == []


def test_without_a_fleet_the_way_to_one_is_said(tmp_path):
    for call in (invocation(tmp_path).client, invocation(tmp_path).database_url):
        with pytest.raises(FleetError, match="headrace up"):
            call()


def test_a_broken_access_file_is_named(tmp_path):
    for text in ("{", "[]", '{"api_url": 1}'):
        (tmp_path / "fleet.json").write_text(text)
        with pytest.raises(FleetError, match=r"fleet\.json cannot be read"):
            invocation(tmp_path).client()


def test_an_unknown_setting_ends_the_command(capsys):
    assert run(["jobs"], {"HEADRACE_DATADIR": "x"}) == 1
    assert "HEADRACE_DATADIR" in capsys.readouterr().err
