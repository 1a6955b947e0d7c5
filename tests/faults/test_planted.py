"""The checker could have failed: each planted bug is caught, the same faults alone survived."""

import pytest

from headrace.tests.faults.campaign import Options, run_scenario
from headrace.tests.faults.planted import PLANTS
from headrace.tests.faults.scenarios_planted import CONTROL, PLANTED


def test_every_planted_bug_has_a_scenario():
    assert PLANTED.keys() == PLANTS.keys()


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_caught(bug, smollm2_folder, tmp_path):
    scenario, codes = PLANTED[bug]
    outcome = run_scenario(scenario, smollm2_folder, Options(seed=7, keep=tmp_path))
    found = {each.code for each in outcome.verdict.violations}
    assert codes <= found if len(codes) == 1 else codes & found, outcome.verdict
    assert not found & {"broken", "overdue", "surprise"}, outcome.verdict


def test_the_same_faults_without_a_bug_are_survived(smollm2_folder, tmp_path):
    outcome = run_scenario(CONTROL, smollm2_folder, Options(seed=7, keep=tmp_path))
    assert outcome.verdict.violations == []
    assert outcome.verdict.figures["faults_done"].keys() == {"steal-entry", "crash"}
