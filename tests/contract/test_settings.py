"""Settings: read once from the environment, strict about names and ranges, quiet about secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from headrace.contract.errors import ConfigurationError
from headrace.contract.settings import (
    PREFIX,
    FleetSettings,
    GatewaySettings,
    Settings,
    StoreSettings,
    TasksSettings,
    WorkerSettings,
    table,
)

ROOT = Path(__file__).resolve().parents[2]
STORES = {
    "HEADRACE_REDIS_URL": "redis://:pw@127.0.0.1:6379/0",
    "HEADRACE_DATABASE_URL": "postgresql+psycopg://u:pw@127.0.0.1:5432/headrace",
}
CLASSES = [GatewaySettings, WorkerSettings, TasksSettings, FleetSettings]


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_are_enough_where_the_stores_are_named(cls):
    settings = cls.from_env(STORES | {"PATH": "/bin", "HOME": "/"})
    assert settings.redis_url.get_secret_value() == STORES["HEADRACE_REDIS_URL"]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_child_reads_what_its_parent_wrote(cls):
    settings = cls.from_env(STORES)
    assert cls.from_env(settings.to_env()) == settings


def test_invariant_2_an_unknown_variable_is_an_error():
    with pytest.raises(ConfigurationError, match="HEADRACE_LEASE_SECONDS"):
        TasksSettings.from_env(STORES | {"HEADRACE_LEASE_SECONDS": "10"})
    with pytest.raises(ConfigurationError, match="HEADRACE_FOO"):
        TasksSettings.from_env(STORES | {"HEADRACE_FOO_FILE": __file__})
    with pytest.raises(ConfigurationError, match="HEADRACE_lease_s"):
        TasksSettings.from_env(STORES | {"HEADRACE_lease_s": "10"})


def test_invariant_2_another_processs_variable_is_no_error():
    assert TasksSettings.from_env(STORES | {"HEADRACE_BLOCK_SIZE": "64"}).lease_s == 10.0


@pytest.mark.parametrize("cls", [GatewaySettings, WorkerSettings, TasksSettings])
def test_invariant_3_a_process_without_its_secrets_does_not_start(cls):
    with pytest.raises(ConfigurationError, match=r"DATABASE_URL.*required|required.*DATABASE_URL"):
        cls.from_env({"HEADRACE_REDIS_URL": STORES["HEADRACE_REDIS_URL"]})


def test_invariant_3_a_secret_may_stand_in_a_file(tmp_path):
    secret = tmp_path / "redis_url"
    secret.write_text("redis://:from-file@h:1/0\n")
    environ = STORES | {"HEADRACE_REDIS_URL_FILE": str(secret)}
    with pytest.raises(ConfigurationError, match="keep one"):
        TasksSettings.from_env(environ)
    del environ["HEADRACE_REDIS_URL"]
    settings = TasksSettings.from_env(environ)
    assert settings.redis_url.get_secret_value() == "redis://:from-file@h:1/0"
    secret.write_bytes(b"redis://\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        TasksSettings.from_env(environ)
    secret.unlink()
    with pytest.raises(ConfigurationError, match=str(secret)):
        TasksSettings.from_env(environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LEASE_S", "0"),
        ("LEASE_S", "nan"),
        ("LEASE_S", "inf"),
        ("LEASE_S", ""),
        ("RETENTION_DAYS", "1.5"),
        ("RETENTION_DAYS", "-1"),
        ("LOG_LEVEL", "loud"),
        ("LOG_FORMAT", "xml"),
        ("METRICS_BIND", "9464"),
        ("METRICS_BIND", ":9464"),
        ("METRICS_BIND", "127.0.0.1:http"),
        ("METRICS_BIND", "127.0.0.1:70000"),
        ("REDIS_URL", "http://:hunter2@h/0"),
        ("REDIS_URL", ""),
        ("DATABASE_URL", "postgresql://u:hunter2@h/d"),
    ],
)
def test_a_value_out_of_range_is_named_and_secrets_are_not_shown(name, value):
    with pytest.raises(ConfigurationError, match=f"HEADRACE_{name}") as caught:
        TasksSettings.from_env(STORES | {f"HEADRACE_{name}": value})
    assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize(("name", "value"), [("URL", "collector:4318"), ("SHARE", "1.5")])
def test_a_collector_that_cannot_be_one_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"HEADRACE_TRACES_{name}"):
        GatewaySettings.from_env(STORES | {f"HEADRACE_TRACES_{name}": value})


def test_what_depends_on_the_device_is_auto_or_a_number_in_range():
    settings = WorkerSettings.from_env(STORES)
    names = ("kv_cache_mb", "max_num_seqs", "max_step_tokens", "target_step_ms")
    assert {getattr(settings, name) for name in names} == {"auto"}
    given = {"HEADRACE_MAX_NUM_SEQS": "1024", "HEADRACE_TARGET_STEP_MS": "0"}
    settings = WorkerSettings.from_env(STORES | given)
    assert (settings.max_num_seqs, settings.target_step_ms) == (1024, 0.0)
    assert WorkerSettings.from_env(settings.to_env()) == settings
    for name, value in (
        ("MAX_NUM_SEQS", "0"),
        ("MAX_NUM_SEQS", "5000"),
        ("MAX_STEP_TOKENS", "15"),
        ("MAX_STEP_TOKENS", "many"),
        ("KV_CACHE_MB", "-1"),
        ("TARGET_STEP_MS", "nan"),
        ("GPU_MEMORY_FRACTION", "1"),
        ("DEVICE", "tpu"),
        ("KV_DTYPE", "int4"),
    ):
        with pytest.raises(ConfigurationError, match=f"HEADRACE_{name}"):
            WorkerSettings.from_env(STORES | {f"HEADRACE_{name}": value})


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigurationError) as caught:
        TasksSettings.from_env(STORES | {"HEADRACE_LEASE_S": "x", "HEADRACE_RETENTION_DAYS": "0"})
    assert "HEADRACE_LEASE_S" in caught.value.detail
    assert "HEADRACE_RETENTION_DAYS" in caught.value.detail


def test_settings_are_frozen_and_their_text_holds_no_secret():
    settings = TasksSettings.from_env(STORES)
    with pytest.raises(ValidationError):
        settings.lease_s = 5  # type: ignore[misc]
    assert ":pw@" not in repr(settings) + str(settings)
    assert isinstance(settings.redis_url, SecretStr)


@pytest.mark.parametrize("cls", Settings.registry)
def test_invariant_4_each_field_has_a_sentence_and_numbers_have_a_range(cls):
    for name, field in cls.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        if field.annotation in (int, float):
            bounds = {type(m).__name__ for m in field.metadata}
            assert bounds & {"Ge", "Gt", "Interval"}, name
            assert bounds & {"Le", "Lt", "Interval"}, name


def test_invariant_4_the_readmes_table_is_the_fields():
    assert table() in (ROOT / "README.md").read_text(), (
        "README's settings table is out of date: paste what "
        "`python -m headrace.contract.settings` prints"
    )


def test_the_table_has_each_variable_once_with_its_default_and_readers():
    rows = [row.strip("| ").split(" | ") for row in table().splitlines()[2:]]
    variables = [row[0].strip("`") for row in rows]
    fields = {PREFIX + name.upper() for cls in CLASSES for name in cls.model_fields}
    assert variables == sorted(fields)
    by_name = dict(zip(variables, rows, strict=True))
    assert by_name["HEADRACE_LEASE_S"][1] == "`10.0`"
    assert by_name["HEADRACE_LEASE_S"][3] == "gateway, worker, tasks"
    assert by_name["HEADRACE_REDIS_URL"][1] == "required"
    assert by_name["HEADRACE_MODEL"][1] == "empty"
    assert StoreSettings.model_fields.keys() < GatewaySettings.model_fields.keys()
