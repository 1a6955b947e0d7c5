"""Alert rules and Prometheus' configuration, judged by Prometheus' own tool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    assert found, "promtool is not here: install Debian's package `prometheus`"
    return found


def run(promtool: str, *arguments: str) -> None:
    done = subprocess.run(
        [promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_are_valid(promtool):
    run(promtool, "check", "rules", "alerts.yml")


def test_the_configuration_is_valid_and_loads_the_rules(promtool):
    run(promtool, "check", "config", "prometheus.yml")
    assert yaml.safe_load((FOLDER / "prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]


def test_the_rules_fire_when_they_must_and_are_silent_when_all_is_well(promtool):
    run(promtool, "test", "rules", "alerts_test.yml")


def test_each_rule_is_fired_by_a_test_and_says_what_to_do():
    tests = (FOLDER / "alerts_test.yml").read_text()
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 10
    for rule in rules:
        assert re.search(rf"\b{rule['alert']}\b", tests), f"no test fires {rule['alert']}"
        assert rule["labels"]["severity"] in ("page", "warn")
        assert set(rule["annotations"]) == {"summary", "description"}
