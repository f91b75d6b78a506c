"""Agreement with values that other projects' own functions produced, in float64, gradients included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "data" / "reference"
FILES = (
    "areal_decoupled_ppo_paper_form",
    "verl_rollout_correction",
    "verl_policy_loss",
    "slime_policy_loss_and_corrections",
    "areal_staleness_capacity",
    "staleness_closed_form",
)


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "check-reference"), *map(str, arguments)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, env=environment)


def test_every_reference_case_agrees():
    result = check(*(REFERENCE / f"{name}.json" for name in FILES))
    cases = sum(len(json.loads((REFERENCE / f"{name}.json").read_text())["cases"]) for name in FILES)
    assert result.stdout == f"{cases} passed, 0 failed\n", result.stdout + result.stderr
    assert result.returncode == 0


def test_a_wrong_value_an_unknown_format_and_a_missing_batch_are_each_named(tmp_path):
    content = json.loads((REFERENCE / "verl_policy_loss.json").read_text())
    wrong, absent, unknown = (
        content["cases"][0],
        dict(content["cases"][1], batch="elsewhere"),
        {"id": "x", "expected": {}},
    )
    wrong["expected"]["grad_cur_logp"][0][2] *= 1 + 1e-7
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"cases": [wrong, absent, unknown, content["cases"][2]]}))
    result = check(file, "--inputs", REFERENCE / "inputs.json")
    lines = result.stdout.splitlines()
    assert result.returncode == 1
    assert "grad_cur_logp.0.2 is" in lines[0]
    assert "'elsewhere' is not among the inputs ['mild3', 'stale3']" in lines[1]
    assert "unknown format with fields ['expected', 'id']" in lines[2]
    assert lines[3] == "1 passed, 3 failed"


def test_a_file_that_holds_no_cases_is_one_failure_and_the_others_are_checked(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    other = tmp_path / "other.json"
    other.write_text('{"figures": {}}')
    good = REFERENCE / "staleness_closed_form.json"
    result = check(broken, other, tmp_path / "absent.json", good, REFERENCE / "inputs.json")
    lines = result.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == [
        "FAILED broken.json",
        "FAILED other.json",
        "FAILED absent.json",
    ]
    assert lines[3] == "7 passed, 3 failed"


@pytest.mark.parametrize("name", FILES)
def test_every_reference_file_names_its_source(name):
    source = json.loads((REFERENCE / f"{name}.json").read_text())["source"]
    assert "https://" in source if isinstance(source, str) else len(source["commit"]) == 40
