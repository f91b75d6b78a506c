"""Whole runs: hub, actors and learner as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slime_async.transport.security import make_keys
from tests.e2e import judges
from tests.e2e.runs import ROOT, TIMEOUT_S, environment, flags, started

GONE_TIMEOUT_S = 30.0
"""The launcher's own graces are 3.5 s; a loaded machine takes longer to bury processes"""

pytestmark = pytest.mark.timeout(240)


def test_a_short_run_trains_within_the_bound_and_writes_what_it_promises(tmp_path: Path) -> None:
    with started(tmp_path / "runs", {"run.steps": "6", "evaluation.tasks": "32"}) as run:
        code, output = run.finish()
        assert code == 0, output
        assert output.splitlines()[-1] == f"run directory: {run.path}"
        summary = run.summary()
        assert summary["outcome"] == "finished"
        assert summary["steps"] == 6
        assert 0 < summary["trajectories_trained"] <= 96  # one whose tokens are all too old counts as dropped
        assert 0 <= summary["staleness_max"] <= summary["staleness_bound"] == 2
        for name in ("accuracy_before", "accuracy_after", "overlap_fraction"):
            assert 0 <= summary[name] <= 1
        assert summary["accuracy_supervised_only"] is None
        assert (run.path / "config.toml").exists()
        evaluation = [sys.executable, "-m", "slime_async.cli.main", "eval", str(run.path / "checkpoints" / "final")]
        evaluation += ["--config", str(run.path / "config.toml"), "--tasks", "8"]
        result = subprocess.run(evaluation, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
        assert result.returncode == 0, result.stderr
        assert "held-out: accuracy" in result.stdout


def test_a_delayed_actors_tokens_beyond_the_bound_are_masked_and_counted(tmp_path: Path) -> None:
    settings = {"run.steps": "100000", "staleness.max-staleness": "1", "batch.groups": "2", "batch.group-size": "2"}
    with started(tmp_path / "runs", {**settings, "evaluation.before": "false", "evaluation.after": "false"}) as run:
        run.wait_for("the hub", lambda: (run.path / "hub.address").exists())
        argv = [sys.executable, "-m", "slime_async.cli.main", "actor", str(run.path / "config.toml")]
        argv += ["--run-directory", str(run.path), "--hub", (run.path / "hub.address").read_text(), "--name", "late"]
        argv += flags({"actor.slots": "1", "actor.delay-s": "1.5"})
        late = subprocess.Popen(argv, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            run.wait_for("masked tokens", lambda: sum(step["tokens_masked_as_stale"] for step in run.steps()) > 0)
        finally:
            late.kill()
            late.wait(TIMEOUT_S)
        run.process.send_signal(signal.SIGINT)
        run.finish()
        summary = run.summary()
        assert summary["tokens_masked_as_stale"] > 0
        assert summary["staleness_max"] <= summary["staleness_bound"] == 1


def test_a_killed_actor_is_replaced_and_the_run_goes_on(tmp_path: Path) -> None:
    with started(tmp_path / "runs", {"run.steps": "30"}) as run:
        run.wait_for("three steps", lambda: len(run.steps()) >= 3)
        [actor] = run.pids("actor")
        os.kill(actor, signal.SIGKILL)
        code, output = run.finish()
        assert code == 0, output
        assert run.summary()["actor_deaths"] == 1
        assert run.summary()["steps"] == 30
        assert "role restarted" in output


def test_with_keys_every_connection_is_authenticated(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", "client")
    settings = {"run.steps": "2", "hub.keys": str(tmp_path / "keys")}
    with started(tmp_path / "runs", settings) as run:
        code, output = run.finish()
        assert code == 0, output
        assert run.summary()["steps"] == 2


def test_keys_that_are_missing_are_told_before_anything_trains(tmp_path: Path) -> None:
    with started(tmp_path / "runs", {"run.steps": "2", "hub.keys": str(tmp_path / "nowhere")}) as run:
        code, output = run.finish()
        assert code == 2
        assert "make keys with slime-async keygen" in output
        assert "Traceback" not in output


def test_a_hub_that_is_killed_goes_on_where_it_was_with_its_judge_and_evaluations(tmp_path: Path) -> None:
    settings = {"task.group-reward": f"{judges.__name__}:ranked", "task.filter": f"{judges.__name__}:ascending"}
    settings |= {"evaluation.interval-versions": "5", "evaluation.samples": "2", "evaluation.before": "false"}
    with started(tmp_path / "runs", {"run.steps": "30", **settings}) as run:
        run.wait_for("three steps", lambda: len(run.steps()) >= 3)
        [hub] = run.pids("hub")
        os.kill(hub, signal.SIGKILL)
        code, output = run.finish()
        assert code == 0, output
        assert run.summary()["hub_deaths"] == 1
        assert [step["step"] for step in run.steps()] == list(range(30))
        assert {step["reward_mean"] for step in run.steps()} == {judges.MEAN}
        assert sum(step["groups_filtered"] for step in run.steps()) > 0
        audit = [sys.executable, "-m", "slime_async.cli.main", "audit", str(run.path)]
        result = subprocess.run(audit, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
        assert result.returncode == 0, result.stdout
        assert "filtered)" in result.stdout
        beside = [e for e in run.events() if e["event"] == "evaluation" and e["name"].startswith("version_")]
        assert beside
        for result_event in beside:
            assert result_event["tasks"] == 16
            assert result_event["accuracy"] <= result_event["pass@2"] <= 1
            assert result_event["pinned"] == (result_event["version_first"] == result_event["version"])


@pytest.mark.parametrize("role", ["hub", "learner"])
def test_the_death_of_hub_or_learner_ends_everything_with_a_clear_error(tmp_path: Path, role: str) -> None:
    with started(tmp_path / "runs", {"run.steps": "1000", f"{role}.max_restarts": "0"}) as run:
        run.wait_for("a step", lambda: len(run.steps()) >= 1)
        [victim] = run.pids(role)
        os.kill(victim, signal.SIGKILL)
        code, output = run.finish()
        assert code == 1
        assert f"{role} was killed by SIGKILL" in output
        assert run.summary()["outcome"] == "failed"
        run.wait_until_gone(GONE_TIMEOUT_S)


def test_ctrl_c_stops_every_process(tmp_path: Path) -> None:
    with started(tmp_path / "runs", {"run.steps": "1000"}) as run:
        run.wait_for("a step", lambda: len(run.steps()) >= 1)
        run.process.send_signal(signal.SIGINT)
        run.wait_until_gone(GONE_TIMEOUT_S)
        assert run.finish()[0] == 130


def test_no_orphan_survives_the_death_of_the_launcher(tmp_path: Path) -> None:
    with started(tmp_path / "runs", {"run.steps": "1000"}) as run:
        run.wait_for("all roles", lambda: all(run.pids(role) for role in ("hub", "actor", "learner")))
        run.process.kill()
        run.wait_until_gone(GONE_TIMEOUT_S)
