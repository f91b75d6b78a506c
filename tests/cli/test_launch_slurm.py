"""What Slurm is told: steps, resources, job scripts. ``scripts/test-slurm`` asks a real one."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slime_async.cli import launch_slurm
from slime_async.cli.launch_slurm import SlurmLauncher, SrunProcess, slurm_command, step
from slime_async.cli.launcher import RoleCommand
from slime_async.cli.main import main
from slime_async.cli.slurm_job import actors_script, run_script
from slime_async.config import Config, ConfigError
from tests.e2e.runs import DEMO


def config(ranks: int = 1, actors: int = 2, **cluster: Any) -> Config:
    return Config.model_validate({"learner": {"ranks": ranks}, "actor": {"count": actors}, "cluster": cluster})


LEARNER = RoleCommand("learner", ("-m", "x", "learner"), ranks=16)
ACTOR = RoleCommand("actor-1.2", ("-m", "x", "actor"))


def test_an_actor_is_a_step_of_its_own() -> None:
    argv = step(ACTOR, config(actor_gpus=2, actor_gpu_kind="h100", actor_cpus=24))
    assert argv[:3] == ("srun", "--het-group=2", "--job-name=actor-1.2")
    assert {"--nodes=1", "--ntasks=1", "--cpus-per-task=24", "--gpus-per-task=h100:2", "--exact"} <= set(argv)
    assert argv[-4:] == (sys.executable, "-m", "x", "actor")


def test_a_learner_of_one_machine_is_one_task() -> None:
    argv = step(LEARNER, config(16, learner_gpus=1, learner_cpus=4))
    assert {"--het-group=1", "--nodes=1", "--ntasks=1", "--cpus-per-task=64", "--gpus-per-task=16"} <= set(argv)
    assert argv[argv.index("torch.distributed.run") + 1 :] == (
        "--standalone",
        "--nproc-per-node",
        "16",
        "-m",
        "x",
        "learner",
    )


def test_a_learner_of_several_machines_meets_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"show hostnames n[7-8]": "n7\nn8\n", "show node n7": "NodeName=n7 NodeAddr=10.0.0.7 NodeHostName=n7"}
    monkeypatch.setenv("SLURM_JOB_NODELIST_HET_GROUP_1", "n[7-8]")
    monkeypatch.setattr(launch_slurm, "scontrol", lambda *words: answers[" ".join(words)])
    argv = step(LEARNER, config(16, learner_ranks_per_node=8, rendezvous_port=29600))
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(argv)
    torchrun = argv[argv.index("--nnodes") :]
    assert torchrun[:8] == (
        "--nnodes",
        "2",
        "--master-addr",
        "10.0.0.7",
        "--master-port",
        "29600",
        "--nproc-per-node",
        "8",
    )
    assert '--node-rank "$SLURM_NODEID"' in argv[argv.index("-c") + 1]


def test_a_job_has_a_component_for_each_role(tmp_path: Path) -> None:
    made = config(
        16, learner_ranks_per_node=8, sbatch="--account=lab", sbatch_hub="--partition=cpu", setup="module load x"
    )
    script = run_script(made, tmp_path / "slurm.toml", tmp_path)
    hub, learner, actors = [line for line in script.splitlines() if line.startswith("#SBATCH --job")]
    assert "--partition=cpu" in hub
    assert "--nodes=2 --ntasks=2" in learner
    assert "--ntasks=2" in actors
    assert all("--account=lab" in line and "--requeue" in line for line in (hub, learner, actors))
    assert script.index("module load x") < script.index("train")
    assert f"--launcher slurm --run-directory {tmp_path}" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)


def test_actors_that_join_are_told_before_they_are_preempted(tmp_path: Path) -> None:
    script = actors_script(config(actor_cpus=3), tmp_path, 5)
    assert "--signal=USR1@40" in script
    assert "--ntasks=5 --cpus-per-task=3" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (3, 3), (137, -9), (143, -15)])
def test_srun_tells_signals_as_shells_do(code: int, seen: int) -> None:
    class Ended:
        async def wait(self) -> int:
            return code

    assert asyncio.run(SrunProcess(Ended()).wait()) == seen  # type: ignore[arg-type]


def test_outside_of_a_job_it_says_how_to_submit_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_HET_SIZE", raising=False)
    with pytest.raises(ConfigError, match="slime-async launch slurm CONFIG"):
        SlurmLauncher(config(), tmp_path)
    with pytest.raises(ConfigError, match="there is no no-such-scheduler here"):
        slurm_command(("no-such-scheduler",))


def test_a_job_that_could_not_go_on_is_not_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "slurm", str(DEMO), "--dry-run"]) == 2
    assert "checkpoint.interval_steps = 0: a job that is requeued" in capsys.readouterr().err
