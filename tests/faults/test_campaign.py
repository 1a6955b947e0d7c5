"""A slice of every scenario, with a fixed seed: the campaign itself must not rot between its runs.

Each starts servers and programs of its own, so what one scenario broke does not blur the next.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.tests.faults.campaign import Options, run_scenario
from headrace.tests.faults.report import COLUMNS, row_of, violations_text, write_outcome
from headrace.tests.faults.scenario import Scenario, all_fault_actions, all_scenarios

SEED = 20


@pytest.mark.parametrize("scenario", all_scenarios(), ids=lambda scenario: scenario.name)
def test_a_slice_keeps_every_promise(scenario: Scenario, smollm2_folder, tmp_path):
    outcome = run_scenario(scenario, smollm2_folder, Options(seed=SEED, keep=tmp_path / "kept"))
    assert outcome.is_clean, violations_text(outcome)
    assert len(row_of(outcome)) == len(COLUMNS)
    assert write_outcome(outcome, tmp_path / "out").exists()


def test_names_are_each_given_once():
    names = [scenario.name for scenario in all_scenarios()]
    assert len(names) == len(set(names))
    assert all_fault_actions()


async def _breaks(_run: object) -> None:
    raise AssertionError("the scenario's own mistake")


def test_a_scenario_that_fails_is_no_clean_run(smollm2_folder, tmp_path):
    calm = next(each for each in all_scenarios() if each.name == "calm")
    scenario = replace(calm, run=_breaks, num_workers=1)
    outcome = run_scenario(scenario, smollm2_folder, Options(keep=tmp_path / "kept"))
    assert outcome.verdict.codes == {"broken"}
