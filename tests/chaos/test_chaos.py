"""A short run under fire: every role dies, on purpose and at random, and nothing is lost or trained twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.chaos.run import Aims, demo_config, run_under_fire
from tests.e2e.runs import TINY

SETTINGS = {
    **TINY,
    "run.steps": "40",
    "warm-start.steps": "10",
    "actor.count": "1",
    "checkpoint.interval-steps": "4",
    "evaluation.before": "false",
    "evaluation.after": "false",
    "learner.max-restarts": "20",
}


@pytest.mark.timeout(400)
def test_a_run_whose_roles_are_all_killed_ends_well_and_passes_its_audit(tmp_path: Path) -> None:
    config = demo_config({**SETTINGS, "run.directory": str(tmp_path)})
    aims: Aims = {
        "learner": (("learner_commit", 3), ("learner_broadcast", 3)),
        "actor": (("actor_delivery", 40),),
        "hub": (("hub_delivery", 20),),
    }
    outcome = run_under_fire(config, aims, seconds=0, least=1, seed=0)
    assert outcome.exit_code == 0
    assert outcome.audit.clean, "\n".join(outcome.audit.lines())
    assert outcome.summary.steps == 40
    died = Counter(death.role for death in outcome.deaths)
    assert died["hub"] >= 2
    assert died["actor"] >= 2
    assert died["learner"] >= 3
